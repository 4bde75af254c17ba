"""Where the parameters of a skeleton lie in a checkpoint, and under which names results go out.

Everything is matched against what is stored: names as they are, names that transformers renames
and tensors that it converts for the model's type, the prefixes of wrappers, and experts in 3-D
tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowbitError
from .checkpoint import Checkpoint, Stored
from .conversion import Place, Renamed
from .lookup import Lookup, missing, split

__all__ = ["Names", "Place"]


@dataclass(frozen=True)
class Names:
    """A skeleton's names in a checkpoint.

    Attributes:
        places: parameter or persistent buffer of the skeleton -> where it lies; pieces follow each
            other along the first dimension. Nearly all have one.
        unread: stored tensors that nothing of the skeleton is read from.
        apart: parameter that is no tensor of its own, such as an expert's in a 3-D one -> the name
            it gets as one.
    """

    places: Mapping[str, tuple[Place, ...]]
    unread: tuple[str, ...]
    apart: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, config: Any, stored: Mapping[str, Stored], source: str) -> Names:
        """Find every parameter of a skeleton.

        Args:
            model: text model of transformers whose experts are ``Experts``; meta will do.
            config: of the checkpoint, of a wrapper as well. stored: what the checkpoint holds.
            source: its name, for errors.

        Raises:
            LowbitError: a parameter is nowhere, has another shape, or lies in pieces that cannot be
                read (named, with tensors whose names are similar).
        """
        held = {n: s.shape for n, s in stored.items()}
        views = [
            Lookup(model, Renamed.of(held, t), held, config) for t in _transforms(model, config)
        ]
        view = max(views, key=lambda v: v.found)
        tied = _tied(model, config)
        optional = {n for n, _ in model.named_buffers()}
        places: dict[str, tuple[Place, ...]] = {}
        for name, tensor in model.state_dict().items():
            found = view.place(name) or (view.place(tied[name]) if name in tied else None)
            if found is not None:
                _check(name, tuple(tensor.shape), found, held, source)
                places[name] = found
            elif name not in optional:
                raise LowbitError(missing(name, view, source))
        read = {p.tensor for ps in places.values() for p in ps}
        return cls(places, tuple(n for n in stored if n not in read), _outside(places))

    def module(self, linear: str) -> str:
        """The name under which the tensors of a quantized linear go out: as the checkpoint has it,
        or, where its experts lie in 3-D tensors, one name an expert.

        Raises:
            KeyError: the skeleton has no such linear.
        """
        return self.tensor(f"{linear}.weight").removesuffix(".weight")

    def tensor(self, name: str) -> str:
        """The name under which a parameter goes out: its tensor's, or its own.

        Raises:
            KeyError: the skeleton has no such parameter.
        """
        return self.apart[name] if name in self.apart else self.places[name][0].tensor

    def read(self, checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
        """Read parameters by the skeleton's names, in their stored dtypes; of a 3-D tensor only the
        part that is needed.

        Raises:
            LowbitError: see ``Checkpoint.read``.
        """
        names = list(names)
        whole = {p.tensor for n in names for p in self.places[n] if p.whole}
        read = checkpoint.read(sorted(whole))
        out = {}
        for name in names:
            pieces = [
                read[p.tensor] if p.whole else _part(checkpoint, p) for p in self.places[name]
            ]
            out[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return out


def _part(checkpoint: Checkpoint, place: Place) -> Tensor:
    """Read what lies at a place, contiguous."""
    start, stop, step = place.rows or (0, None, 1)
    span = slice(start, stop)
    at: tuple[int | slice, ...] = (slice(None), span) if place.transposed else (span,)
    if place.index is not None:
        at = (place.index, *at)
    part = checkpoint.read_part(place.tensor, at)
    return (part.mT if place.transposed else part)[::step].contiguous()


def _transforms(model: nn.Module, config: Any) -> Iterator[list[Any]]:
    """Ways in which transformers may rename the checkpoint: as that of the wrapper, as its model
    type says if its class cannot be built, as that of the text model, not at all.
    """
    import transformers
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        get_model_conversion_mapping,
    )

    skeleton: Any = model
    text = get_model_conversion_mapping(skeleton)
    if config.get_text_config() is not config:
        for name in getattr(config, "architectures", None) or ():
            kind = getattr(transformers, name, None)
            try:
                with torch.device("meta"):
                    wrapper = kind(config) if kind is not None else None
            except Exception:  # each class fails in ways of its own
                wrapper = None
            if wrapper is not None:
                yield get_model_conversion_mapping(wrapper)
        yield [*(get_checkpoint_conversion_mapping(config.model_type) or ()), *text]
    yield text
    yield []


def _tied(model: Any, config: Any) -> dict[str, str]:
    """Parameter -> the one that is read in its place if it is not stored. A wrapper may tie a head
    that its text model's own config leaves untied.
    """
    both = config, config.get_text_config()
    if not any(getattr(c, "tie_word_embeddings", False) for c in both):
        return {}
    named = dict(model._tied_weights_keys or {})
    return {**{other: one for one, other in named.items()}, **named}


def _outside(places: Mapping[str, tuple[Place, ...]]) -> dict[str, str]:
    """Parameter that is no tensor of its own -> its name beside those of its block."""
    heads: dict[str, Counter[str]] = {}
    for name, pieces in places.items():
        head, tail = split(name)
        if tail and _is_whole(pieces) and pieces[0].tensor.endswith(tail):
            theirs = pieces[0].tensor.removesuffix(tail)
            heads.setdefault(head, Counter())[theirs] += 1
    out = {}
    for name, pieces in places.items():
        if not _is_whole(pieces):
            head, tail = split(name)
            known = heads.get(head)
            out[name] = known.most_common(1)[0][0] + tail if known and tail else name
    return out


def _is_whole(pieces: tuple[Place, ...]) -> bool:
    return len(pieces) == 1 and pieces[0].whole


def _check(
    name: str,
    wanted: tuple[int, ...],
    pieces: tuple[Place, ...],
    held: Mapping[str, tuple[int, ...]],
    source: str,
) -> None:
    """Raise LowbitError if what lies at a place is not of the parameter's shape."""
    shapes = [p.shape(held[p.tensor]) for p in pieces]
    whole = (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else ()
    if whole != wanted or any(s[1:] != whole[1:] for s in shapes):
        tensors = ", ".join(dict.fromkeys(f"'{p.tensor}'" for p in pieces))
        alone = len(pieces) == 1 and pieces[0].whole
        as_held = "" if alone and pieces[0].tensor == name else f" as '{name}'"
        raise LowbitError(
            f"tensor {tensors} of '{source}' has shape {whole}{as_held}, config.json wants "
            f"{wanted}."
        )
