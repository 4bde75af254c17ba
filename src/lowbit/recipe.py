"""Recipe: what to do, as a value that reads and writes TOML; and `run`, the only loop over blocks."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import LowbitError, unknown
from .grid import ActivationGrid, Affine, Codebook, Grid, KQuant, KVGrid, PerToken, Reading, activation_grid
from .grid.codebook import Per
from .methods import CLAQ, METHODS, RTN, SOLVERS, CrossQuant, Method, OmniQuant, QuaRot, TesseraQ
from .methods._reconstruct import Reconstruction
from .methods.claq import least_gain, survey
from .model.block import Announce, Block, silent
from .model.calibration import Calibration
from .model.stream import ModelStream
from .scheme import Scheme, as_codebook, parse_scheme, scheme_name, weights_only

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

@dataclass(frozen=True)
class Recipe:
    """A grid, exceptions by name, and methods in order. Runs nothing by itself.

    Attributes:
        grid: for every linear that no override names; all grids of a recipe are of one kind.
        methods: applied to each block in this order; what they leave uncoded is rounded to nearest.
        overrides: (pattern, grid), shell patterns on full linear names such as "*.down_proj"; the last match counts.
        calibration: the text that methods learn from, where a run is not given another.
        activations: grid of every quantized linear's input, None for floating point.
        kv: grid of keys and values, None for floating point.
        name: a label for reports.
    """

    grid: Grid
    methods: tuple[Method, ...] = (RTN(),)
    overrides: tuple[tuple[str, Grid], ...] = field(default=())
    calibration: Calibration = field(default_factory=Calibration)
    name: str = "custom"
    activations: ActivationGrid | None = None
    kv: PerToken | None = None

    def __post_init__(self) -> None:
        names = [_method_name(m) for m in self.methods]
        for at, method in enumerate(self.methods):
            before = next((n for n, m in zip(names[:at], self.methods, strict=False) if isinstance(m, SOLVERS)), None)
            if before and isinstance(method, SOLVERS) and not isinstance(method, TesseraQ):
                raise LowbitError(f"'{names[at]}' after '{before}' in a recipe would do nothing: everything is coded by then.")
            if before and not isinstance(method, SOLVERS):
                raise LowbitError(f"'{names[at]}' after '{before}' in a recipe: what changes weights or ranges comes before what codes them.")
            if isinstance(method, QuaRot) and at:
                raise LowbitError(f"'{names[at]}' must come first in a recipe, before '{names[0]}': rotations mix the channels others scale.")
            for grid in (self.grid, *(g for _, g in self.overrides)):
                if isinstance(method, CLAQ):
                    method.check(grid)
                if isinstance(method, OmniQuant) and not isinstance(grid, Affine):
                    raise LowbitError(f"omniquant learns ranges of uniform grids, and {grid} has none: choose another recipe or scheme.")

    @property
    def scheme(self) -> Scheme:
        """The bits of weights, activations, keys and values."""
        grid = self.grid
        symmetric = isinstance(grid, Affine) and grid.symmetric
        weights = grid if isinstance(grid, KQuant) else Affine(grid.bits, grid.group_size, symmetric)
        return Scheme(weights, self.activations.bits if self.activations else None, self.kv.bits if self.kv else None)

    @property
    def rotates_online(self) -> bool:
        """Whether the finished model rotates activations while it runs."""
        return any(isinstance(m, QuaRot) and m.online for m in self.methods)

    def with_scheme(self, scheme: Scheme) -> Recipe:
        """The recipe for other bits; how activations, keys and values are quantized stays as the recipe has it."""
        grid = as_codebook(scheme.weights, self.grid.per) if isinstance(self.grid, Codebook) else scheme.weights
        bits, kv_bits = scheme.activation_bits, scheme.kv_bits
        activations = None if bits is None else replace(self.activations or PerToken(bits), bits=bits)
        return replace(self, grid=grid, activations=activations, kv=None if kv_bits is None else replace(self.kv or PerToken(kv_bits), bits=kv_bits))

    def grid_of(self, linear: str) -> Grid:
        """The grid of a linear by its full name."""
        return next((g for pattern, g in reversed(self.overrides) if fnmatchcase(linear, pattern)), self.grid)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as written to TOML and to report.json."""
        out: dict[str, Any] = {"name": self.name, "scheme": str(self.scheme), "methods": [_method_name(m) for m in self.methods]}
        if isinstance(self.grid, Codebook):
            out["codebook"] = self.grid.per
        if self.overrides:
            out["overrides"] = {pattern: scheme_name(g) for pattern, g in self.overrides}
        out["calibration"] = dataclasses.asdict(self.calibration)
        for key, grid in (("activations", self.activations), ("kv", self.kv)):
            if grid is not None:
                out[key] = {k: v for k, v in dataclasses.asdict(grid).items() if k != "bits"}
        for method in self.methods:
            options = dataclasses.asdict(method)
            if options:
                out[_method_name(method)] = options
        return out

    def to_toml(self) -> str:
        """The recipe as a TOML document that `Recipe.from_toml` reads back to an equal value."""
        data = self.as_dict()
        lines = [f"{k} = {_toml(v)}" for k, v in data.items() if not isinstance(v, dict)]
        for key, table in data.items():
            if isinstance(table, dict):
                lines += ["", f"[{key}]", *(f"{_toml(k) if key == 'overrides' else k} = {_toml(v)}" for k, v in table.items())]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], origin: str = "recipe") -> Recipe:
        """A recipe from plain data.

        Raises:
            LowbitError: an unknown key, method, option or value, named with ``origin``.
        """
        known = ("name", "scheme", "codebook", "methods", "overrides", "calibration", "activations", "kv", *METHODS)
        for key in data:
            if key not in known:
                raise unknown(f"key in {origin}", key, known)
        names = data.get("methods", [])
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise LowbitError(f"{origin}: 'methods' must be a list of method names ({', '.join(METHODS)}).")
        for name in names:
            if name not in METHODS:
                raise unknown(f"method in {origin}", name, METHODS)
        for key in METHODS:
            if key in data and key not in names:
                raise LowbitError(f"{origin} sets options of '{key}', which is not among its methods {names}.")
        methods: tuple[Method, ...] = tuple(_built(METHODS[n], n, data.get(n, {}), origin) for n in names)
        calibration = _built(Calibration, "calibration", data.get("calibration", {}), origin)
        for key, kind in (("scheme", str), ("name", str), ("codebook", str), ("overrides", dict)):
            if key in data and not isinstance(data[key], kind):
                raise LowbitError(f"{origin}: '{key}' must be {'a table' if kind is dict else 'a string'}, got {data[key]!r}.")
        scheme = parse_scheme(data.get("scheme", "W4A16" if "codebook" in data else "W4A16g128"))
        grids: list[Grid] = [scheme.weights, *(weights_only(s) for s in data.get("overrides", {}).values())]
        if "codebook" in data:
            per: Per = _checked(data["codebook"], Per, f"{origin}: codebook")
            grids = [as_codebook(g, per) for g in grids if isinstance(g, (Affine, KQuant))]
        overrides = tuple(zip(data.get("overrides", {}), grids[1:], strict=True))
        activations = _activation_grid(data, scheme.activation_bits, origin)
        kv = _dynamic(PerToken, data, "kv", scheme.kv_bits, origin)
        return cls(grids[0], methods, overrides, calibration, data.get("name", "custom"), activations, kv)

    @classmethod
    def from_toml(cls, text: str, origin: str = "recipe") -> Recipe:
        """A recipe from a TOML document; see `from_dict`."""
        try:
            return cls.from_dict(tomllib.loads(text), origin)
        except tomllib.TOMLDecodeError as e:
            raise LowbitError(f"{origin} is not valid TOML: {e}") from e


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def _method_name(method: Method) -> str:
    return next(name for name, kind in METHODS.items() if type(method) is kind)


