"""transformers' own renaming and conversion of checkpoints, followed without the data.

Every stored tensor is given to transformers' conversion as the numbers of its own elements: what
comes out says where each element of a parameter lies.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError

_SMALL = 2**22  # elements that are numbered as they are
_LARGE = 2**26  # elements that are not numbered


@dataclass(frozen=True)
class Place:
    """Where a parameter, or some of its rows, lies.

    Attributes:
        tensor: stored name.
        index: the parameter is this one along the first dimension of the tensor; None if it has
            no such dimension.
        rows: start, stop, step of output channels; None for all.
        transposed: the tensor is (..., in, out).
    """

    tensor: str
    index: int | None = None
    rows: tuple[int, int, int] | None = None
    transposed: bool = False

    @property
    def whole(self) -> bool:
        """The parameter is the tensor as it is."""
        return self.index is None and self.rows is None and not self.transposed

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Of what lies there, from the shape of the tensor."""
        left = stored if self.index is None else stored[1:]
        left = left[::-1] if self.transposed else left
        return left if self.rows is None else (len(range(*self.rows)), *left[1:])


@dataclass
class Group:
    """Stored tensors that one conversion makes parameters of.

    Attributes:
        converter: of transformers. first: the name it is called with. sources: pattern of the
            converter -> stored names, in order.
    """

    converter: Any
    first: str
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def targets(self) -> list[str]:
        """Names of parameters that may come out."""
        patterns = self.converter.target_patterns
        return [self.first.replace(patterns[0], p, 1) for p in patterns]

    def lacking(self, count: int) -> set[int]:
        """Numbers of the experts that some sources of a fused parameter do not hold."""
        wanted = [p for p in self.converter.source_patterns if "*" in p]
        there = [
            {int(re.findall(r"(?<=\.)\d+(?=\.)", n)[-1]) for n in self.sources.get(p, ())}
            for p in wanted
        ]
        return set[int]().union(*(set(range(count)) - t for t in there))

    def numbered(
        self, shapes: Mapping[str, tuple[int, ...]], shape_of: Callable[[str], tuple[int, ...]],
        config: Any,
    ) -> Numbered:  # fmt: skip
        """Follow the elements of the tensors.

        Args:
            shapes: stored name -> shape. shape_of: a parameter's shape in the model.

        Raises:
            LowbitError: transformers' conversion fails, or sizes are too odd to follow.
        """
        names = [n for part in self.sources.values() for n in part]
        grain = _grain([shapes[n] for n in names])
        small = [_divided(shapes[n], grain) for n in names]
        starts = torch.tensor([0, *(math.prod(s) for s in small)]).cumsum(0)
        ids = {
            n: torch.arange(int(starts[i]), int(starts[i + 1])).reshape(s)
            for i, (n, s) in enumerate(zip(names, small, strict=True))
        }
        converter = copy.deepcopy(self.converter)
        for pattern, part in self.sources.items():
            converter.collected_tensors[pattern] = [ids[n] for n in part]

        def get_parameter(name: str) -> Any:
            return SimpleNamespace(shape=torch.Size(_divided(shape_of(name), grain)))

        model = SimpleNamespace(get_parameter=get_parameter)
        try:
            made = converter.convert(self.first, model=model, config=config)
        except Exception as e:  # each operation fails in ways of its own
            raise LowbitError(
                f"'{self.first}' cannot be made of {_some(names)}: {type(e).__name__} {e}"
            ) from e
        out = {n: t[0] if isinstance(t, list) else t for n, t in made.items()}
        return Numbered(names, small, starts, grain, out)


