"""Whether what runs on the device agrees with plain torch and with the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.grid import Affine, kmeans
from lowbit.grid.bits import pack
from lowbit.grid.packed import PackedColumns, Segment
from lowbit.grid.sums import sums_by
from lowbit.methods import _columns, _rounding
from lowbit.methods._coder import GridColumns
from lowbit.methods._columns import code_columns, inverse_factor
from lowbit.methods._gram import gram
from lowbit.methods._rounding import FROZEN, Adam, SoftRows, hardening

from .bench import GIB, Bench, put, tried

Check = Callable[[Bench], dict[str, float]]


def agreement(b: Bench, found: dict[str, Any]) -> None:
    """Numbers by check, and which of them are beyond what they may be."""
    found |= {"version": _rounding.version_on(b.device), "beyond": []}
    for check, limit in CHECKS.items():
        numbers = found[check.__name__] = tried(lambda check=check: check(b))
        found["beyond"] += [
            f"{check.__name__}: {what}"
            for what, number in numbers.items()
            if what != "failed" and not number <= limit
        ]


def soft(
    rows: int, length: int, device: torch.device, frozen: float = 0.4
) -> tuple[SoftRows, Tensor]:
    """Variables of soft rounding, a share of them frozen, and a gradient."""
    g = torch.Generator(device).manual_seed(rows + length)
    made = dict(device=device, generator=g)
    nu = torch.randn(rows, length, **made) * 2
    drawn = torch.rand(rows, length, **made)
    nu[drawn < frozen / 2], nu[drawn > 1 - frozen / 2] = -FROZEN, FROZEN
    code = torch.randint(0, 4, (rows, length), dtype=torch.uint8, **made)
    way = torch.randint(-1, 2, (rows, length), dtype=torch.int8, **made)
    zero = torch.randint(0, 4, (rows, 1), **made).float()
    scale = torch.rand(rows, 1, **made) + 0.1
    return SoftRows(nu, code, way, zero, scale), torch.randn(rows, length, **made)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest number."""
    return float((a.float() - b.float()).abs().max() / a.float().abs().max().clamp(min=1e-9))


def rounding_in_float32(b: Bench) -> dict[str, float]:
    return rounded(b, torch.float32)


def rounding_in_bfloat16(b: Bench) -> dict[str, float]:
    return rounded(b, torch.bfloat16)


def rounded(b: Bench, dtype: torch.dtype) -> dict[str, float]:
    """Weights, three steps of Adam and sums, with weights and gradients in a dtype."""
    out = {}
    for rows, length in ((1, 1), (37, 64), (1000, 128), (5, 4100), b.pick((9, 96), (4096, 14336))):
        start, gradient = soft(rows, length, b.device)
        made = []
        for version in ("reference", _rounding.version_on(b.device)):
            own = start._replace(nu=start.nu.clone())
            w = torch.full_like(own.nu, float("nan"), dtype=dtype)
            _rounding.weights(own, w, version)
            first, second = torch.zeros_like(own.nu), torch.zeros_like(own.nu)
            sums = own.nu
            for step in (1, 2, 3):
                args = (gradient.to(dtype), own, first, second, Adam(1e-2, step), version)
                sums = _rounding.descend(*args)
            made.append((w, own.nu, first, second, sums))
        out[f"{rows} x {length}"] = max(apart(p, q) for p, q in zip(*made, strict=True))
    return out


def hardened(b: Bench) -> dict[str, float]:
    """The share of variables that are frozen by one version and not by the other."""
    out = {}
    for rows, length in ((1, 9000), (3, 2048), (300, 7), b.pick((2, 500), (2, 1 << 26))):
        start = soft(rows, length, b.device)[0].nu
        made = [start.clone(), start.clone()]
        for share in (0.95, 0.6, 0.3, 0.1):
            for nu, version in zip(made, ("reference", None), strict=True):
                _rounding.harden(nu, share, version)
            different = (made[0] != made[1]).sum()
            out[f"{rows} x {length}, {share}"] = float(different) / start.numel()
            made[1].copy_(made[0])
    return out


def quantiles(b: Bench) -> dict[str, float]:
    far = (_rounding.rectified(soft(64, 1024, b.device, 0.8)[0].nu) - 0.5).abs()
    return {
        str(q): abs(float(hardening.quantile(far, q)) - float(hardening.quantile(far.cpu(), q)))
        for q in (0.0, 0.05, 0.15, 0.5, 1.0)
    }