_G = typing.TypeVar("_G")


def _activation_grid(data: Mapping[str, Any], bits: int | None, origin: str) -> ActivationGrid | None:
    options = data.get("activations", {})
    kind: type[Any] = activation_grid(options if isinstance(options, dict) else {})
    found: ActivationGrid | None = _dynamic(kind, data, "activations", bits, origin)
    return found


def _dynamic(kind: type[_G], data: Mapping[str, Any], key: str, bits: int | None, origin: str) -> _G | None:
    """The grid that the options under ``key`` describe; they apply to schemes that quantize it and wait for one otherwise."""
    options = data.get(key, {})
    if isinstance(options, dict) and "bits" in options:
        raise LowbitError(f"{origin}: '{key}.bits' is said by the scheme, as in W4A8KV4.")
    try:
        grid = _built(kind, key, {**options, "bits": bits or 8} if isinstance(options, dict) else options, origin)
    except ValueError as e:
        raise LowbitError(f"{origin}: {key}: {e}.") from e
    return grid if bits else None


_T = typing.TypeVar("_T")


def _built(kind: type[_T], name: str, options: Mapping[str, Any], origin: str) -> _T:
    """A dataclass from some of its fields; an unknown field or a value of the wrong type is an error."""
    if not isinstance(options, dict):
        raise LowbitError(f"{origin}: '{name}' must be a table of options ([{name}]), got {options!r}.")
    hints = typing.get_type_hints(kind)
    checked = {}
    for key, value in options.items():
        if key not in hints:
            raise unknown(f"option of {name} in {origin}", key, hints)
        checked[key] = _checked(value, hints[key], f"{origin}: {name}.{key}")
    return kind(**checked)


