"""What a run will need, from config.json alone: sizes, memory, disk, a time estimate, and which
runtimes will load the result.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import LowbitError
from .estimate import Shapes, Speed, run_work
from .formats.compressed_tensors import carries
from .formats.packing import tensor_bytes
from .grid import Affine, KQuant
from .grid.kquant import SUPER
from .memory import PROCESS, Layer, Needs, Rows, needs
from .methods import CLAQ, QuaRot
from .model.checkpoint import config_at, hub_file
from .model.skeleton import build_skeleton
from .model.wiring import Wiring, wiring_of
from .recipe import Recipe
from .targets import Planned, Verdict, verdicts

HELD_OUT = 16  # rows that a run draws besides the calibration's, to judge the result on
_SCALE_BYTES = 2


@dataclass(frozen=True)
class Plan:
    """The needs of one run. Sizes in bytes, time in seconds.

    Attributes:
        parameters: of the model, tied heads once; quantized: those inside quantized linears.
        original: the 16-bit checkpoint; artifact: the packed one.
        bits_per_weight: of the quantized linears, scales and zero points included;
            model_bits_per_weight: of everything.
        memory: what is held while it runs, see `lowbit.memory.Needs`.
        check_memory: the closing check, in a process of its own: the whole model decoded, in
            float32.
        seconds: counted work at the measured speed of this device, see `lowbit.estimate`; None if
            no speed was given.
        runtimes: what each says to the result, in the order of `lowbit.targets.TARGETS`.
    """

    model_type: str
    blocks: int
    parameters: int
    quantized: int
    original: int
    artifact: int
    bits_per_weight: float
    model_bits_per_weight: float
    memory: Needs
    check_memory: int
    seconds: float | None
    runtimes: tuple[Verdict, ...]

    def as_dict(self) -> dict[str, Any]:
        m = self.memory
        return {
            **asdict(self),
            "block_memory": m.block,
            "outer_memory": m.outer,
            "activations": m.streams,
            "peak_memory": m.peak,
        }

    def verdict(self, target: str) -> Verdict:
        """What a runtime says, by its name in `lowbit.targets.TARGETS`."""
        return next(v for v in self.runtimes if v.runtime.lower() == target)


def read_config(model: str) -> Any:
    """The config of a local folder, of a config.json itself or of a hub repository; weights are not
    looked at.

    Raises:
        LowbitError: there is none.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        if (
            path.suffix == ".json"
            or path.name == "config.json"
            or model.count("/") != 1
            or model.startswith((".", "/"))
        ):
            raise LowbitError(f"no config.json at '{model}'.")
        found = hub_file(model, "config.json")
        if found is None:
            raise LowbitError(f"hub repository '{model}' has no config.json.")
        path = found
    return config_at(path)


def check_divides(shapes: Mapping[str, tuple[int, int]], recipe: Recipe) -> None:
    """Refuse a group size that some linear cannot have.

    Args:
        shapes: full linear name -> (out, in).

    Raises:
        LowbitError: naming the linear, its width and the sizes that fit all; or an override that
            matches nothing.
    """
    for name, (_, width) in shapes.items():
        grid = recipe.grid_of(name)
        if isinstance(grid, KQuant) and width % SUPER:
            raise LowbitError(
                f"{grid} comes in blocks of {SUPER} inputs, which do not divide the {width} inputs "
                f"of '{name}': choose a scheme with g."
            )
        size = None if isinstance(grid, KQuant) else grid.group_size
        if size and width % size:
            fitting = [
                str(g)
                for g in (256, 128, 64, 32, 16, 8)
                if all(w % g == 0 for _, w in shapes.values())
            ]
            raise LowbitError(
                f"group size {size} does not divide the {width} inputs of '{name}'. Group sizes "
                "that fit every linear of this model: "
                f"{', '.join(fitting) or 'none of the usual ones'}, or a scheme without g (one "
                "scale per output channel)."
            )
    for i, (pattern, grid) in enumerate(recipe.overrides):
        alone = Recipe(recipe.grid, (), ((pattern, grid),))
        if not any(alone.grid_of(n) is grid for n in shapes):
            raise LowbitError(
                f"override {i + 1}, '{pattern}', matches no linear of this model; names look like "
                f"'{next(iter(shapes))}'."
            )


