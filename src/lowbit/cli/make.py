"""Commands that make something: an artifact, its plan, its copy for another runtime, the demo."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import Console
from . import making, options
from .app import Calib, Device, Dtype, Offload, OwnScheme, Python, Scheme, Seed, app, out, reported
from .sentences import complain

if TYPE_CHECKING:
    from ..run.asked import Result


@app.command()
@reported
def quantize(
    model: options.Model,
    output: making.Artifact,
    scheme: OwnScheme = None,
    recipe: making.Recipe = "tesseraq",
    bits: making.Bits = None,
    set_: making.Settings = None,
    calib: Calib = None,
    samples: making.Samples = None,
    length: making.RowLength = None,
    bos: making.Bos = None,
    seed: Seed = 0,
    offload: Offload = "auto",
    offload_dir: making.OffloadDir = None,
    plain: making.Plain = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Quantize a model into a verified artifact. Repeating an interrupted command continues it.

    On several GPUs: torchrun --nproc-per-node N -m lowbit quantize ...
    """
    from ..run.quantize import quantize as run

    _carried_out(
        partial(
            run,
            model,
            scheme,
            recipe,
            out=output,
            calib=calib,
            samples=samples,
            length=length,
            bos=bos,
            seed=seed,
            device=device,
            dtype=dtype,
            settings=set_ or [],
            bits=bits,
            plain=plain,
            offload=offload,
            offload_dir=offload_dir,
        ),
        device,
    )


def _carried_out(run: Callable[..., Result], device: str) -> None:
    """Do a run with the processes that share it, show how far it is, and what came of it."""
    from ..run.launch import joined
    from .display import Progress, summary

    with (
        joined(device, complain) as ranks,
        Progress(out if ranks.first else Console(quiet=True)) as progress,
    ):
        result = run(progress=progress, watch=progress.working, ranks=ranks)
    if ranks.first:
        out.print(summary(result))


@app.command()
@reported
def refine(
    folder: Annotated[Path, typer.Argument(help="Artifact folder, as quantize wrote it.")],
    output: making.Artifact,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The model that the artifact was made of, if it lies elsewhere than then."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one option: polish.tokens=262144. Repeatable."),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(help="The artifact's calibration text, if it lies elsewhere than then."),
    ] = None,
    offload: Offload = "auto",
    offload_dir: making.OffloadDir = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Polish an artifact: train what its codes leave free on the divergence from the model it was
    made of. Same codes, same bytes; what '+polish' behind its recipe would have made.
    """
    from ..run.refining import refine as run

    _carried_out(
        partial(
            run,
            folder,
            teacher,
            out=output,
            settings=set_ or [],
            calib=calib,
            device=device,
            dtype=dtype,
            offload=offload,
            offload_dir=offload_dir,
        ),
        device,
    )


@app.command()
@reported
def plan(
    model: making.PlannedModel,
    scheme: OwnScheme = None,
    recipe: making.PlannedRecipe = "tesseraq",
    bits: making.Bits = None,
    set_: making.PlannedSettings = None,
    samples: making.PlannedSamples = None,
    length: making.PlannedLength = None,
    target: making.Target = None,
    tensor_parallel: making.TensorParallel = 1,
    plain: making.Plain = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    gpu_memory: making.GpuMemory = None,
    ranks: making.PlannedRanks = 1,
    offload: Offload = "auto",
    offload_dir: making.PlannedFolder = None,
    graph: making.Graph = False,
    json_: making.PlanJson = None,
) -> None:
    """Say before any work what a run will need, which runtimes will load its result, and how to
    export it for them.
    """
    from .planning import PlanOptions, run_plan

    run_plan(
        PlanOptions(
            model,
            scheme,
            recipe,
            set_ or [],
            samples,
            length,
            target,
            tensor_parallel,
            plain,
            device,
            gpu_memory,
            dtype,
            ranks,
            offload,
            offload_dir or Path.cwd(),
            graph,
            json_,
            bits,
        ),
        out,
    )


@app.command()
@reported
def export(
    folder: Annotated[Path, typer.Argument(help="Artifact folder, as quantize wrote it.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the exported model, new or empty.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help=(
                "compressed-tensors (from the format of lowbit, rotations for vLLM included), gptq "
                "(symmetric), gptq_v2, awq, mlx, gguf (or gguf:TYPE, one of q2_0, q2_k, q3_k, "
                "q4_0, q4_1, q4_k, q6_k, q8_0)."
            )
        ),
    ] = "compressed-tensors",
    embeddings: Annotated[
        str | None,
        typer.Option(
            help=(
                "GGUF: type of embeddings and head: f32, f16, bf16, q8_0, q6_k. Default: their "
                "numbers as they are."
            )
        ),
    ] = None,
    python: Python = sys.executable,
) -> None:
    """Lay the codes of an artifact out for another runtime, unchanged, and prove what was written
    with that runtime if it is there.
    """
    from ..artifact.proof import read_report
    from ..export import export as write
    from ..export.gguf import remarks

    done = write(folder, output, to, embeddings=embeddings, python=python)
    report = read_report(output)
    lines = [
        str(output),
        *(remarks(report) if "gguf" in report else ()),
        f"verified: {done.summary}",
    ]
    out.print("\n".join(lines))


@app.command()
@reported
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the artifacts and the report.")
    ] = Path("demo-out"),
    scheme: Scheme = "W2A16g64",
    device: Device = "auto",
) -> None:
    """Quantize the embedded model to 2 bits with RTN, AWQ and TesseraQ, compare them, write an HTML
    report. Needs no network.
    """
    from ..demo import run_demo

    run_demo(output, scheme, device, out)