def beyond_2_31(b: Bench) -> dict[str, float]:
    """Weights whose number does not fit 32 bits: how far they are from what they must be."""
    rows, length = b.pick((1 << 8, 128), ((1 << 24) + 16387, 128))
    if b.cuda and torch.cuda.mem_get_info()[0] < 40 * GIB:
        return {}
    nu = torch.full((rows, length), -FROZEN, device=b.device)
    code = torch.ones(rows, length, dtype=torch.uint8, device=b.device)
    row = torch.ones(rows, 1, device=b.device)
    nu[-1], code[-1] = FROZEN, 2
    made = torch.full_like(nu, float("nan"), dtype=torch.bfloat16)
    _rounding.weights(SoftRows(nu, code, code.view(torch.int8), row, row), made)
    others = float(made[:-1:4096].float().abs().max())
    return {"last row": abs(float(made[-1].float().mean()) - 3.0), "others": others}


def gptq(b: Bench) -> dict[str, float]:
    """The share of codes that differ from plain torch on the same device."""
    out, grid = {}, Affine(3, 32)
    for stored, given in ((torch.bfloat16, True), (torch.float16, False)):
        rows, width = b.pick(33, 1000), b.pick(96, 512)
        g = torch.Generator().manual_seed(0)
        x = torch.randn(2 * width, width, generator=g, dtype=torch.float64)
        hessian = x.T @ x
        hessian.diagonal().add_(0.05 * hessian.diagonal().mean())
        factor = inverse_factor(hessian)
        assert factor is not None
        w = torch.randn(rows, width, generator=g).to(b.device)
        found = []
        for compiled in (_columns._compiled, lambda *_: None):
            if given:
                kept = {"params": grid.stored(grid.fit(w), stored)}
            else:
                kept = {"fit": lambda w, _, s=stored: grid.stored(grid.fit(w), s)}
            order = torch.arange(width, device=b.device)
            coder = GridColumns(grid, order, stored, **kept)
            with put(_columns, "_compiled", compiled):
                found.append(code_columns(w, factor.float().to(b.device), coder, 128))
        out[str(stored)[6:]] = float((found[0] != found[1]).double().mean())
    return out


def clusters(b: Bench) -> dict[str, float]:
    """By how much the loss of K-means exceeds that of the CPU's."""
    out = {}
    for levels, n in ((4, 4096), (16, b.pick(1000, 14336)), (256, 5000)):
        lists = torch.randn(8, n, generator=torch.Generator().manual_seed(n))
        lists[0] = lists[0].round()
        here = kmeans.kmeans(lists, levels)[1].sum()
        there = kmeans.kmeans(lists.to(b.device), levels)[1].sum()
        out[f"{levels} levels"] = float(there.cpu() / here) - 1
    return out


def summed(b: Bench) -> dict[str, float]:
    """By index, against the CPU's in float64."""
    out = {}
    for count, n in ((4, 4096), (16, b.pick(500, 14336)), (256, 3000)):
        g = torch.Generator().manual_seed(count)
        index = torch.randint(0, count, (b.pick(3, 4096), n), generator=g)
        values = torch.randn(index.shape, generator=g)
        exact = sums_by(index, values.double(), count)
        found = sums_by(index.to(b.device), values.to(b.device), count).cpu()
        out[f"{count} sums"] = apart(exact, found)
    return out


def grams(b: Bench) -> dict[str, float]:
    """The largest difference to products and sums in float64, over the largest number."""
    out = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(b.pick(64, 8192), b.pick(32, 1024), device=b.device).to(dtype)
        out[str(dtype)[6:]] = apart(x.double().T @ x.double(), gram(x, torch.float32))
    return out


def products(b: Bench) -> dict[str, float]:
    """Of packed weights, the fastest version against the plain one."""
    out = {}
    for bits in (1, 2, 3, 4, 8):
        rows, n = b.pick((33, 40), (1000, 2000))
        g = torch.Generator().manual_seed(bits)
        codes = torch.randint(0, 2**bits, (rows, n), generator=g, dtype=torch.uint8)
        levels = torch.randn(n, 2**bits, generator=g).sort(1).values.half()
        held = (torch.arange(n, dtype=torch.int32), pack(codes, bits).T.contiguous(), levels)
        segment = Segment(bits, *(t.to(b.device) for t in held))
        packed = PackedColumns((rows, n), (segment,), None, torch.float16)
        for tokens in (1, 17, 64):
            x = torch.randn(tokens, n, generator=g).to(b.device, torch.float16)
            found = [kernels.linear(x, packed, version) for version in ("reference", None)]
            out[f"{bits} bits, {tokens} tokens"] = apart(*found)
    return out


# And the most that their numbers may be: sums of float32 in another order, roundings to 16 bits, a
# weight at a rank, a tie.
CHECKS: dict[Check, float] = {
    rounding_in_float32: 1e-4,
    rounding_in_bfloat16: 8e-3,
    hardened: 2e-3,
    quantiles: 1e-6,
    beyond_2_31: 0.0,
    gptq: 1e-2,
    clusters: 1e-3,
    summed: 1e-5,
    grams: 1e-5,
    products: 4e-3,
}
