"""Options of the commands that make something, as types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import BOS
from .numbers import real, whole
from .places import json_file, out_folder

# --- of quantize ----------------------------------------------------------------------------------

Artifact = Annotated[
    Path,
    typer.Option(
        "-o",
        "--output",
        help=(
            "Artifact folder, new or empty; it is made in OUT.partial, or in OUT/.partial if OUT "
            "exists (a mount point, the current directory)."
        ),
    ),
]
Recipe = Annotated[
    str,
    typer.Option(
        help=(
            "A named recipe (README lists them), names joined by + (smoothquant+gptq), or a .toml "
            "file."
        )
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one option of the recipe: tesseraq.iters=100. Repeatable."),
]
Bits = Annotated[
    str | None,
    typer.Option(
        "--bits",
        help=(
            "Bits of single linears: 'mlp.down_proj=4,layers.0.*=8' (patterns of the ends of "
            "their names; the last that matches counts), or a .json file, such as an artifact's "
            "choice.json."
        ),
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        help=(
            "Calibration rows; exactly as many or an error. Default: the recipe's, 512 for best "
            "and for those with 'tesseraq-best' or 'tesseraq-paper' in their name, else 128."
        ),
        callback=whole(),
    ),
]
RowLength = Annotated[
    int | None,
    typer.Option(
        help=(
            "Tokens per row. Default: the recipe's 2048, or the model's context if that is shorter."
        ),
        callback=whole(2),
    ),
]
Bos = Annotated[str | None, typer.Option(help=f"{BOS} Default: the recipe's, auto.")]
OffloadDir = Annotated[
    Path | None,
    typer.Option(
        "--offload-dir",
        help="Folder for activations on disk. Default: that of the unfinished artifact.",
        show_default=False,
    ),
]
Plain = Annotated[
    bool,
    typer.Option(
        "--plain",
        help=(
            "Refuse what only this library could load: online rotations, quantized keys and "
            "values, most quantized activations."
        ),
    ),
]

# --- of plan --------------------------------------------------------------------------------------

PlannedModel = Annotated[
    str,
    typer.Argument(
        help="Model folder, a config.json, a GGUF file, or hub id; weights are not needed."
    ),
]
PlannedRecipe = Annotated[str, typer.Option(help="Recipe whose cost to estimate.")]
PlannedSettings = Annotated[
    list[str] | None, typer.Option("--set", help="Change one option of the recipe.")
]
PlannedSamples = Annotated[
    int | None, typer.Option(help="Calibration rows; default: the recipe's.", callback=whole())
]
PlannedLength = Annotated[
    int | None,
    typer.Option(
        help="Tokens per row; default: the recipe's, or the model's context if that is shorter.",
        callback=whole(2),
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        help=(
            "Runtime that is to load the result: vllm, sglang, llama.cpp, mlx or transformers. "
            "What it will not load is refused."
        )
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        help="Devices among which vLLM or SGLang will divide every linear.", callback=whole()
    ),
]
GpuMemory = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory",
        help="Plan for a GPU with so many GiB free, which need not be here, instead of --device.",
        callback=real(0.001, 1e6, "of GiB"),
    ),
]
PlannedRanks = Annotated[
    int,
    typer.Option(
        help=(
            "Processes that will share the run on this machine, as torchrun --nproc-per-node "
            "starts them."
        ),
        callback=whole(),
    ),
]
PlannedFolder = Annotated[
    Path | None,
    typer.Option(
        "--offload-dir",
        help="Folder for activations on disk. Default: this one.",
        show_default=False,
        callback=out_folder,
    ),
]
Graph = Annotated[
    bool,
    typer.Option(
        "--graph",
        help=(
            "First print what was found in the blocks: who reads what, made by which norm or "
            "linear, what is folded, rotated or kept."
        ),
    ),
]
PlanJson = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the plan as JSON.", callback=json_file),
]
