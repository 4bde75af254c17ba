"""Block: one decoder layer as a value. A method takes one and returns another; nothing is mutated,
patched or restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from ..errors import LowbitError
from ..grid import Affine, Grid, KVGrid, QTensor, QuantizedStates, Reading
from ..grid.kmeans import NotFiniteError
from .parts import Parts
from .ranks import ALONE, Ranks
from .storage import Storage
from .wiring import Wiring

TOKENS_PER_PASS = 8192


class _Seen(Exception):
    """Everything that was asked for has been seen: the rest of the pass need not run."""


def first(output: Any) -> Tensor:
    """A layer's hidden states: some transformers versions return a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


Announce = Callable[[str], None]


def silent(what: str) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Call:
    """What a submodule was called with, for one batch of rows."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Block:
    """One decoder layer: module (forward only, no data), weights, grids, inputs, decisions.

    A linear's weight goes free (in ``weights`` only) -> ranged (also in ``params``) -> coded (also
    in ``coded``). Changing a coded weight raises.

    Attributes:
        name: prefix in the checkpoint, e.g. "model.layers.3".
        module: the transformers layer on the meta device.
        kwargs: what the layer is called with besides its input.
        weights: every parameter by its name inside the block, in float32 (float64 if that is the
            compute dtype): methods reason in it whatever the forward pass runs in.
        compute: dtype of the forward pass.
        stored: the dtype of most of the checkpoint's linears, in which scales and activation
            streams are kept.
        dtypes: parameter -> dtype in the checkpoint, where it is not ``stored``.
        grids: linear -> grid.
        x, xq: (rows, length, hidden) inputs as the float model and as the quantized model see them;
            this rank's rows of them.
        target: the float block's output on ``x``, before anything was changed.
        tuned_rows: how many leading rows of all ranks methods may learn from; later rows only pass
            through (held-out evaluation).
        seed: for everything random in this block.
        readout: the last block's output -> logits, None for every other block.
        announce: told what a method is about to do, for whoever watches.
        storage: where streams made by `run` live; None puts them beside their input.
        ranks: the processes that share the rows.
        readings: linear -> what happens to its input (activation grid, online rotation); nothing
            where it is missing.
        kv: grid of keys and values, None for floating point.
        params: linear -> fixed grid parameters.
        coded: linear -> codes.
        whole: linear -> its weight before a clip cut it, in the stored dtype; for judging only.
        notes: decisions and losses, for the report.
    """

    name: str
    module: nn.Module
    wiring: Wiring
    kwargs: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    compute: torch.dtype
    stored: torch.dtype
    grids: Mapping[str, Grid]
    x: Tensor
    xq: Tensor
    target: Tensor
    tuned_rows: int
    seed: int
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    readout: Callable[[Tensor], Tensor] | None = None
    announce: Announce = silent
    storage: Storage | None = None
    ranks: Ranks = ALONE
    readings: Mapping[str, Reading] = field(default_factory=dict)
    kv: KVGrid | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    coded: Mapping[str, QTensor] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    # --- running ----------------------------------------------------------------------------------

    def forward(self, x: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The layer's output for (n, length, hidden) inputs, in the compute dtype, with these
        weights or the block's own.
        """
        own = self.weights if weights is None else weights
        cast = {name: w.to(self.compute) for name, w in own.items()}
        kwargs = dict(self.kwargs)
        if self.kv is not None:
            kwargs["past_key_values"] = QuantizedStates(self.kv)
        with self.reading(self.readings):
            return first(functional_call(self.module, cast, (x,), kwargs))

    @contextmanager
    def reading(self, readings: Mapping[str, Reading]) -> Iterator[None]:
        """Within, linears that run get their inputs through these readings."""
        handles = []
        last: list[
            tuple[Tensor, Reading, Tensor]
        ] = []  # linears of a site read the same tensor: prepare it once

        def hook_of(reading: Reading) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                if not (last and last[0][0] is args[0] and last[0][1] is reading):
                    last[:] = [(args[0], reading, reading(args[0]))]
                return (last[0][2], *args[1:])

            return hook

        try:
            for name, reading in readings.items():
                handles.append(
                    self.module.get_submodule(name).register_forward_pre_hook(hook_of(reading))
                )
            yield
        finally:
            for handle in handles:
                handle.remove()

    def exact(self) -> Block:
        """The block with activations, keys and values in floating point."""
        return replace(
            self,
            readings={n: r.exact() for n, r in self.readings.items() if r.rotation is not None},
            kv=None,
        )

    def computing(self, dtype: torch.dtype) -> Block:
        """The block with its forward pass in another dtype."""
        return replace(
            self, compute=dtype, kwargs={k: _cast(v, dtype) for k, v in self.kwargs.items()}
        )

    def entering(self, linear: str, x: Tensor) -> Tensor:
        """What meets a linear's weight when ``x`` arrives at it."""
        return self.readings[linear](x) if linear in self.readings else x

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    def passes(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows in the compute dtype on the device), a few thousand tokens at a time."""
        step = max(1, TOKENS_PER_PASS // x.shape[1])
        for at in range(0, len(x), step):
            self.prefetch(slice(at + step, at + 2 * step), x)
            yield at, self.arriving(x[at : at + step])

    def arriving(self, rows: Tensor) -> Tensor:
        """Rows of a stream as the layer takes them: moved, then cast, for streams are often half as
        wide. From page-locked memory nothing waits for the copy.
        """
        return rows.to(self.device, non_blocking=True).to(self.compute)

    def prefetch(self, rows: Tensor | slice, *streams: Tensor) -> None:
        """A hint that these rows of streams will be read next, see `Storage.prefetch`."""
        if self.storage is not None:
            for x in streams:
                self.storage.prefetch(x, rows)

    @torch.no_grad()
    def run(
        self, x: Tensor, weights: Mapping[str, Tensor] | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The layer's output for a whole stream, in the stored dtype; written over ``out``, if
        there is one, not ``x`` itself.
        """
        if out is None:
            out = (
                torch.empty_like(x)
                if self.storage is None
                else self.storage.empty(x.shape, x.dtype)
            )
        made = out

        def add(done: int, part: slice) -> int:
            self.prefetch(slice(part.stop, 2 * part.stop - part.start), x)
            y = self.forward(self.arriving(x[part]), weights)
            made[part] = y.to(made.device, made.dtype)
            return done + len(y)

        # No row depends on another.
        Parts(f"running '{self.name}'", TOKENS_PER_PASS // x.shape[1], self.announce).over(
            len(x), int, add
        )
        return out

    def decoded(self) -> dict[str, Tensor]:
        """All weights with the coded ones as a loader would decode them (rounded to the stored
        dtype).
        """
        out = dict(self.weights)
        for name, q in self.coded.items():
            out[f"{name}.weight"] = q.decode(self.stored).to(self.weight(name).dtype)
        return out

    @torch.no_grad()
    def observe(
        self, modules: Sequence[str], x: Tensor, rows: int, visit: Callable[[str, Call], None]
    ) -> None:
        """Tell ``visit`` what each of these submodules is called with when the first ``rows`` rows
        of ``x`` pass, of all ranks' rows those that are here.

        A linear's input is shown as it arrives, before its reading; `entering` gives what meets the
        weight. ``visit`` is called once per submodule and batch of rows, and need not keep what it
        sees. A pass ends where the last of them is called.
        """
        with self._watched(modules, visit) as left:
            for _, batch in self.passes(x[: self.ranks.count(rows)]):
                left.update(modules)
                with suppress(_Seen):
                    self.forward(batch)

    @torch.no_grad()
    def observe_inside(
        self,
        part: str,
        calls: Sequence[Call],
        modules: Sequence[str],
        visit: Callable[[str, Call], None],
    ) -> None:
        """The same for submodules of ``part``, run alone on calls that were kept of it."""
        cast = {
            k.removeprefix(f"{part}."): w.to(self.compute)
            for k, w in self.weights.items()
            if k.startswith(f"{part}.")
        }
        with self._watched(modules, visit) as left:
            for call in calls:
                left.update(modules)
                with suppress(_Seen), self.reading(self.readings):
                    functional_call(
                        self.module.get_submodule(part), cast, call.args, dict(call.kwargs)
                    )

    @contextmanager
    def _watched(
        self, modules: Sequence[str], visit: Callable[[str, Call], None]
    ) -> Iterator[set[str]]:
        """Within, passes show their calls of some submodules, and end when the set given, the names
        still to come, is empty.
        """
        handles: list[RemovableHandle] = []
        left: set[str] = set()

        def hook_of(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                visit(name, Call(args, kwargs))
                left.discard(name)
                if not left:
                    raise _Seen

            return hook

        try:
            for name in modules:
                submodule = self.module.get_submodule(name)
                handles.append(submodule.register_forward_pre_hook(hook_of(name), with_kwargs=True))
            yield left
        finally:
            for handle in handles:
                handle.remove()

    # --- changing ---------------------------------------------------------------------------------

    def weight(self, linear: str) -> Tensor:
        """The (out, in) float weight of a linear."""
        return self.weights[f"{linear}.weight"]

    def kept(self, name: str) -> Tensor:
        """A parameter that is not coded as an artifact stores it: bit for bit as the checkpoint
        does, if no method has changed it.
        """
        value = self.weights[name]
        own = self.dtypes.get(name, self.stored)
        exact = value.to(own)
        return (
            exact
            if own == self.stored or torch.equal(exact.to(value.dtype), value)
            else value.to(torch.promote_types(own, self.stored))
        )

    def rewritten(self, changes: Mapping[str, Tensor]) -> Block:
        """The block with some parameters replaced.

        Raises:
            LowbitError: one of them belongs to a linear that is already ranged or coded.
        """
        for key in changes:
            linear = key.removesuffix(".weight")
            if linear in self.coded or linear in self.params:
                state = "coded" if linear in self.coded else "on a fixed range"
                raise LowbitError(
                    f"'{self.name}.{key}' is already {state} and cannot be changed: in a recipe "
                    "transforms come before clips, and clips "
                    "before solvers."
                )
        return replace(self, weights={**self.weights, **changes})

    def clipped(self, weights: Mapping[str, Tensor], params: Mapping[str, Any]) -> Block:
        """The block with some linears' weights clamped to a range, whose grid parameters are fixed
        thereby.
        """
        whole = {name: self.weight(name).to(self.stored) for name in weights}
        changed = self.rewritten({f"{name}.weight": w for name, w in weights.items()}).ranged(
            params
        )
        return replace(changed, whole={**self.whole, **whole})

    def ranged(self, params: Mapping[str, Any]) -> Block:
        """The block with the grid parameters of some linears fixed, rounded as the artifact will
        hold them.
        """
        fixed = {k: self._as_stored(k, p) for k, p in params.items()}
        return replace(self, params={**self.params, **fixed})

    def affine(self, linear: str, who: str) -> Affine:
        """The grid of a linear, for a method that knows uniform ones only.

        Raises:
            LowbitError: it is another one.
        """
        grid = self.grids[linear]
        if not isinstance(grid, Affine):
            raise LowbitError(
                f"{who} shapes the ranges of uniform grids, and '{self.name}.{linear}' has a "
                f"{grid}: leave {who} out of the recipe."
            )
        return grid

    def range_of(self, linear: str) -> Any:
        """Fixed grid parameters of a linear, or those that fit its weight plainly."""
        if linear in self.params:
            return self.params[linear]
        return self._as_stored(linear, self.grids[linear].fit(self.weight(linear)))

    def _as_stored(self, linear: str, params: Any) -> Any:
        try:
            return self.grids[linear].stored(params, self.stored)
        except NotFiniteError as e:
            raise LowbitError(
                f"'{self.name}.{linear}' cannot be stored on a {self.grids[linear]}: {e}."
            ) from e

    def read(self, readings: Mapping[str, Reading]) -> Block:
        """The block with some linears' inputs read in another way."""
        return replace(self, readings={**self.readings, **readings})

    def solved(self, codes: Mapping[str, QTensor]) -> Block:
        """The block with codes for some linears."""
        return replace(self, coded={**self.coded, **codes})

    def noted(self, **notes: Any) -> Block:
        """The block with something added to its part of the report."""
        return replace(self, notes={**self.notes, **notes})
