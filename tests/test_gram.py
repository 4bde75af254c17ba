"""Gram matrices: of 16-bit inputs as they are where the device sums them in float32."""

import pytest
import torch

from lowbit.methods import _gram
from lowbit.methods._gram import gram, inner

CASES = [
    ((40, 6), torch.float32, torch.float32),
    ((40, 6), torch.bfloat16, torch.float32),
    ((3, 40, 6), torch.float16, torch.float32),
    ((40, 6), torch.float64, torch.float64),
    ((3, 40, 6), torch.bfloat16, torch.float64),
]


def drawn(shape, dtype, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("shape, dtype, wanted", CASES)
def test_products_of_inputs_as_they_are(shape, dtype, wanted):
    a, b = drawn(shape, dtype), drawn((*shape[:-1], 4), dtype, 1)
    for found, other in ((gram(a, wanted), a), (inner(a, b, wanted), b)):
        assert found.dtype == wanted
        torch.testing.assert_close(found, (a.double().mT @ other.double()).to(wanted))


@pytest.mark.parametrize("shape, dtype, wanted", CASES)
def test_16_bits_are_summed_in_float32_where_that_can_be(monkeypatch, shape, dtype, wanted):
    monkeypatch.setattr(_gram, "takes_16_bits", lambda device: True)
    asked = []

    def product(a, b, *, out_dtype):
        assert a.dtype == b.dtype == dtype
        asked.append(out_dtype)
        return (a.double() @ b.double()).to(out_dtype)

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(torch, "bmm", product)
    a = drawn(shape, dtype)
    torch.testing.assert_close(gram(a, wanted), (a.double().mT @ a.double()).to(wanted))
    halves = dtype.itemsize == 2 and wanted == torch.float32
    assert asked == [torch.float32] * halves


@pytest.mark.parametrize("shape, dtype, wanted", CASES)
def test_torch_knows_such_a_product(shape, dtype, wanted):
    if dtype.itemsize == 2 and wanted == torch.float32:
        a = torch.empty(shape, dtype=dtype, device="meta")
        product = torch.mm if len(shape) == 2 else torch.bmm
        assert product(a.mT, a, out_dtype=wanted).dtype == wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("shape, dtype, wanted", CASES)
def test_on_the_gpu(shape, dtype, wanted):
    a = drawn(shape, dtype, device="cuda")
    torch.testing.assert_close(gram(a, wanted), (a.double().mT @ a.double()).to(wanted))
