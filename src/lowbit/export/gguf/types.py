"""Which block type holds a weight, and the weight in it: the same codes, on scales that the type
can say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import LowbitError
from ...formats.dense import Weight, packed
from ...formats.ggml import (
    BLOCKS,
    BlockType,
    open_affine,
    own_grid,
    pack_affine,
    pack_k,
    unpack_affine,
    unpack_k,
)
from ...grid import Affine, AffineParams, AnyGrid, KQuant, QTensor
from ..extra import extra_error, other_codes, steps_of

_CASTS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FLOATS = tuple(_CASTS)
# a type that is chosen unasked may take this many times the bytes of the one made for the grid:
# Q4_1 for Q4_K, no more
_LARGER = 1.2
REST = (*FLOATS, "q8_0", "q6_k")
_EXACT = ("Q2_0", "Q4_0", "Q8_0")
_GROUPS = (64, 128, 32)


@dataclass(frozen=True)
class Held:
    """A weight as a file will hold it.

    Attributes:
        rows: (out, bytes of a row) uint8. extra: see `extra_error`; 0 is exact.
    """

    rows: Tensor
    extra: float


def decoded(rows: Tensor, kind: BlockType) -> Tensor:
    """What rows of a file say: (out, bytes of a row) uint8 -> (out, in) float64."""
    name = kind.name.lower()
    if name in _CASTS:
        return rows.view(_CASTS[name]).double()
    if "_k" in name:
        q = unpack_k(rows, KQuant(name))  # type: ignore[arg-type]
        return q.grid.decode(q.codes, q.params.double())
    return open_affine(rows, kind, own_grid(kind)).coded().decode(torch.float64)


def types_of(grid: AnyGrid) -> tuple[BlockType, ...]:
    """The types that keep the codes of a grid, most fitting first; their rows and groups may still
    not fit.
    """
    if isinstance(grid, KQuant):
        return (BLOCKS[grid.kind.upper()],)
    if not isinstance(grid, Affine):
        return ()
    if grid.symmetric:
        exact = {2: ("Q2_0", "Q4_0"), 3: ("Q3_K",), 4: ("Q4_0",), 8: ("Q8_0",)}.get(grid.bits, ())
        also = [
            n
            for n, bits in (("Q3_K", 3), ("Q4_0", 4), ("Q6_K", 6), ("Q8_0", 8))
            if bits >= grid.bits
        ]
        return tuple(BLOCKS[n] for n in dict.fromkeys((*exact, *also)))
    names = {1: ("Q2_K",), 2: ("Q2_K",), 4: ("Q4_K", "Q4_1")}.get(grid.bits, ())
    return tuple(
        BLOCKS[n] for n in dict.fromkeys((*names, *(("Q4_K", "Q4_1") if grid.bits < 4 else ())))
    )


def chosen(grid: AnyGrid, columns: int, asked: str | None, name: str) -> BlockType:
    """The block type for a weight.

    Args:
        asked: a type's name, or None for the smallest that fits well: of a 3-bit asymmetric grid
            there is none, one has to be asked for.

    Raises:
        LowbitError: it has none, or not this one.
    """
    possible = types_of(grid)
    if not possible:
        raise LowbitError(f"'{name}' is on {grid}, which no type of GGUF holds.")
    if asked is not None:
        kind = BLOCKS[asked.upper()]
        fit = [k.name.lower() for k in possible if _misfit(grid, columns, k) is None]
        if kind not in possible:
            raise LowbitError(
                f"{kind.name} does not hold the codes of '{name}', which is on {grid}: it can be "
                f"{', '.join(fit) or 'in no type with rows this wide'}."
            )
        reason = _misfit(grid, columns, kind)
        if reason:
            others = f"of the types that hold its codes, {' and '.join(fit) or 'none'} would fit"
            raise LowbitError(f"'{name}' does not fit into {kind.name}: {reason}; {others}.")
        return kind
    if isinstance(grid, Affine) and not grid.symmetric and grid.bits == 3:
        raise LowbitError(
            f"'{name}' is on {grid}: no type of GGUF holds asymmetric 3-bit codes in 3 bits. "
            "Quantize with 'sym' or with scheme gguf:q3_k, or put "
            "them into 4.5 bits with --to gguf:q4_k, into 5 with gguf:q4_1."
        )
    reasons = [(k, _misfit(grid, columns, k)) for k in possible]
    fitting = [k for k, reason in reasons if reason is None]
    if (
        fitting
        and (bits := 8 * fitting[0].bytes / fitting[0].size)
        > _LARGER * 8 * possible[0].bytes / possible[0].size
    ):
        # Never the quiet step to a larger type: a 2-bit model in 5 bits is not what was asked for.
        named = f"--to gguf:{fitting[0].name.lower()} puts the same codes into {bits:g} bits"
        raise LowbitError(
            f"'{name}' on {grid} does not fit into {reasons[0][0].name}: {reasons[0][1]}. {named}."
        )
    if not fitting:
        raise LowbitError(
            f"'{name}' on {grid} fits into no type of GGUF: "
            f"{'; '.join(f'{k.name}: {reason}' for k, reason in reasons)}."
        )
    return fitting[0]


def fitting(grid: AnyGrid, shapes: Mapping[str, tuple[int, int]]) -> AnyGrid | None:
    """A uniform grid of no fewer bits that every linear could have, better symmetric if the given
    one is.

    Args:
        shapes: full linear name -> (out, in).
    """
    symmetric = isinstance(grid, Affine) and grid.symmetric
    tried = (
        Affine(bits, size, kind)
        for bits in range(max(2, grid.bits), 9)
        for kind in (symmetric, not symmetric)
        for size in _GROUPS
    )
    return next((g for g in tried if _fits_all(g, shapes)), None)


def _fits_all(grid: Affine, shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Whether every linear can be on this grid, and has a type then."""
    try:
        for name, (_, columns) in shapes.items():
            if columns % (grid.group_size or 1):
                return False
            chosen(grid, columns, None, name)
    except LowbitError:
        return False
    return True


