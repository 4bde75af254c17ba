"""The same model in another basis of the residual stream: x -> x Q with an orthogonal Q, norms
reduced to bare normalisation.

Readers become W g Q (g the norm's gain), writers Q^T W, embeddings E Q, the head W g Q. All
products are taken in float64. Models with LayerNorm stay models with LayerNorm: their writers and
embeddings lose their mean over channels, which no reader sees, and Q is chosen to map the vector of
ones to itself, so that what was centred stays centred.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Rotation
from .graph import Described, Graph, Site

_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Basis:
    """An orthogonal change of basis of the residual stream.

    Attributes:
        rotation: a Hadamard rotation H of the hidden size.
        signs: (hidden,) of +-1, float64.
        centred: LayerNorm: Q = H^T diag(signs) H, with the first sign +1, instead of Q =
            diag(signs) H.
    """

    rotation: Rotation
    signs: Tensor
    centred: bool

    @classmethod
    def random(cls, hidden: int, centred: bool, seed: int) -> Basis:
        """A Hadamard matrix with random signs.

        Raises:
            LowbitError: the hidden size has no Hadamard matrix.
        """
        rotation = Rotation.hadamard(hidden, "the hidden size")
        signs = (
            torch.randint(0, 2, (hidden,), generator=torch.Generator().manual_seed(seed)).double()
            * 2
            - 1
        )
        if centred:
            signs[0] = 1
            # The first row of every factor all +1: the vector of ones is then H's first row, the
            # one whose sign is fixed.
            rotation = Rotation(
                tuple(f if isinstance(f, int) else f * f[:1] for f in rotation.factors)
            )
        return cls(rotation, signs, centred)

    def rotate(self, x: Tensor) -> Tensor:
        """(..., hidden) -> x Q in float64."""
        x = x.double()
        signs = self.signs.to(x.device)
        return self.rotation((self.rotation.inverse(x) if self.centred else x) * signs)

    def written(self, x: Tensor) -> Tensor:
        """(..., hidden) -> x Q for what is added to the stream: without its mean if the norms
        remove that anyway.
        """
        return self.rotate(x.double() - x.double().mean(-1, keepdim=True) if self.centred else x)


def basis_of(described: Described, hidden: int, centred: bool, family: str, seed: int) -> Basis:
    """The basis for a family.

    Args:
        centred: the family's norms are LayerNorms.

    Raises:
        LowbitError: the family's residual stream cannot be rotated, or the hidden size has no
            Hadamard matrix.
    """
    frame = described.frame
    open_end = frame.open or (centred and not frame.final)
    if open_end or not all(graph.rotatable for graph in described.kinds):
        raise LowbitError(
            f"the residual stream of this '{family}' model cannot be rotated: it is normalised "
            "after each addition or projected at "
            "its ends. Use another recipe, or --set quarot.residual=false."
        )
    return Basis.random(hidden, centred, seed)


def rotate_block(
    weights: Mapping[str, Tensor],
    graph: Graph,
    basis: Basis,
    stored: torch.dtype,
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """A block's parameters, by their names inside the block, in the new basis and in their own
    dtypes.

    Args:
        stored: the artifact's dtype; what it keeps as it is (biases) is rounded to it, weights that
            will be coded are not.
        dtypes: parameter -> dtype in the checkpoint; one that is read beside a site's linears is
            rounded to it, or to ``stored`` if that is wider.
    """
    out = dict(weights)
    for site in graph.sites:
        if site.residual:
            out.update(_unit_norm(out, site))
            for key in (*(f"{name}.weight" for name in site.reads), *site.beside):
                out[key] = basis.rotate(out[key]).to(weights[key].dtype)
            for key in site.beside:
                kept = torch.promote_types(dtypes.get(key, stored), stored)
                out[key] = out[key].to(kept).to(weights[key].dtype)
    for name in graph.writers:
        key, bias = f"{name}.weight", f"{name}.bias"
        out[key] = basis.written(out[key].T).T.contiguous().to(weights[key].dtype)
        if bias in out:
            out[bias] = basis.written(out[bias]).to(weights[bias].dtype)
    changed = [k for k, v in out.items() if k.endswith(".bias") and v is not weights.get(k)]
    return {**out, **{k: out[k].to(stored).to(out[k].dtype) for k in changed}}


def _unit_norm(weights: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
    """Move a norm's gain and bias into what reads it; float64 where the weights are to be rotated
    next.
    """
    assert site.source is not None
    offset = site.source.offset
    key, bias = f"{site.source.module}.weight", f"{site.source.module}.bias"
    gain = weights[key].double() + offset
    out = {key: torch.full_like(weights[key], 1 - offset)}
    for reader in (*(f"{name}.weight" for name in site.reads), *site.beside):
        weight = weights[reader].double()
        out[reader] = weight * gain
        if bias in weights:
            name = reader.removesuffix(".weight")
            own = f"{name}.bias"
            if own not in weights:
                raise LowbitError(
                    f"'{name}' has no bias that could take over the one of '{site.source.module}': "
                    "the norm cannot be fused."
                )
            out[own] = (weights[own].double() + weight @ weights[bias].double()).to(
                weights[own].dtype
            )
    if bias in weights:
        out[bias] = torch.zeros_like(weights[bias])
    return out


def rotate_outer(
    tensors: Mapping[str, Tensor],
    embeddings: tuple[str, ...],
    norm: str | None,
    head: str,
    offset: float,
    basis: Basis,
) -> dict[str, Tensor]:
    """The tensors outside the blocks in the new basis, in their own dtypes; the head gets a tensor
    of its own.

    Args:
        tensors: by full name, the head under ``head`` even where the checkpoint ties it to the
            embedding.
        embeddings: names of the embedding tensors. norm: the final norm's prefix, None if there is
            none.

    Raises:
        LowbitError: a final norm whose bias cannot be carried over.
    """
    out = dict(tensors)
    for key in embeddings:
        out[key] = _by_rows(basis.written, tensors[key])
    gain = torch.ones((), dtype=torch.float64)
    if norm is not None:
        gain = tensors[f"{norm}.weight"].double() + offset
        out[f"{norm}.weight"] = torch.full_like(tensors[f"{norm}.weight"], 1 - offset)
        bias = f"{norm}.bias"
        if bias in tensors:
            # The head has no bias to take it: it stays the norm's, expressed before the gain.
            if bool((gain == 0).any()):
                raise LowbitError(
                    f"'{norm}.weight' has a gain of zero, so its bias cannot be carried into the "
                    "rotated basis."
                )
            out[bias] = basis.rotate(tensors[bias].double() / gain).to(tensors[bias].dtype)
    out[head] = _by_rows(lambda rows: basis.rotate(rows.double() * gain), tensors[head])
    return out


def _by_rows(change: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply a function of rows some rows at a time: in float64 a whole vocabulary would be
    large.
    """
    return torch.cat([change(rows).to(tensor.dtype) for rows in torch.split(tensor, _ROWS)])
