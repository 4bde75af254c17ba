"""Block: one decoder layer as a value. A method takes one and returns another; nothing is mutated,
patched or restored.

A linear's weight goes free (in ``weights`` only) -> ranged (also in ``params``) -> coded (also in
``coded``). Changing a ranged or coded weight raises. Inputs are seen through `Block.statistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import LowbitError
from ..grid import AnyGrid, Coded, InputQuantizer, KVGrid, Params, QTensor, QuantizedStates
from ..grid.kmeans import NotFiniteError
from .beside import NOTHING, Kept, Keys, Values, arriving, left_by, picked, placed, widened
from .context import TOKENS_PER_PASS, Announce, Context
from .graph import Graph
from .hooks import AllSeen, quantized_inputs, watched
from .microbatches import MicroBatches
from .ranks import Ranks
from .recorder import fresh
from .routed import Routed
from .statistics import Call, Reduce, Seen, Statistic, Stream, Value, statistics


def first(output: Any) -> Tensor:
    """A layer's hidden states: some transformers versions return a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@dataclass(frozen=True)
class Block:
    """One decoder layer: its weights and what has been decided about them.

    Attributes:
        context: the module, the inputs and everything else that no method decides.
        weights: every parameter by its name inside the block, in float32 (float64 if that is the
            compute dtype): methods reason in it whatever the forward pass runs in.
        input_quantizers: linear -> what happens to its input (activation grid, online rotation);
            nothing where it is missing.
        kv: grid of keys and values, None for floating point.
        params: linear -> fixed grid parameters.
        coded: linear -> codes.
        whole: linear -> its weight before a clip cut it, in the stored dtype; for judging only.
        notes: decisions and losses, for the report.
    """

    context: Context
    weights: Mapping[str, Tensor]
    input_quantizers: Mapping[str, InputQuantizer] = field(default_factory=dict)
    kv: KVGrid | None = None
    params: Mapping[str, Params] = field(default_factory=dict)
    coded: Mapping[str, Coded] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    # --- the context ------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.context.name

    @property
    def module(self) -> nn.Module:
        return self.context.module

    @property
    def graph(self) -> Graph:
        return self.context.graph

    @property
    def grids(self) -> Mapping[str, AnyGrid]:
        return self.context.grids

    @property
    def compute(self) -> torch.dtype:
        return self.context.compute

    @property
    def stored(self) -> torch.dtype:
        return self.context.stored

    @property
    def x(self) -> Tensor:
        return self.context.x

    @property
    def xq(self) -> Tensor:
        return self.context.xq

    @property
    def target(self) -> Tensor:
        return self.context.target

    @property
    def tuned_rows(self) -> int:
        return self.context.tuned_rows

    @property
    def seed(self) -> int:
        return self.context.seed

    @property
    def announce(self) -> Announce:
        return self.context.announce

    @property
    def ranks(self) -> Ranks:
        return self.context.ranks

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    def within(self, **changes: Any) -> Block:
        """The block in another context."""
        return replace(self, context=replace(self.context, **changes))

    # --- running ----------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        given: Values = NOTHING,
    ) -> Tensor:
        """The layer's output for (n, length, hidden) inputs, in the compute dtype, with these
        weights or the block's own.

        Args:
            given: of the same rows, see `lowbit.model.beside`.
        """
        return self.passed(x, weights, given)[0]

    def passed(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        given: Values = NOTHING,
    ) -> tuple[Tensor, dict[Keys, Tensor]]:
        """The same, and what the layer leaves for later ones.

        Raises:
            ValueError: ``given`` is not what the layer reads.
        """
        place = self.context.place
        if given.keys() != place.given.keys():
            raise ValueError(f"'{self.name}' reads {[*place.given]} and is given {[*given]}")
        own = self.weights if weights is None else weights
        cast = self.context.cast(own)
        kwargs = fresh(dict(self.context.kwargs))
        if given:
            kwargs = placed(kwargs, arriving(given, x.device, self.compute))
        if self.graph.wide:
            kwargs = placed(kwargs, widened(kwargs, self.graph.wide, len(x)))
        if self.kv is not None and self.graph.attention is not None:
            kwargs["past_key_values"] = QuantizedStates(self.kv)
        with quantized_inputs(self.module, self.input_quantizers):
            out = functional_call(self.module, cast, (x,), kwargs)
        return first(out), {path: left_by(out, kwargs, path) for path in place.left}

    def exact(self) -> Block:
        """The block with activations, keys and values in floating point."""
        return replace(
            self,
            input_quantizers={
                n: r.exact() for n, r in self.input_quantizers.items() if r.rotation is not None
            },
            kv=None,
        )

    def computing(self, dtype: torch.dtype) -> Block:
        """The block with its forward pass in another dtype."""
        return replace(self, context=self.context.computing(dtype))

    def as_seen(self, stream: Stream) -> Block:
        """The block as a stream passes it: coded weights decoded, or nothing quantized."""
        return self.exact() if stream == "float" else replace(self, weights=self.decoded())

    def entering(self, linear: str, x: Tensor) -> Tensor:
        """What meets a linear's weight when ``x`` arrives at it."""
        return self.input_quantizers[linear](x) if linear in self.input_quantizers else x

    @torch.no_grad()
    def run(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        out: Tensor | None = None,
        given: Values = NOTHING,
        keep: Kept | None = None,
        routed: Routed | None = None,
        look: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """The layer's output for a whole stream, in the stored dtype; written over ``out``, if
        there is one, not ``x`` itself.

        Args:
            given: of the stream's rows. keep: takes what the layer leaves. routed: counts
                the tokens of experts. look: shown some rows of the output at a time, (n, length,
                hidden) on the device, maybe again where memory runs out.
        """
        context, device = self.context, self.device
        if out is None:
            storage = context.storage
            out = torch.empty_like(x) if storage is None else storage.empty(x.shape, x.dtype)
        made = out

        def add(done: int, part: slice) -> int:
            following = slice(part.stop, 2 * part.stop - part.start)
            context.prefetch(following, x, *given.values())
            arrived = context.arriving(x[part], device)
            with nullcontext() if routed is None else routed.passing(part):
                y, left = self.passed(arrived, weights, picked(given, part))
            if keep is not None:
                keep.put(part, left)
            y = y.to(made.dtype)
            if look is not None:
                look(y)
            # Into page-locked memory this is copied while the next rows are worked on.
            made[part].copy_(y, non_blocking=True)
            return done + len(y)

        # No row depends on another.
        most = TOKENS_PER_PASS // x.shape[1]
        MicroBatches(f"running '{self.name}'", most, self.announce).over(len(x), int, add)
        if made.device != device:
            torch.accelerator.synchronize(device)
        return out

    def decoded(self) -> dict[str, Tensor]:
        """All weights with the coded ones as a loader would decode them (rounded to the stored
        dtype).
        """
        out = dict(self.weights)
        for name, q in self.coded.items():
            out[f"{name}.weight"] = q.decode(self.stored).to(self.weight(name).dtype)
        return out

    # --- seeing -----------------------------------------------------------------------------------

    @torch.no_grad()
    def statistics(
        self,
        linears: Sequence[str],
        stream: Stream,
        of: Callable[[Seen], Value],
        reduce: Reduce = "sum",
        *,
        rows: int | None = None,
        tokens: Tensor | None = None,
        most: int | None = None,
        inside: tuple[str, list[Call]] | None = None,
        keep: Mapping[str, list[Call]] | None = None,
        pooled: bool = False,
    ) -> dict[str, Statistic]:
        """A statistic of what reaches some linears, over the calibration rows of all ranks.

        Args:
            stream: "float", as in the float model, or "quantized", as the quantized model has it.
            of: what of a batch; a tensor whose shape does not depend on the number of tokens, or
                several.
            reduce: "sum" or "max" over batches and ranks, or a function that merges two results (on
                several ranks ``of`` must then take a batch of no tokens).
            rows: leading rows that pass; None for all that methods may learn from.
            tokens: (n,) int64, those that count, as row * length + position; None for all.
            most: rows at a time, at most.
            inside: (submodule, calls of it): run only that submodule, on these calls.
            keep: submodule -> list that its calls here are appended to; a rank's own, as they are.
            pooled: one statistic of all these linears, of as many inputs each, by the first's name.

        Returns:
            linear -> statistic.
        """
        return statistics(
            self, linears, stream, of, reduce, rows, tokens, most, inside, keep, pooled
        )

    @torch.no_grad()
    def observe(
        self,
        modules: Sequence[str],
        stream: Stream,
        rows: int,
        visit: Callable[[str, Call], None],
        most: int | None = None,
    ) -> None:
        """Tell ``visit`` what each of these submodules is called with when the first rows of a
        stream pass, of all ranks' rows those that are here.

        A linear's input is shown as it arrives, before its input quantizer; `entering` gives what
        meets the weight. ``visit`` is called once per submodule and batch of rows, and need not
        keep what it sees. A pass ends where the last of them is called.

        Args:
            most: rows at a time, at most.
        """
        viewed = self.as_seen(stream)
        context = self.context
        x, given = (self.x, context.given) if stream == "float" else (self.xq, context.given_q)
        with watched(self.module, modules, visit) as left:
            own = x[: self.ranks.count(rows)]
            for batch, beside in context.passes(own, given, self.device, most):
                left.update(modules)
                with suppress(AllSeen):
                    viewed.forward(batch, given=beside)

    @torch.no_grad()
    def observe_inside(
        self,
        part: str,
        calls: Sequence[Call],
        modules: Sequence[str],
        visit: Callable[[str, Call], None],
    ) -> None:
        """The same for submodules of ``part``, run alone with these weights on calls of it."""
        own = {
            k.removeprefix(f"{part}."): w
            for k, w in self.weights.items()
            if k.startswith(f"{part}.")
        }
        cast = self.context.cast(own, part)
        with watched(self.module, modules, visit) as left:
            for call in calls:
                left.update(modules)
                with suppress(AllSeen), quantized_inputs(self.module, self.input_quantizers):
                    functional_call(
                        self.module.get_submodule(part), cast, call.args, dict(call.kwargs)
                    )

    # --- changing ---------------------------------------------------------------------------------

    def weight(self, linear: str) -> Tensor:
        """The (out, in) float weight of a linear."""
        return self.weights[f"{linear}.weight"]

    def kept(self, name: str) -> Tensor:
        """A parameter that is not coded as an artifact stores it: bit for bit as the checkpoint
        does, if no method has changed it.
        """
        value = self.weights[name]
        own = self.context.dtypes.get(name, self.stored)
        exact = value.to(own)
        if own == self.stored or torch.equal(exact.to(value.dtype), value):
            return exact
        return value.to(self.context.keeps(name))

    def with_weights(self, changes: Mapping[str, Tensor]) -> Block:
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

    def clipped(self, weights: Mapping[str, Tensor], params: Mapping[str, Params]) -> Block:
        """The block with some linears' weights clamped to a range, whose grid parameters are fixed
        thereby.
        """
        whole = {name: self.weight(name).to(self.stored) for name in weights}
        changed = self.with_weights(
            {f"{name}.weight": w for name, w in weights.items()}
        ).with_params(params)
        return replace(changed, whole={**self.whole, **whole})

    def with_params(self, params: Mapping[str, Params]) -> Block:
        """The block with the grid parameters of some linears fixed, rounded as the artifact will
        hold them.
        """
        fixed = {k: self._as_stored(k, p) for k, p in params.items()}
        return replace(self, params={**self.params, **fixed})

    def nearest(self, linear: str) -> Coded:
        """The nearest codes of a linear's weight, on its fixed range if it has one."""
        grid, params = self.grids[linear], self.range_of(linear)
        return QTensor(grid, grid.encode(self.weight(linear), params), params)

    def range_of(self, linear: str) -> Params:
        """Fixed grid parameters of a linear, or those that fit its weight plainly."""
        if linear in self.params:
            return self.params[linear]
        return self._as_stored(linear, self.grids[linear].fit(self.weight(linear)))

    def _as_stored(self, linear: str, params: Params) -> Params:
        grid = self.grids[linear]
        held: Params = grid.stored(params, self.stored)
        try:
            grid.check_finite(held)
            return held
        except NotFiniteError as e:
            raise LowbitError(f"'{self.name}.{linear}' cannot be stored on a {grid}: {e}.") from e

    def with_input_quantizers(self, input_quantizers: Mapping[str, InputQuantizer]) -> Block:
        """The block with some linears' inputs read in another way."""
        return replace(self, input_quantizers={**self.input_quantizers, **input_quantizers})

    def with_codes(self, codes: Mapping[str, Coded]) -> Block:
        """The block with codes for some linears."""
        return replace(self, coded={**self.coded, **codes})

    def with_notes(self, **notes: Any) -> Block:
        """The block with something added to its part of the report."""
        return replace(self, notes={**self.notes, **notes})

    def remarked(self, *remarks: str) -> Block:
        """The block with sentences added that a person should read."""
        if not remarks:
            return self
        return self.with_notes(trouble=[*self.notes.get("trouble", ()), *remarks])