def _checked(value: Any, hint: Any, where: str) -> Any:
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else None
    if choices:
        if value not in choices:
            raise LowbitError(f"{where} must be one of {', '.join(map(str, choices))}, got {value!r}.")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise LowbitError(f"{where} must be of type {hint.__name__}, got {value!r}.")
    return value


# --- the loop ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Streams:
    """Activations at a block boundary: as the float model has them and as the quantized prefix has them.

    Attributes:
        x, xq: (rows, length, hidden) in the model's dtype; the same tensor before the first block.
        tuned_rows: leading rows that methods may learn from; the others are held out.
        proof: (rows, length, hidden) in float32 at least, whatever tuning computes in: the quantized model's activations for
            the artifact's proof, never rounded between blocks.
    """

    x: Tensor
    xq: Tensor
    tuned_rows: int
    proof: Tensor | None = None


def prepared(stream: ModelStream, recipe: Recipe, seed: int) -> ModelStream:
    """The model as the recipe's methods want to see it: in a rotated basis if one of them rotates the residual stream.

    Raises:
        LowbitError: a size that cannot be rotated, or a file that is not there.
    """
    for method in recipe.methods:
        if isinstance(method, QuaRot):
            inner = stream.block_module(0).get_parameter(f"{stream.wiring.sites[-1].reads[0]}.weight").shape[1]
            method.check(stream.wiring, inner, recipe.kv is not None)
            stream = stream.rotated(seed) if method.residual else stream
        if isinstance(method, OmniQuant) and method.clips and not Path(method.clips).is_file():
            raise LowbitError(f"omniquant.clips: no such file: '{method.clips}'.")
    return stream


def ordered(stream: ModelStream, recipe: Recipe, ids: Tensor, seed: int, announce: Announce = silent) -> ModelStream:
    """The model with the channels of its residual stream by falling size, if the recipe folds CrossQuant's factors by groups.

    One pass of the float model over the calibration rows ``ids``, also when a run is resumed.

    Raises:
        LowbitError: the family's channels cannot change places.
    """
    method = next((m for m in recipe.methods if isinstance(m, CrossQuant) and m.fold == "group"), None)
    if method is None:
        return stream
    stream.ordered(torch.arange(stream.config.hidden_size))  # refuses before the pass
    x = stream.embed(ids)
    streams, kwargs = Streams(x, x, len(ids)), stream.block_kwargs(ids.shape[1])
    total = torch.zeros(stream.config.hidden_size, dtype=torch.float64, device=stream.device)
    for i in range(len(stream)):
        announce(f"crossquant: sizes of the residual channels in block {i + 1} of {len(stream)}")
        block = begin(stream, i, replace(recipe, activations=None, kv=None), streams, kwargs[i], seed)
        total += method.residual_sizes(block)
        streams = replace(streams, x=block.target, xq=block.target)
        del block
    stream.release()
    return stream.ordered(total.argsort(descending=True, stable=True))


def surveyed(
    stream: ModelStream, recipe: Recipe, streams: Streams, kwargs: Sequence[Mapping[str, Any]], seed: int, announce: Announce = silent
) -> Recipe:
    """The recipe with what a method wants to know of the whole model before its first block: CLAQ's price of a bit.

    One pass of the float model, block by block, also when a run is resumed; nothing is read where no method asks.
    """
    method = next((m for m in recipe.methods if isinstance(m, CLAQ) and m.needs_survey), None)
    if method is None:
        return recipe
    found: list[tuple[Tensor, int]] = []
    for i in range(len(stream)):
        announce(f"claq: what a bit would gain in block {i + 1} of {len(stream)}")
        block = begin(stream, i, replace(recipe, activations=None, kv=None), streams, kwargs[i], seed)
        found += survey(block, method)
        streams = replace(streams, x=block.target, xq=block.target)
        del block
    gain = least_gain(found, recipe.grid.bits + method.adaptive_bits - min(2, recipe.grid.bits))
    return replace(recipe, methods=tuple(replace(m, least_gain=gain) if m is method else m for m in recipe.methods))


