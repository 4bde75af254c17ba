"""Commands that make something: an artifact, its plan, its copy for another runtime, the demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..console import Console, Table
from ..errors import LowbitError
from .app import Calib, Device, Offload, OwnScheme, Python, Scheme, Seed, app, out, reported
from .numbers import real, whole
from .places import json_file, out_folder, write_json
from .sentences import complain

if TYPE_CHECKING:
    from ..plan.memory import FreeMemory


@app.command()
@reported
def quantize(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help=(
                "Artifact folder, new or empty; it is made in OUT.partial, or in OUT/.partial if "
                "OUT exists (a mount point, the current directory)."
            ),
        ),
    ],
    scheme: OwnScheme = None,
    recipe: Annotated[
        str,
        typer.Option(
            help=(
                "A named recipe (README lists them), names joined by + (smoothquant+gptq), or a "
                ".toml file."
            )
        ),
    ] = "tesseraq",
    set_: Annotated[
        Optional[list[str]],
        typer.Option(
            "--set", help="Change one option of the recipe: tesseraq.iters=100. Repeatable."
        ),
    ] = None,
    calib: Calib = None,
    samples: Annotated[
        Optional[int],
        typer.Option(
            help=(
                "Calibration rows; exactly as many or an error. Default: the recipe's, 512 for "
                "best and for those with 'tesseraq-best' or 'tesseraq-paper' in their name, else "
                "128."
            ),
            callback=whole(),
        ),
    ] = None,
    length: Annotated[
        Optional[int],
        typer.Option(
            help=(
                "Tokens per row. Default: the recipe's 2048, or the model's context if that is "
                "shorter."
            ),
            callback=whole(2),
        ),
    ] = None,
    seed: Seed = 0,
    offload: Offload = "auto",
    offload_dir: Annotated[
        Optional[Path],
        typer.Option(
            "--offload-dir",
            help="Folder for activations on disk. Default: that of the unfinished artifact.",
            show_default=False,
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help=(
                "Refuse what only this library could load: online rotations, quantized keys and "
                "values, most quantized activations."
            ),
        ),
    ] = False,
    device: Device = "auto",
) -> None:
    """Quantize a model into a verified artifact. Repeating an interrupted command continues it.

    On several GPUs: torchrun --nproc-per-node N -m lowbit quantize ...
    """
    from ..run.launch import joined
    from ..run.quantize import quantize as job
    from .display import Progress, summary

    with (
        joined(device, complain) as ranks,
        Progress(out if ranks.first else Console(quiet=True)) as progress,
    ):
        result = job(
            model,
            scheme,
            recipe,
            out=output,
            calib=calib,
            samples=samples,
            length=length,
            seed=seed,
            device=device,
            settings=set_ or [],
            plain=plain,
            offload=offload,
            offload_dir=offload_dir,
            progress=progress,
            watch=progress.working,
            ranks=ranks,
        )
    if ranks.first:
        out.print(summary(result))


@app.command()
@reported
def plan(
    model: Annotated[
        str, typer.Argument(help="Model folder, a config.json, or hub id; weights are not needed.")
    ],
    scheme: OwnScheme = None,
    recipe: Annotated[str, typer.Option(help="Recipe whose cost to estimate.")] = "tesseraq",
    set_: Annotated[
        Optional[list[str]], typer.Option("--set", help="Change one option of the recipe.")
    ] = None,
    samples: Annotated[
        Optional[int],
        typer.Option(help="Calibration rows; default: the recipe's.", callback=whole()),
    ] = None,
    length: Annotated[
        Optional[int],
        typer.Option(
            help="Tokens per row; default: the recipe's, or the model's context if that is "
            "shorter.",
            callback=whole(2),
        ),
    ] = None,
    target: Annotated[
        Optional[str],
        typer.Option(
            help=(
                "Runtime that is to load the result: vllm, sglang, llama.cpp, mlx or transformers. "
                "What it will not load is refused."
            )
        ),
    ] = None,
    tensor_parallel: Annotated[
        int,
        typer.Option(
            help="Devices among which vLLM or SGLang will divide every linear.", callback=whole()
        ),
    ] = 1,
    device: Device = "auto",
    gpu_memory: Annotated[
        Optional[float],
        typer.Option(
            "--gpu-memory",
            help=(
                "Plan for a GPU with so many GiB free, which need not be here, instead of --device."
            ),
            callback=real(0.001, 1e6, "of GiB"),
        ),
    ] = None,
    ranks: Annotated[
        int,
        typer.Option(
            help=(
                "Processes that will share the run on this machine, as torchrun --nproc-per-node "
                "starts them."
            ),
            callback=whole(),
        ),
    ] = 1,
    offload: Offload = "auto",
    offload_dir: Annotated[
        Optional[Path],
        typer.Option(
            "--offload-dir",
            help="Folder for activations on disk. Default: this one.",
            show_default=False,
            callback=out_folder,
        ),
    ] = None,
    json_: Annotated[
        Optional[Path],
        typer.Option("--json", help="Also write the plan as JSON.", callback=json_file),
    ] = None,
) -> None:
    """Say before any work what a run will need, which runtimes will load its result, and how to
    export it for them.
    """
    import torch

    from ..grid.names import parse_scheme
    from ..machine import pick_device
    from ..plan import calibration_of, make_plan, read_config
    from ..plan.speed import measure_speed
    from ..plan.targets import check_target, demand
    from ..recipe.presets import load_recipe
    from .display import plan_rows, runtime_table, runtimes_table

    if gpu_memory is not None and device != "auto":
        raise LowbitError(
            "--gpu-memory plans for a GPU that is not here, --device for one that is: give one of "
            "them."
        )
    wanted = None if target is None else check_target(target, tensor_parallel)
    own = None if scheme is None else parse_scheme(scheme)
    chosen, config = load_recipe(recipe, scheme=own, settings=set_ or []), read_config(model)
    c = calibration_of(chosen.calibration, config, None, samples, length)
    where = pick_device(device) if gpu_memory is None else torch.device("cuda")
    speed = measure_speed(where) if gpu_memory is None else None
    p = make_plan(
        config,
        chosen,
        c.samples,
        c.length,
        tensor_parallel=tensor_parallel,
        device=where,
        ranks=ranks,
    )
    if wanted is not None:
        demand(p.verdict(wanted))
    folder, free = offload_dir or Path.cwd(), _free(gpu_memory)
    table = Table(show_header=False)
    for row in plan_rows(p, speed, offload, folder, free):
        table.add_row(*row)
    out.print(table)
    out.print(runtimes_table(p.runtimes) if wanted is None else runtime_table(p.verdict(wanted)))
    if json_:
        said = {"target": wanted, "tensor_parallel": tensor_parallel}
        write_json(json_, {**p.as_dict(speed), **said})
    p.memory.check(where, free)
    if gpu_memory is None:  # else it is not this machine's memory and disk that count
        p.memory.placed(offload, where, folder, free)


def _free(gpu_memory: float | None) -> FreeMemory | None:
    """How much memory a device has free, where a GPU is planned for that is not here."""
    from ..machine import free_memory

    if gpu_memory is None:
        return None
    return lambda d: free_memory(d) if d.type == "cpu" else int(gpu_memory * 2**30)


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
        Optional[str],
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