@dataclass(frozen=True)
class Numbered:
    """Parameters whose elements are the numbers of the elements that they are made of.

    Attributes:
        names: of the stored tensors. shapes: theirs, divided by ``grain``. starts: the number of
            the first element of each. grain: what channels were divided by. made: the parameters.
    """

    names: list[str]
    shapes: list[tuple[int, ...]]
    starts: Tensor
    grain: int
    made: Mapping[str, Tensor]

    def places(self, ids: Tensor) -> tuple[Place, ...]:
        """Where elements lie; pieces follow each other along the first dimension.

        Raises:
            LowbitError: they do not lie in rows.
        """
        first = ids.reshape(ids.shape[0], -1)[:, 0].contiguous()
        owner = torch.searchsorted(self.starts, first, right=True) - 1
        sources, counts = torch.unique_consecutive(owner, return_counts=True)
        out = []
        for source, piece in zip(sources.tolist(), torch.split(ids, counts.tolist()), strict=True):
            place = self._place(source, piece - self.starts[source])
            if place is None:
                raise LowbitError(
                    f"'{self.names[source]}' has its channels in an order that is not read: save "
                    "the model with transformers' save_pretrained after loading it."
                )
            out.append(place)
        return tuple(out)

    def _place(self, source: int, ids: Tensor) -> Place | None:
        """Where elements of one tensor lie, by their numbers in it."""
        name, shape = self.names[source], self.shapes[source]
        index = None
        if len(shape) == ids.ndim + 1:
            each = math.prod(shape[1:])
            index, shape = int(ids.flatten()[0]) // each, shape[1:]
            ids = ids - index * each
        whole = torch.arange(math.prod(shape)).reshape(shape)
        for transposed in (False, True) if ids.ndim == 2 else (False,):
            table = whole.mT if transposed else whole
            if table.ndim != ids.ndim:
                return None
            if torch.equal(table, ids):
                return Place(name, index, None, transposed)
            rows = _rows(table, ids)
            if rows is not None:
                grain = self.grain if ids.ndim <= 2 else 1
                return Place(name, index, _scaled(*rows, ids.shape[0], grain), transposed)
        return None


def _scaled(start: int, step: int, count: int, grain: int) -> tuple[int, int, int]:
    """Start, stop and step of undivided rows."""
    start = start // step * step * grain + start % step
    return start, start + (count * grain - 1) * step + 1, step


def _rows(table: Tensor, ids: Tensor) -> tuple[int, int] | None:
    """Start and step for which ``table[start::step]`` begins with ``ids``."""
    heads = table.reshape(table.shape[0], -1)[:, 0].tolist()
    mine = ids.reshape(ids.shape[0], -1)[:2, 0].tolist()
    if any(m not in heads for m in mine):
        return None
    start = heads.index(mine[0])
    step = heads.index(mine[1]) - start if len(mine) == 2 else 1
    if step < 1:
        return None
    return (start, step) if torch.equal(table[start::step][: ids.shape[0]], ids) else None


def _channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes that count channels: the first of three counts experts."""
    return shape[1:] if len(shape) > 2 else shape


def _divided(shape: tuple[int, ...], grain: int) -> tuple[int, ...]:
    kept = len(shape) - len(_channels(shape))
    return (*shape[:kept], *(n // grain for n in shape[kept:]))


def _grain(shapes: Iterable[tuple[int, ...]]) -> int:
    """What channels are divided by so that their elements are few, 1 if they are.

    Raises:
        LowbitError: their sizes have no common divisor.
    """
    shapes = list(shapes)
    total = sum(map(math.prod, shapes))
    if total <= _SMALL:
        return 1
    sizes = [n for s in shapes for n in _channels(s)]
    # Halves of what is fused are told apart as well.
    grain = math.gcd(*sizes, *(n // 2 for s in shapes if len(s) > 2 for n in s[1:] if n % 2 == 0))
    while grain > 1 and min(sizes) // grain < 4:
        grain //= next(p for p in range(2, grain + 1) if grain % p == 0)
    if total // grain**2 > _LARGE:
        raise LowbitError(f"tensors of sizes {sorted(set(sizes))} are too odd to be followed.")
    return grain


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{n}'" for n in names[:3]) + more


@dataclass(frozen=True)
class Renamed:
    """A checkpoint's names after transformers' renaming.

    Attributes:
        plain: parameter -> stored name. groups: parameter -> the conversion that may make it.
    """

    plain: Mapping[str, str]
    groups: Mapping[str, Group]

    @classmethod
    def of(cls, stored: Iterable[str], transforms: list[Any]) -> Renamed:
        """Rename stored names by transformers' transforms, of which none is no renaming."""
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        plain: dict[str, str] = {}
        made: dict[str, Group] = {}
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters)
            if pattern is None:
                plain.setdefault(target, name)
            else:
                group = made.setdefault(target, Group(by_pattern[pattern], target))
                group.sources.setdefault(pattern, []).append(name)
        return cls(plain, {t: g for g in made.values() for t in g.targets})