def beyond_compressed_tensors(names: Iterable[str], recipe: Recipe, wiring: Wiring) -> str | None:
    """What plain loaders of compressed-tensors could not run of the result; None if they can run it
    all.
    """
    names = list(names)
    if any(isinstance(recipe.grid_of(n), KQuant) for n in names):
        return "K-quants"
    if not all(isinstance(recipe.grid_of(n), Affine) for n in names):
        return "codebooks"
    if any(isinstance(m, CLAQ) and m.outlier_bits for m in recipe.methods):
        return "weights kept in floating point (claq.outlier_bits)"
    if recipe.kv is not None:
        return "quantized keys and values"
    if recipe.rotates_online:
        return "online rotations (--set quarot.online=false leaves them out)"
    if not carries(
        [g for n in names if isinstance(g := recipe.grid_of(n), Affine)], recipe.activations
    ):
        return (
            "these activations: compressed-tensors takes 4- or 8-bit ones with "
            "activations.symmetric and activations.full_range, no clip, under symmetric weights "
            "('sym' at the end of the scheme)"
        )
    if recipe.activations is not None and wiring.flat:
        # compressed-tensors (0.20) in transformers keeps the first two dimensions when it takes
        # maxima: in a matrix, none are left to reduce.
        return (
            f"quantized activations of {' and '.join(wiring.flat)}, whose tokens would all get one "
            "scale in transformers"
        )
    return None


def check_loadable(names: Iterable[str], recipe: Recipe, wiring: Wiring) -> None:
    """Refuse what plain transformers could not load, before any work.

    Raises:
        LowbitError: several grids of which one is asymmetric; its loader takes one scheme for all
            asymmetric linears. The library's own format has no such limit.
    """
    names = list(names)
    if beyond_compressed_tensors(names, recipe, wiring):
        return
    grids = {recipe.grid_of(n) for n in names}
    if len(grids) > 1 and not all(isinstance(g, Affine) and g.symmetric for g in grids):
        raise LowbitError(
            "plain transformers loads mixed grids only if all are symmetric: add 'sym' to every "
            "scheme of the recipe, or use one for all linears."
        )


def _skeleton(config: Any) -> tuple[dict[str, tuple[int, int]], int, int, int, frozenset[str]]:
    """(linear -> shape of one block, parameters of a block outside its linears, parameters outside
    the blocks, of it the tied head, linears of a block with a bias).
    """
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    wiring = wiring_of(small)
    model: Any = build_skeleton(small, getattr(config, "name_or_path", "") or config.model_type)
    block = model.get_submodule(wiring.layers)[0]
    linears = {n: tuple(block.get_parameter(f"{n}.weight").shape) for n in wiring.linears}
    inside = sum(p.numel() for p in block.parameters())
    # Meta tensors carry no data to tie: count the head out by the config's word.
    head = model.get_output_embeddings().weight
    tied = bool(getattr(config, "tie_word_embeddings", False))
    outside = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()) - inside
    if tied and head is not model.get_input_embeddings().weight:
        outside -= head.numel()
    biased = frozenset(n for n in wiring.linears if block.get_submodule(n).bias is not None)
    return (
        linears,
        inside - sum(a * b for a, b in linears.values()),
        outside,
        head.numel() if tied else 0,
        biased,
    )