def begin(stream: ModelStream, i: int, recipe: Recipe, streams: Streams, kwargs: Mapping[str, Any], seed: int, announce: Announce = silent) -> Block:
    """Block i with its weights read, its inputs attached, its float target computed and its activations on their grids."""
    name = stream.block_name(i)
    block = Block(
        name=name, module=stream.block_module(i), wiring=stream.wiring, kwargs=kwargs, weights=stream.block_weights(i),
        compute=stream.compute, stored=stream.dtype, grids={n: recipe.grid_of(f"{name}.{n}") for n in stream.wiring.linears},
        x=streams.x, xq=streams.xq, target=streams.x, tuned_rows=streams.tuned_rows, seed=seed * 1_000_003 + i,
        readout=stream.readout() if i == len(stream) - 1 else None, announce=announce,
    )  # fmt: skip
    target = block.run(streams.x)
    if not bool(torch.isfinite(target.float().square().sum(-1)).all()):  # as norms and losses take it
        raise LowbitError(f"'{name}' of the float model gives activations whose squares are not finite: its weights or norms are too large.")
    return _gridded(replace(block, target=target), recipe)


def _gridded(block: Block, recipe: Recipe) -> Block:
    if recipe.activations is not None:
        block = block.read(dict.fromkeys(block.wiring.linears, Reading(grid=recipe.activations)))
    return block if recipe.kv is None else replace(block, kv=KVGrid(recipe.kv))


def as_read(block: Block, recipe: Recipe) -> Block:
    """A block just begun with the online rotations that the recipe's methods give it, without doing their work on the weights."""
    for method in recipe.methods:
        if isinstance(method, QuaRot):
            turned = method(block)
            block = replace(block, readings=turned.readings, kv=turned.kv)
    return block


def readings_of(stream: ModelStream, recipe: Recipe) -> tuple[Mapping[str, Reading], KVGrid | None]:
    """How the finished model reads activations, keys and values, the same in every block."""
    empty = torch.empty(0, 1, 1)
    block = Block(
        name=stream.block_name(0), module=stream.block_module(0), wiring=stream.wiring, kwargs={}, weights=stream.block_weights(0),
        compute=stream.compute, stored=stream.dtype, grids={}, x=empty, xq=empty, target=empty, tuned_rows=0, seed=0,
    )  # fmt: skip
    block = as_read(_gridded(block, recipe), recipe)
    return block.readings, block.kv


def apply_methods(block: Block, recipe: Recipe) -> Block:
    """All methods of the recipe in order, then nearest rounding for whatever is left.

    Notes ``loss_before`` and ``loss_after``: the squared error of the block's output on the quantized prefix, summed over
    hidden units and averaged over tokens, of plain nearest rounding and of the result.
    """
    before = Reconstruction(block, batch=1).loss(RTN()(block).decoded())
    for method in (*recipe.methods, RTN()):
        block = method(block)
    return block.noted(loss_before=before, loss_after=Reconstruction(block, batch=1).loss(block.decoded()))  # as it reads now


@torch.no_grad()
def advance(block: Block, streams: Streams, proof_kwargs: Mapping[str, Any]) -> Streams:
    """The streams after a finished block."""
    decoded = block.decoded()
    proof = streams.proof
    if proof is not None:
        wide = torch.promote_types(block.compute, torch.float32)
        alone = replace(block, kwargs=proof_kwargs, compute=wide)  # row by row, as loaders are asked: a grid may look at all rows
        proof = torch.cat([alone.forward(row[None].to(block.device), decoded) for row in proof])
    return replace(streams, x=block.target, xq=block.run(streams.xq, decoded), proof=proof)


def run(
    stream: ModelStream,
    recipe: Recipe,
    streams: Streams,
    seed: int,
    kwargs: Sequence[Mapping[str, Any]],
    proof_kwargs: Sequence[Mapping[str, Any]],
    start: int = 0,
    announce: Announce = silent,
) -> Iterator[tuple[Block, Streams]]:
    """Quantize the blocks from number ``start`` on, one in memory at a time.

    Args:
        streams: the activations that enter block ``start``.
        kwargs, proof_kwargs: what each block is called with, for the streams' and for the proof's rows (in float32).
        announce: told what a method is about to do.

    Yields:
        each finished block with the streams that leave it; the point to write, to report and to resume from.
    """
    for i in range(start, len(stream)):
        block = apply_methods(begin(stream, i, recipe, streams, kwargs[i], seed, announce), recipe)
        streams = advance(block, streams, proof_kwargs[i])
        yield block, streams
        del block  # else it would be held while the next one is tuned
