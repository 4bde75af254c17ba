"""The names of grids and of schemes: W2A16g64, W4A4, W4A8KV4g128sym, W2A16:column, gguf:q2_k.

A scheme is the name of a weight grid with the bits of activations (A), keys and values (KV) written
into it behind the bits of weights, or behind a "+" where the grid's name does not begin with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import LowbitError
from . import GRIDS
from .activation import PerToken
from .affine import Affine
from .base import AnyGrid
from .codebook import Codebook
from .codebook import Per as Per

_WEIGHTS = re.compile(r"(w\d+)(?:a(\d+))?(?:kv(\d+))?(.*)", re.IGNORECASE)
_OTHERS = re.compile(r"(.*?)(?:\+(?=[ak])(?:a(\d+))?(?:kv(\d+))?)?", re.IGNORECASE)


@dataclass(frozen=True)
class Scheme:
    """What a scheme's name says.

    Attributes:
        weights: grid of the weights.
        activation_bits: of linears' inputs, None for floating point.
        kv_bits: of keys and values, None for floating point.
    """

    weights: AnyGrid
    activation_bits: int | None = None
    kv_bits: int | None = None

    def __str__(self) -> str:
        name, kv = self.weights.name, f"KV{self.kv_bits}" if self.kv_bits else ""
        found = re.match(r"W\d+", name)
        if found:
            return f"{found[0]}A{self.activation_bits or 16}{kv}{name[found.end() :]}"
        activations = f"A{self.activation_bits}" if self.activation_bits else ""
        return f"{name}+{activations}{kv}" if activations or kv else name


def parse_grid(text: str) -> AnyGrid:
    """The grid of this name.

    Raises:
        ValueError: no kind of grid has it, or a number in it is out of range.
    """
    for kind in GRIDS:
        found = kind.parse(text)
        if found is not None:
            return found
    raise ValueError(f"no grid is called '{text}'")


def parse_scheme(text: str) -> Scheme:
    """A scheme from its usual name: W2A16g128, W4A16 (one scale per output channel), W3A16g64sym,
    W4A4, W4A8KV4; A16 may be left out.

    "W2A16:column" (row, tensor) is a codebook per column; "gguf:q2_k" (q3_k, q4_k, q6_k) is the
    grid of that K-quant of llama.cpp, activations in floating point.

    Raises:
        LowbitError: not a scheme, or bits out of range.
    """
    given = text.strip()
    found = _WEIGHTS.fullmatch(given)
    if found:
        bits, activation, kv, rest = found.groups()
        name = bits + rest
    else:
        found = _OTHERS.fullmatch(given)
        assert found is not None  # its first part takes anything
        name, activation, kv = found.groups()
    try:
        kinds = [kind.parse(name) for kind in GRIDS]
        for quantized in (activation, kv):
            if quantized is not None and int(quantized) != 16:
                PerToken(int(quantized))
    except ValueError as e:
        raise LowbitError(f"scheme '{text}': {e}.") from e
    grid = next((g for g in kinds if g is not None), None)
    if grid is None:
        raise LowbitError(
            f"unknown scheme '{text}': write W<bits>A<bits>[KV<bits>][g<group size>][sym], for "
            "example W2A16g64, W4A4 or W4A8KV4, or gguf:q2_k."
        )
    return Scheme(grid, *(int(b) if b and int(b) != 16 else None for b in (activation, kv)))


def weights_only(text: str) -> AnyGrid:
    """The grid of an override, which cannot change what activations are."""
    scheme = parse_scheme(text)
    if scheme.activation_bits or scheme.kv_bits:
        plain = str(replace(scheme, activation_bits=None, kv_bits=None))
        raise LowbitError(
            f"override scheme '{text}': overrides are about weights; write {plain} or leave A out."
        )
    return scheme.weights


# --- codebooks: a kind that a recipe may name once, for all of its schemes -----------------------


def without_kind(grid: AnyGrid) -> AnyGrid:
    """For a codebook, the uniform grid whose scheme says its bits and group size."""
    return Affine(grid.bits, grid.group_size) if isinstance(grid, Codebook) else grid


def scheme_name(grid: AnyGrid) -> str:
    """The scheme of a weight grid alone, see `without_kind`."""
    return str(Scheme(without_kind(grid)))


def shared_codebook(grids: Sequence[AnyGrid]) -> Per | None:
    """What shares a codebook on all of these grids; None if one is no codebook or they differ."""
    kinds = {g.per if isinstance(g, Codebook) else None for g in grids}
    return kinds.pop() if len(kinds) == 1 else None


def of_kind(wanted: AnyGrid, kind: AnyGrid) -> AnyGrid:
    """A scheme's grid for a recipe whose grid is of this kind: on codebooks, its bits and group
    size are those of a codebook.

    Raises:
        LowbitError: the scheme says what no codebook has.
    """
    return as_codebook(wanted, kind.per) if isinstance(kind, Codebook) else wanted


def as_codebook(grid: AnyGrid, per: Per) -> Codebook:
    """The codebook grid of a scheme's bits; its group size is the number of neighbouring columns
    that share a book.

    Raises:
        LowbitError: the scheme says what no codebook has.
    """
    if isinstance(grid, Codebook):
        return grid
    if not isinstance(grid, Affine):
        raise LowbitError(
            f"scheme '{grid}' is a grid of its own, and this recipe is for codebooks: choose "
            "another of the two."
        )
    if grid.symmetric:
        raise LowbitError(
            f"scheme '{Scheme(grid)}': a codebook has no symmetric form; leave 'sym' out."
        )
    try:
        return Codebook(grid.bits, per, grid.group_size)
    except ValueError as e:
        raise LowbitError(f"scheme '{Scheme(grid)}': {e}.") from e
