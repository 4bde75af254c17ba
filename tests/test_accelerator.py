"""Every method on an accelerator: no operator mixes devices, and no step of progressive rounding waits for the device."""

from functools import partial

import accelerator
import pytest
import torch
from helpers import LLAMA, save_tiny
from transformers import LlamaConfig

import lowbit
import lowbit.job
from lowbit.methods.tesseraq import TesseraQ
from lowbit.proof import verify

TESSERAQ = ("tesseraq.schedule=exponential-2-3", "tesseraq.iters=3")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    small = dict(LLAMA, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
    return save_tiny(tmp_path_factory.mktemp("model"), LlamaConfig(**small))


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(lowbit.job, "verify", partial(verify, loader=False))  # the loader is a process without this device
    yield from accelerator.entered(monkeypatch)


def quantized(model, out, scheme, recipe, settings=(), offload="device"):
    text = str(model / "text.txt")
    return lowbit.quantize(
        str(model), scheme, recipe, out=out, calib=text, samples=6, length=24, device=accelerator.NAME, settings=settings, offload=offload
    )


CASES = [
    ("rtn", "W4A16g16", ()),
    ("awq+gptq", "W3A16g16", ()),
    ("tesseraq", "W2A16g16", TESSERAQ),
    ("omniquant", "W4A4", ("omniquant.epochs=1",)),
    ("quarot", "W4A4KV4", ()),
    ("claq", "W3A16", ()),
    ("crossquant-deploy", "W4A8g16sym", ()),
]


@pytest.mark.parametrize("recipe, scheme, settings", CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_no_operator_mixes_devices(model, device, tmp_path, recipe, scheme, settings):
    result = quantized(model, tmp_path / "out", scheme, recipe, settings)
    print(sum(device.waits.values()), device.operations)
    for k, v in device.waits.most_common(12): print(v, k)