def said(kind: BlockType, grid: AnyGrid) -> str:
    """A type, its bits, scales included, and what becomes of the numbers of a grid in it."""
    if not isinstance(grid, Affine) or kind.name in _EXACT:
        kept = "exact"
    elif kind.name == "Q4_1":
        kept = "codes kept, offsets rounded to float16"
    else:
        kept = "codes kept, scales fitted anew"
    return f"{kind.name} ({8 * kind.bytes / kind.size:g} bits, {kept})"


def _misfit(grid: AnyGrid, columns: int, kind: BlockType) -> str | None:
    """Why rows or groups do not fit, or None if they do."""
    if columns % kind.size:
        return f"its blocks hold {kind.size} inputs, which does not divide {columns}"
    if not isinstance(grid, Affine):
        return None
    unit = kind.size
    if "_K" in kind.name:
        unit = KQuant(kind.name.lower()).group_size  # type: ignore[arg-type]
    size = grid.group(columns)
    if size % unit == 0:
        return None
    return f"it has a scale for every {unit} inputs, which does not divide groups of {size}"


def held(q: Weight, kind: BlockType, name: str) -> Held:
    """A weight on a uniform grid in a block type, rows in the order in which they come.

    Raises:
        LowbitError: the type does not hold its scales. VerificationError: the rows do not say its
            codes.
    """
    if "_K" in kind.name:
        return _refitted(q, kind, name)
    own = packed(q)
    rows = pack_affine(own, kind, name)
    same = open_affine(rows, kind, own.grid)
    if not same.same_codes(own):
        raise other_codes(name)
    extra = extra_error(steps_of(own), steps_of(same), own.columns, lambda: own.codes)
    return Held(rows, extra)


def _refitted(q: Weight, kind: BlockType, name: str) -> Held:
    grid = KQuant(kind.name.lower())  # type: ignore[arg-type]
    repeat, tuned = q.grid.group(q.shape[1]) // grid.group_size, q.codes
    scale = q.params.scale.double().repeat_interleave(repeat, 1)
    shift = grid.middle - (1 << (q.grid.bits - 1)) if grid.symmetric else 0
    offset = torch.zeros_like(scale)
    if not grid.symmetric:
        offset = scale * q.params.zero_point.double().repeat_interleave(repeat, 1)
    codes = tuned + shift
    rows = pack_k(QTensor(grid, codes, grid.keeping(codes, scale, offset)))
    back = unpack_k(rows, grid)
    if not bool((torch.isfinite(back.params.unit) & torch.isfinite(back.params.unit_min)).all()):
        raise LowbitError(f"'{name}' has scales beyond float16.")
    if not torch.equal(back.codes, codes):
        raise other_codes(name)
    scale, offset = steps_of(back)
    own, now = steps_of(q), (scale, offset - scale * shift)
    extra = extra_error(own, now, q.shape[1], lambda: tuned)
    return Held(rows, extra)


def rounded(weight: Tensor, asked: str, name: str) -> tuple[BlockType, Held]:
    """An embedding or a head in a type of `REST`; ``extra`` is relative to its mean square here.

    Raises:
        LowbitError: float16 does not hold its numbers. ValueError: its rows do not fit.
    """
    kind = BLOCKS[asked.upper()]
    if weight.shape[-1] % kind.size:
        raise ValueError(
            f"'{name}' has rows of {weight.shape[-1]} numbers, which blocks of {kind.name} do not "
            "divide"
        )
    if asked in FLOATS:
        cast: Any = weight.to(_CASTS[asked]).contiguous()
        if not bool(torch.isfinite(cast).all()):
            raise LowbitError(
                f"'{name}' has numbers beyond float16: choose another type for --embeddings."
            )
        rows = cast.view(torch.uint8)
        if torch.promote_types(weight.dtype, cast.dtype) == cast.dtype:
            return kind, Held(rows, 0.0)
        value = cast.double()
    elif asked == "q8_0":
        grid = Affine(8, kind.size, symmetric=True)
        params = grid.stored(grid.fit(weight.float()), torch.float16)
        rows = pack_affine(
            QTensor(
                grid,
                grid.encode(weight.float(), params),
                AffineParams(params.scale, params.zero_point),
            ),
            kind,
            name,
        )
        value = unpack_affine(rows, kind, grid).decode(torch.float64)
    else:
        six = KQuant("q6_k")
        levels = six.stored(six.fit(weight.float()), torch.float16)
        if not levels.finite():
            raise LowbitError(f"'{name}' has scales beyond float16.")
        rows = pack_k(QTensor(six, six.encode(weight.float(), levels), levels))
        back = unpack_k(rows, six)
        value = six.decode(back.codes, back.params.double())
    square = weight.double().square().mean().clamp(min=1e-300)
    return kind, Held(rows, float((value - weight.double()).square().mean() / square))
