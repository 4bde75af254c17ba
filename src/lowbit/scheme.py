"""The names of bit widths: W2A16g64, W4A4, W4A8KV4g128sym, gguf:q2_k."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import LowbitError
from .grid import Affine, Codebook, Grid, KQuant, PerToken
from .grid.codebook import Per

_SCHEME = re.compile(r"w(\d+)(?:a(\d+))?(?:kv(\d+))?(?:g(\d+))?(sym|asym)?", re.IGNORECASE)
_GGUF = "gguf:"


@dataclass(frozen=True)
class Scheme:
    """What a scheme's name says.

    Attributes:
        weights: grid of the weights.
        activation_bits: of linears' inputs, None for floating point.
        kv_bits: of keys and values, None for floating point.
    """

    weights: Affine | KQuant
    activation_bits: int | None = None
    kv_bits: int | None = None

    def __str__(self) -> str:
        w = self.weights
        if isinstance(w, KQuant):
            return str(w)
        kv = f"KV{self.kv_bits}" if self.kv_bits else ""
        return (
            f"W{w.bits}A{self.activation_bits or 16}{kv}"
            + (f"g{w.group_size}" if w.group_size else "")
            + ("sym" if w.symmetric else "")
        )


def parse_scheme(text: str) -> Scheme:
    """A scheme from its usual name: W2A16g128, W4A16 (one scale per output channel), W3A16g64sym,
    W4A4, W4A8KV4; A16 may be left out.

    "gguf:q2_k" (q3_k, q4_k, q6_k) is the grid of that K-quant of llama.cpp, activations in floating
    point.

    Raises:
        LowbitError: not a scheme, or bits out of range.
    """
    if text.strip().lower().startswith(_GGUF):
        try:
            return Scheme(KQuant(text.strip().lower()[len(_GGUF) :]))  # type: ignore[arg-type]
        except ValueError as e:
            raise LowbitError(f"unknown scheme '{text}': {e}.") from e
    found = _SCHEME.fullmatch(text.strip())
    if not found:
        raise LowbitError(
            f"unknown scheme '{text}': write W<bits>A<bits>[KV<bits>][g<group size>][sym], for "
            "example W2A16g64, W4A4 or W4A8KV4, or gguf:q2_k."
        )
    bits, activation, kv, group, kind = found.groups()
    try:
        grid = Affine(int(bits), int(group) if group else None, (kind or "").lower() == "sym")
        for given in (activation, kv):
            if given is not None and int(given) != 16:
                PerToken(int(given))
    except ValueError as e:
        raise LowbitError(f"scheme '{text}': {e}.") from e
    return Scheme(grid, *(int(b) if b and int(b) != 16 else None for b in (activation, kv)))


def weights_only(text: str) -> Affine | KQuant:
    """The grid of an override, which cannot change what activations are."""
    scheme = parse_scheme(text)
    if scheme.activation_bits or scheme.kv_bits:
        raise LowbitError(
            f"override scheme '{text}': overrides are about weights; write "
            f"W{scheme.weights.bits}A16 or leave A out."
        )
    return scheme.weights


def scheme_name(grid: Grid) -> str:
    """The scheme of a weight grid alone; for a codebook, the scheme that says its bits and group
    size.
    """
    if isinstance(grid, Codebook):
        grid = Affine(grid.bits, grid.group_size)
    assert isinstance(grid, (Affine, KQuant))
    return str(Scheme(grid))


def as_codebook(grid: Affine | KQuant, per: Per) -> Codebook:
    """The codebook grid of a scheme's bits; its group size is the number of neighbouring columns
    that share a book.

    Raises:
        LowbitError: the scheme says what no codebook has.
    """
    if isinstance(grid, KQuant):
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
