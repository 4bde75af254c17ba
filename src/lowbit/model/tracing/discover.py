"""From a config to the graphs of its blocks."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...errors import LowbitError
from ..beside import Keys
from ..experts import replace_fused
from ..graph import Described, Frame, Graph
from ..skeleton import build_skeleton
from .assemble import graph_of
from .blocks import (
    check_ends,
    check_one_list,
    check_own_weights,
    limits,
    list_of_blocks,
    signature,
)
from .kind import Kind
from .norms import SAME, is_centred, offset_of
from .tiny import Tiny, build_tiny
from .where import named

_COUNT = re.compile(r"heads|experts|groups|n_group|num_inputs")


@dataclass(frozen=True)
class _Asked:
    """A config, known by what it says."""

    said: str
    config: Any = field(compare=False)


def described(config: Any) -> Described:
    """The graphs of all blocks of a transformers config, and what lies around them.

    Raises:
        LowbitError: no list of blocks, a narrow copy that cannot be built or does not run, blocks
            that cannot be run one by one.
    """
    said = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return _described(_Asked(said, config))


@functools.lru_cache(maxsize=32)
def _described(asked: _Asked) -> Described:
    config = asked.config
    name = getattr(config, "name_or_path", "") or config.model_type
    model = build_skeleton(config, name)
    layers = list_of_blocks(model, name)
    blocks = list(model.get_submodule(layers).children())
    if not blocks:
        raise LowbitError(f"'{name}' is a '{config.model_type}' model without a single block.")
    check_one_list(model, layers, name)
    check_own_weights(blocks, name)
    signatures = [*zip(map(signature, blocks), limits(blocks), strict=True)]
    distinct = list(dict.fromkeys(signatures))
    of_layers = tuple(distinct.index(s) for s in signatures)
    tiny = build_tiny(config, name, layers, of_layers)
    hidden = tiny.called[0].x.shape[-1]
    centred = any(is_centred(m, hidden) for i in tiny.firsts for m in tiny.blocks[i].modules())
    counts = frozenset({1, *_counts(config.to_dict())})
    kinds: list[Graph] = []
    for number, (first, called) in enumerate(zip(tiny.firsts, tiny.called, strict=True)):
        replace_fused(blocks[first])
        inside = {f"{layers}.{first}": tiny.blocks[first], **tiny.inside(first)}
        with torch.no_grad(), named(inside, tiny.described(name), f"{layers}.{first}"):
            kind = Kind(
                tiny.blocks[first],
                called,
                blocks[first],
                tiny.by,
                counts,
                config.hidden_size,
                _left(tiny, number),
                _borrowed(tiny, first),
            )
            if not kind.causal:
                raise LowbitError(
                    f"'{name}' is a '{config.model_type}' model whose blocks look at tokens to "
                    "come: it is no decoder that continues a text."
                )
            kinds.append(graph_of(kind, centred))
    check_ends(model, tiny.trunk, name)
    alike = list(dict.fromkeys(kinds))
    places = tuple(alike.index(kinds[k]) for k in of_layers)
    return Described(_frame(tiny, centred), tuple(alike), places, tiny.items)


def _left(tiny: Tiny, kind: int) -> frozenset[Keys]:
    """Where blocks of a kind leave something that later blocks read."""
    made = ((item.maker, item.path) for item in tiny.items)
    return frozenset(p for i, p in made if i is not None and tiny.of_layers[i] == kind)


def _borrowed(tiny: Tiny, block: int) -> frozenset[Keys]:
    """Where a block is given floats that an earlier block left."""
    made = (t for t in tiny.items if t.maker is not None and t.size is None)
    return frozenset(p for item in made for i, p in item.readers if i == block)


def _counts(said: Mapping[str, Any]) -> Iterator[int]:
    for name, value in said.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif isinstance(value, int) and not isinstance(value, bool) and _COUNT.search(str(name)):
            yield value


def _frame(tiny: Tiny, centred: bool) -> Frame:
    parts = dict(tiny.model.named_modules())
    head = tiny.model.get_output_embeddings()
    own = f"{tiny.trunk}."
    embeddings = [n for n in tiny.before if isinstance(parts[n], nn.Embedding)]
    after = [n for n in tiny.after if parts[n] is not head]
    norms = {n: offset for n in after if (offset := offset_of(parts[n])) is not None}
    plain = (
        all(item.maker is not None for item in tiny.items)
        and len(after) == len(norms) <= 1
        and len(embeddings) == len(tiny.before)
        and all(n.startswith(own) for n in (*embeddings, *after))
        and not (centred and not norms)
    )
    return Frame(
        tiny.trunk,
        tiny.layers,
        final=tuple(n.removeprefix(own) for n in after),
        final_offset=next(iter(norms.values()), 0.0),
        embeddings=tuple(n.removeprefix(own) for n in embeddings),
        open=not plain,
        centred=centred,
        plain=_plain(tiny, [parts[n] for n in after], head),
        returns=tiny.returns,
        streams=math.prod(tiny.left.shape[2:-1]),
        turned=tiny.turned,
    )


def _plain(tiny: Tiny, after: list[nn.Module], head: nn.Module) -> bool:
    """Whether nothing but these modules and the head makes the logits."""
    x = tiny.left
    try:
        with torch.no_grad():
            for module in (*after, head):
                x = module(x)
    except Exception:  # a module that takes something else, each in its own way
        return False
    # Some classes give logits in float32.
    alike = x.shape == tiny.logits.shape
    return alike and torch.allclose(x.float(), tiny.logits.float(), rtol=SAME, atol=SAME)