def make_plan(
    config: Any,
    recipe: Recipe,
    samples: int = 128,
    length: int = 2048,
    speed: Speed | None = None,
    tensor_parallel: int = 1,
    device: torch.device | None = None,
    ranks: int = 1,
) -> Plan:
    """Count what a run needs, and ask the runtimes.

    Args:
        config: a transformers config. speed: of the device, from `lowbit.estimate.measure_speed`;
            None leaves the time out.
        tensor_parallel: devices among which a server will divide every linear. device: which
            computes, by default a CPU.
        ranks: processes that share the run on one machine; memory is of each.

    Raises:
        LowbitError: unsupported family, or a group size that does not fit.
    """
    if tensor_parallel < 1:
        raise LowbitError(
            f"--tensor-parallel is a number of devices, at least 1; got {tensor_parallel}."
        )
    linears, rest, outside, tied_head, biased = _skeleton(config)
    rotation = next((m for m in recipe.methods if isinstance(m, QuaRot)), None)
    wiring = wiring_of(config)
    if rotation is not None:
        rotation.check(wiring, linears[wiring.sites[-1].reads[0]][1], recipe.kv is not None)
        # A rotated model has a head of its own.
        outside_stored = outside + (tied_head if rotation.residual else 0)
    else:
        outside_stored = outside
    blocks, layers = config.num_hidden_layers, wiring.layers
    names = {f"{layers}.{i}.{n}": shape for i in range(blocks) for n, shape in linears.items()}
    check_divides(names, recipe)
    check_loadable(names, recipe, wiring)
    quantized = sum(a * b for a, b in names.values())
    packed = sum(
        tensor_bytes(recipe.grid_of(n), a, b, _SCALE_BYTES) for n, (a, b) in names.items()
    ) + _extras(recipe, names)
    untouched, stored = rest * blocks + outside, rest * blocks + outside_stored
    parameters = quantized + untouched
    context = getattr(config, "max_position_embeddings", None) or length
    place, dtype = device or torch.device("cpu"), _dtype(config)
    layer = Layer(linears, rest, outside, config.hidden_size, config.vocab_size)
    shared = Rows(
        samples, min(length, context), dtype.itemsize, _compute(place, dtype).itemsize, ranks
    )
    shapes = Shapes(
        layer, [s.reads for s in wiring.sites], shared, HELD_OUT, place, _compute(place, dtype)
    )
    return Plan(
        model_type=config.model_type,
        blocks=blocks,
        parameters=parameters,
        quantized=quantized,
        original=2 * parameters,
        artifact=packed + 2 * stored,
        bits_per_weight=8 * packed / quantized,
        model_bits_per_weight=8 * (packed + 2 * stored) / parameters,
        memory=needs_of(
            config, recipe, samples + HELD_OUT, min(length, context), place, dtype, ranks, ranks
        ),
        check_memory=4 * parameters,
        seconds=None if speed is None else run_work(recipe, shapes, blocks).seconds(speed),
        runtimes=verdicts(
            Planned(
                recipe,
                names,
                wiring,
                config,
                beyond_compressed_tensors(names, recipe, wiring),
                biased,
                tensor_parallel,
            )
        ),
    )


def needs_of(
    config: Any,
    recipe: Recipe,
    rows: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    ranks: int = 1,
    here: int = 1,
) -> Needs:
    """What one process of a run holds in memory.

    Args:
        config: a transformers config. rows: calibration rows, held-out ones included. length:
            tokens each.
        ranks: processes that share the rows. here: how many of them are on this machine.
        device: which computes, a CPU in float32, another in ``dtype``. dtype: of the checkpoint.
    """
    linears, rest, outside, tied_head, _ = _skeleton(config)
    head = tied_head if any(isinstance(m, QuaRot) and m.residual for m in recipe.methods) else 0
    layer = Layer(linears, rest, outside + head, config.hidden_size, config.vocab_size)
    shared = Rows(rows, length, dtype.itemsize, _compute(device, dtype).itemsize, ranks)
    return needs(layer, shared, recipe, PROCESS if device.type == "cpu" else 0, here)


def _compute(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of forward passes: float32 on a CPU, the checkpoint's elsewhere."""
    return torch.float32 if device.type == "cpu" else dtype


def _extras(recipe: Recipe, names: Mapping[str, tuple[int, int]]) -> int:
    """Bytes of CLAQ's wider columns, their larger books and permutation, and of its outliers with
    their indices.
    """
    method = next((m for m in recipe.methods if isinstance(m, CLAQ)), None)
    if method is None:
        return 0
    total = 0.0
    for name, (rows, width) in names.items():
        bits = recipe.grid_of(name).bits
        share = method.adaptive_bits / max(1, method.upper - bits)
        total += (
            method.adaptive_bits * rows * width / 8
            + share * width * 2 * ((1 << method.upper) - (1 << bits))
            + (2 * width if share else 0)
        )
        total += method.outlier_rate * rows * width * 4 + (4 * rows if method.outlier_bits else 0)
    return round(total)


def _dtype(config: Any) -> torch.dtype:
    said = getattr(config, "dtype", None)
    return said if isinstance(said, torch.dtype) else torch.bfloat16
