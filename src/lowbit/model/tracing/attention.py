"""Softmax attention inside a block: which module stores keys and values, how wide a head is, which
linears make queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..beside import at as at_path
from ..beside import placed
from ..graph import Heads, Source
from ..recorder import Called
from .kind import FAR, Kind
from .replay import Replay
from .sources import made_by

_SAME, _MOVED = 1e-9, 1e-13
_CACHES = ("past_key_values", "layer_past", "past_key_value")


@dataclass(frozen=True)
class Attention:
    """What is found.

    Attributes:
        module: that stores keys and values; None where another block's are used. output: the linear
            that reads all heads.
        heads: how values go through it; None where no linear makes them, or not untouched.
        unclipped: linear -> its first rows that make queries and keys.
        roles: linear -> "query", "key", "value", "output" or "gate".
    """

    module: str | None
    output: str
    heads: Heads | None
    unclipped: tuple[tuple[str, int], ...]
    roles: dict[str, str]


class _Cache:
    """Takes keys and values, and tells which module brought them."""

    def __init__(self, stack: list[str]) -> None:
        self._stack, self.module, self.width = stack, "", 0

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.module, self.width = self._stack[-1], values.shape[-1]
        return keys, values

    def __copy__(self) -> _Cache:
        return self  # arguments of a replay are copied

    def get_seq_length(self, *_: Any) -> int:
        return 0


def attention_of(kind: Kind, norms: dict[str, str]) -> Attention | None:
    """The attention of a block; None without one.

    Args:
        norms: linear -> norm that alone makes what it reads.
    """
    cache = _storing(kind)
    if cache is None:
        return _borrowing(kind)
    module, width = cache.module, cache.width
    inside = [n for n in kind.linears if n.startswith(f"{module}.")]
    if not inside:
        return None
    output = inside[-1]
    norm = norms.get(output)
    at = output if norm is None else norm
    reach = {n: _reach(kind, n, at) for n in inside[:-1]}
    made = made_by(kind, at, (output,))
    heads, values = None, None
    if made is not None:
        linear, rows = made
        distinct = torch.tensor(sorted(set(rows.tolist())))
        start, count = int(distinct[0]), len(distinct)
        whole = _outputs(kind, linear)
        if torch.equal(distinct, torch.arange(start, start + count)):
            values = Source(linear, "linear", None if count == whole else (start, start + count))
            if _turns_alike(kind, linear, (start, start + count), at, width):
                heads = Heads(values, output, len(rows) // width, width, norm)
    roles = {n: _role(kind, n, r, at) for n, r in reach.items()}
    if values is not None and values.rows is None:
        roles[values.module] = "value"
    unclipped = []
    for name in inside[:-1]:
        if name == (values and values.module):
            first = 0 if values is None or values.rows is None else values.rows[0]
            if first:
                unclipped.append((name, first))
        elif roles[name] in ("query", "key"):
            unclipped.append((name, _outputs(kind, name)))
    return Attention(module, output, heads, tuple(unclipped), {**roles, output: "output"})


def _borrowing(kind: Kind) -> Attention | None:
    """The attention of a block that is given the keys and values of an earlier one; None without
    one.
    """
    if not kind.borrowed:
        return None
    other = {path: at_path(kind.called.kwargs, path) * 1.5 for path in kind.borrowed}
    called = Called(kind.called.x, placed(kind.called.kwargs, other))
    now, base = Replay(kind.block, called).inputs, kind.base.inputs
    output = next((n for n in kind.linears if not torch.equal(now[n], base[n])), None)
    if output is None:
        return None
    part = output.rpartition(".")[0]
    before = kind.linears[: kind.linears.index(output)]
    inside = [n for n in before if n.startswith(f"{part}.")]
    roles = {n: _role(kind, n, _reach(kind, n, output), output) for n in inside}
    queries = tuple((n, _outputs(kind, n)) for n in inside if roles[n] == "query")
    if not queries:
        return None
    return Attention(None, output, None, queries, {**roles, output: "output"})


def _storing(kind: Kind) -> _Cache | None:
    """A cache that keys and values were brought to."""
    names = [n for n in _CACHES if n in kind.called.kwargs]
    if not names:
        return None
    stack: list[str] = []
    cache, handles = _Cache(stack), []
    for name, module in kind.modules.items():
        handles.append(module.register_forward_pre_hook(lambda *_, n=name: stack.append(n)))
        handles.append(module.register_forward_hook(lambda *_: (stack.pop(), None)[1]))
    try:
        Replay(kind.block, Called(kind.called.x, {**kind.called.kwargs, names[0]: cache}))
    except Exception:  # a mixer asks more of its cache: it stores no keys and values
        return None
    finally:
        for handle in handles:
            handle.remove()
    return cache if cache.module else None


def _reach(kind: Kind, linear: str, reader: str) -> int:
    """How many channels of what is read depend on the first output of a linear; 0 where other
    linears of the block come between.
    """
    first = torch.ones(_outputs(kind, linear), dtype=torch.float64)
    first[0] = 1.5
    now, base = kind.replay({linear: lambda y: y * first}).inputs, kind.base.inputs
    order = list(base)
    between = order[order.index(linear) + 1 : order.index(reader)]
    if any(n in kind.linears and not torch.equal(now[n], base[n]) for n in between):
        return 0
    moved = ((now[reader] - base[reader]).abs() > _MOVED).flatten(0, -2).any(0)
    return int(moved.sum())


def _role(kind: Kind, linear: str, reach: int, reader: str) -> str:
    """Queries matter at their own token, keys at the tokens after theirs, too."""
    if reach <= 1:
        return "gate" if reach else "latent"

    def at_first(y: Tensor) -> Tensor:
        out = y.clone()
        out[:, :1] *= 1.5
        return out

    now = kind.replay({linear: at_first}).inputs[reader]
    rows = kind.called.x.shape[0]
    moved = (now - kind.base.inputs[reader]).reshape(rows, kind.called.x.shape[1], -1)
    later = moved[:, 1:].abs().max()
    return "key" if float(later) > _MOVED else "query"


def _outputs(kind: Kind, linear: str) -> int:
    module = kind.modules[linear]
    assert isinstance(module, nn.Linear)
    return module.out_features


def _turns_alike(kind: Kind, linear: str, rows: tuple[int, int], reader: str, width: int) -> bool:
    """Whether each head of values may be multiplied by any matrix, and what is read follows."""
    start, stop = rows
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]

    def turned(y: Tensor) -> Tensor:
        out = y.clone()
        part = out[..., start:stop]
        out[..., start:stop] = _by_heads(part, turn)
        return out

    if (stop - start) % width:
        return False
    # Also where values are large: a block may cut them there.
    for far in (1.0, FAR):

        def large(y: Tensor, far: float = far) -> Tensor:
            out = y.clone()
            out[..., start:stop] *= far
            return out

        def both(y: Tensor, far: float = far) -> Tensor:
            return turned(large(y, far))

        before = kind.replay({linear: large}) if far > 1 else kind.base
        after = kind.replay({linear: both})
        if any(not torch.equal(t, before.left[path]) for path, t in after.left.items()):
            return False  # other blocks read the values
        wanted = _by_heads(before.inputs[reader], turn)
        if not torch.allclose(after.inputs[reader], wanted, rtol=_SAME, atol=_SAME * far):
            return False
    return True


def _by_heads(x: Tensor, turn: Tensor) -> Tensor:
    return (x.reshape(*x.shape[:-1], -1, len(turn)) @ turn).flatten(-2)
