"""The command line. Every command is a thin shell around a function of the library."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from .errors import LowbitError, VerificationError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make large language models small: 2 to 4 bit weights, accuracy kept, artifacts that carry their proof.",
)
out, err = Console(), Console(stderr=True)

Calib = Annotated[Optional[str], typer.Option(help="Calibration text: stdlib (this Python's own sources), a .txt/.json/.jsonl file, a folder or hub dataset, or wikitext2, c4, pile-val. Default: the recipe's, which is stdlib in all but the -paper ones.")]  # fmt: skip
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, xpu.")]
Python = Annotated[str, typer.Option(help="Interpreter that has the runtime, if this one has not: gptqmodel and optimum for GPTQ and AWQ, mlx-lm for MLX.", show_default=False)]
_SCHEME = "W<bits>A<bits>[KV<bits>][g<group size>][sym], for example W2A16g64, W4A4 or W4A8KV4; without g one scale per output channel."
Scheme = Annotated[str, typer.Option(help=_SCHEME)]
OwnScheme = Annotated[Optional[str], typer.Option(help=_SCHEME + " Default: the recipe's, W4A16g128 if it has none.")]


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Print our errors as the one or two sentences they are; 2 for bad input, 1 for a failed verification."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        _quiet()
        try:
            command(*args, **kwargs)
        except VerificationError as e:
            err.print(f"verification failed: {e}", style="red", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from e
        except LowbitError as e:
            err.print(f"error: {e}", style="red", highlight=False, soft_wrap=True, markup=False)
            raise typer.Exit(2) from e

    return run


def _quiet() -> None:
    """Keep the libraries' own progress bars and advice out of our output."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@app.command()
@_reported
def quantize(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Artifact folder; OUT.partial while it is being made.")],
    scheme: OwnScheme = None,
    recipe: Annotated[str, typer.Option(help="A named recipe (README lists them), names joined by + (smoothquant+gptq), or a .toml file.")] = "tesseraq",
    set_: Annotated[Optional[list[str]], typer.Option("--set", help="Change one option of the recipe: tesseraq.iters=100. Repeatable.")] = None,
    calib: Calib = None,
    samples: Annotated[Optional[int], typer.Option(help="Calibration rows; exactly as many or an error. Default: the recipe's, which is 128 in all but tesseraq-best and tesseraq-paper (512).")] = None,
    length: Annotated[Optional[int], typer.Option(help="Tokens per row. Default: the recipe's 2048, or the model's context if that is shorter.")] = None,
    seed: Annotated[int, typer.Option(help="For everything random. Same seed, same machine: same bytes.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Refuse what only this library could load: online rotations, quantized keys and values, most quantized activations.")] = False,
    device: Device = "auto",
) -> None:
    """Quantize a model into a verified artifact. Repeating an interrupted command continues it."""
    from .display import Progress, summary
    from .job import quantize as job

    with Progress(out) as progress:
        result = job(
            model, scheme, recipe, out=output, calib=calib, samples=samples, length=length, seed=seed, device=device,
            settings=set_ or [], plain=plain, progress=progress, watch=progress.working,
        )  # fmt: skip
    out.print(summary(result), highlight=False, soft_wrap=True)


@app.command()
@_reported
def plan(
    model: Annotated[str, typer.Argument(help="Model folder, a config.json, or hub id; weights are not needed.")],
    scheme: OwnScheme = None,
    recipe: Annotated[str, typer.Option(help="Recipe whose cost to estimate.")] = "tesseraq",
    set_: Annotated[Optional[list[str]], typer.Option("--set", help="Change one option of the recipe.")] = None,
    samples: Annotated[Optional[int], typer.Option(help="Calibration rows; default: the recipe's.")] = None,
    length: Annotated[Optional[int], typer.Option(help="Tokens per row; default: the recipe's, or the model's context if that is shorter.")] = None,
    device: Device = "auto",
    json_: Annotated[Optional[Path], typer.Option("--json", help="Also write the plan as JSON.")] = None,
) -> None:
    """Say before any work what a run will need and which runtimes will load its result."""
    from .display import duration
    from .machine import pick_device
    from .model.calibration import Calibration
    from .plan import make_plan, measure_rate, read_config
    from .presets import load_recipe
    from .scheme import parse_scheme

    chosen = load_recipe(recipe, scheme=None if scheme is None else parse_scheme(scheme), settings=set_ or [])
    config = read_config(model)
    own = chosen.calibration
    c = Calibration(own.source, own.samples if samples is None else samples, own.length if length is None else length)
    p = make_plan(config, chosen, c.samples, c.length, measure_rate(str(pick_device(device))))
    gib = 2**30
    rows = (
        ("model", f"{p.model_type}, {p.blocks} blocks, {p.parameters / 1e9:.3g} B parameters, {p.quantized / p.parameters:.1%} of them quantized"),
        ("size", f"{p.original / gib:.3g} -> {p.artifact / gib:.3g} GiB ({p.original / 1e9:.3g} -> {p.artifact / 1e9:.3g} GB)"),
        ("bits per weight", f"{p.bits_per_weight:.3f} in quantized linears, {p.model_bits_per_weight:.3f} over all parameters"),
        ("peak memory", f"{p.peak_memory / gib:.3g} GiB: block {p.block_memory / gib:.3g} (embeddings {p.outer_memory / gib:.3g}), activations {p.activations / gib:.3g}"),
        ("disk", f"{p.artifact / gib:.3g} GiB"),
        ("time", f"about {duration(p.seconds or 0)} with recipe '{chosen.name}' at this machine's measured matrix product rate (an estimate)"),
    )  # fmt: skip
    table = Table(show_header=False)
    for row in rows:
        table.add_row(*row)
    out.print(table)
    who = Table("runtime", "verdict", "why")
    for r in p.runtimes:
        who.add_row(r.name, r.verdict, r.reason)
    out.print(who)
    if json_:
        _write_json(json_, p.as_dict())


@app.command(name="eval")
@_reported
def eval_(
    model: Annotated[str, typer.Argument(help="Model or artifact: folder or hub id.")],
    text: Annotated[Optional[str], typer.Option(help="Text for perplexity: stdlib (its held-out side), a file, a folder or hub dataset, or wikitext2, c4. Default: stdlib, or no text if there are --tasks.")] = None,
    length: Annotated[Optional[int], typer.Option(help="Window length; default 2048 or the model's context if shorter.")] = None,
    windows: Annotated[Optional[int], typer.Option(help="Use only the first so many windows.")] = None,
    reference: Annotated[Optional[str], typer.Option(help="Also measure mean KL and top-1 agreement to this model, on the text.")] = None,
    tasks: Annotated[Optional[str], typer.Option(help="Accuracy on lm-eval's tasks, with commas: piqa,arc_easy,arc_challenge,hellaswag,winogrande,mmlu. Needs pip install 'lowbit[eval]'.")] = None,
    shots: Annotated[Optional[int], typer.Option(help="Worked examples in each prompt of --tasks; default: none, unless the task says so.")] = None,
    limit: Annotated[Optional[int], typer.Option(help="Only the first so many examples of each task.")] = None,
    task_data: Annotated[Optional[Path], typer.Option(help="Folder of JSONL files for --tasks, in place of the Hugging Face hub; docs/evaluation.md has the form.")] = None,
    batch: Annotated[Optional[int], typer.Option(help="Prompts of --tasks a forward pass; default 8.")] = None,
    integers: Annotated[bool, typer.Option("--integers", help="Compute an artifact's linears in integers, where its activations are quantized.")] = False,
    dtype: Annotated[str, typer.Option(help="auto (float32 on a CPU, else the model's), float32, bfloat16, float16.")] = "auto",
    device: Device = "auto",
    json_: Annotated[Optional[Path], typer.Option("--json", help="Write perplexity, nll, tokens, windows, length, kl, top1 here, and tasks.")] = None,
) -> None:
    """Perplexity on non-overlapping windows, as the papers compute it; with --reference also KL and top-1 agreement; with --tasks accuracy."""
    from .display import windows_bar
    from .evaluate import evaluate, load_causal_lm
    from .integers import in_integers
    from .machine import pick_device
    from .model.calibration import evaluation_windows
    from .model.checkpoint import Checkpoint
    from .model.stream import load_config, load_tokenizer
    from .tasks import evaluate_tasks, prepare
    from .tasks.show import notes, rows_bar, table

    for name, given, needs, there in (
        *(("--" + n, v, "--tasks", tasks) for n, v in (("shots", shots), ("limit", limit), ("task-data", task_data), ("batch", batch))),
        *(("--" + n, v, "--text", text or not tasks) for n, v in (("length", length), ("windows", windows), ("reference", reference))),
    ):
        if given is not None and not there:
            raise LowbitError(f"{name} has no effect without {needs}. Give both or neither.")
    if text is None and tasks is None:
        text = "stdlib"
    where = str(pick_device(device))
    checkpoint = Checkpoint(model)
    context = getattr(load_config(checkpoint), "max_position_embeddings", None) or 2048
    if length is not None and length > context:
        raise LowbitError(f"--length {length} is beyond the model's context of {context} tokens.")
    tokenizer = load_tokenizer(checkpoint)
    ids = evaluation_windows(text, tokenizer, length or min(2048, context), windows) if text is not None else None
    if tasks is not None:
        with out.status("finding tasks"):
            prepared = prepare(tasks.split(","), shots=shots, limit=limit, folder=task_data)
    loaded = load_causal_lm(model, where, dtype)
    if integers:
        loaded = in_integers(loaded, Path(model))
    data: dict[str, Any] = {}
    if ids is not None:
        other = load_causal_lm(reference, where, dtype) if reference else None
        with windows_bar(out) as tell:
            result = evaluate(loaded, ids, other, progress=tell)
        del other
        line = f"{model} on {text}: perplexity {result.perplexity:.4f} (nll {result.nll:.5f}; {result.windows} windows x {result.length}, {result.tokens} tokens)"
        if result.kl is not None and result.top1 is not None:
            line += f"; to {reference}: KL {result.kl:.5f}, top-1 {result.top1:.2%}"
        out.print(line, highlight=False, soft_wrap=True)
        data = result.as_dict()
    if tasks is not None:
        with rows_bar(out) as tell:
            found = evaluate_tasks(prepared, loaded, tokenizer, limit=limit, batch=8 if batch is None else batch, progress=tell)
        out.print(table(found))
        for note in notes(found):
            out.print(note, highlight=False, soft_wrap=True)
        data["tasks"] = found.as_dict()
    if json_:
        _write_json(json_, data)


@app.command()
@_reported
def generate(
    model: Annotated[str, typer.Argument(help="Model or artifact: folder or hub id.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    integers: Annotated[bool, typer.Option("--integers", help="Compute an artifact's linears in integers, where its activations are quantized.")] = False,
    device: Device = "auto",
) -> None:
    """Continue a text, through plain transformers."""
    from .evaluate import continue_text, load_causal_lm
    from .integers import in_integers
    from .machine import pick_device
    from .model.checkpoint import Checkpoint
    from .model.stream import load_tokenizer

    tokenizer = load_tokenizer(Checkpoint(model))
    loaded = load_causal_lm(model, str(pick_device(device)))
    if integers:
        loaded = in_integers(loaded, Path(model))
    out.print(continue_text(loaded, tokenizer, prompt, tokens, temperature, seed), highlight=False, markup=False, soft_wrap=True)


@app.command()
@_reported
def inspect(folder: Annotated[Path, typer.Argument(help="Artifact folder.")]) -> None:
    """Show an artifact's recipe, its layers, what was skipped and why, and its hashes."""
    from .display import duration, size
    from .proof import read_report

    report = read_report(folder)
    table = Table("linear", "scheme", "shape", "bytes", "bits/weight", "codes not nearest", "error, nearest -> tuned")
    for e in report["linears"]:
        if "skipped" in e:
            table.add_row(e["name"], "skipped", e["skipped"], "", "", "", "")
        else:
            table.add_row(e["name"], e["scheme"], " x ".join(map(str, e["shape"])), size(e["bytes"]), f"{e['bits_per_weight']:.3f}", f"{e['moved']:.1%}",
                          f"{e['error_nearest']:.3g} -> {e['error']:.3g}")
    out.print(table)
    for b in report["blocks"]:
        out.print(f"{b['name']}: loss {b['loss_before']:.4g} -> {b['loss_after']:.4g}, {duration(b['seconds'])}", highlight=False)
    out.print((folder / "recipe.toml").read_text().strip(), highlight=False, markup=False)
    for name, shard in report["shards"].items():
        out.print(f"{name}  {size(shard['bytes'])}  sha256 {shard['sha256']}", highlight=False, soft_wrap=True)
    out.print(f"hash {report['hash']}, made by lowbit {report['lowbit']} from {report['model']}, seed {report['seed']}", highlight=False, soft_wrap=True)


@app.command()
@_reported
def verify(
    folder: Annotated[Path, typer.Argument(help="Artifact folder, also a copy that was moved.")],
    loader: Annotated[bool, typer.Option(help="Also load it with its runtime and compare logits.")] = True,
    python: Python = sys.executable,
) -> None:
    """Compare every tensor and code with what was tuned, and the logits that its runtime computes with the tuned model's."""
    from .proof import verify as check

    out.print(f"verified: {check(folder, loader=loader, python=python).summary}", highlight=False, soft_wrap=True)


@app.command()
@_reported
def analyze(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for analysis.json and analysis.html.")],
    text: Annotated[str, typer.Option(help="Text that passes: stdlib (its held-out side), a file, a folder or hub dataset, wikitext2, c4.")] = "stdlib",
    length: Annotated[Optional[int], typer.Option(help="Window length; default 2048 or the model's context if shorter.")] = None,
    windows: Annotated[Optional[int], typer.Option(help="Use only the first so many windows.")] = None,
    batch: Annotated[int, typer.Option(help="Windows that pass together: over them a channel's maximum is taken with --columns call.")] = 8,
    bits: Annotated[str, typer.Option(help="Widths of the activation grids, with commas.")] = "8,4",
    exponents: Annotated[str, typer.Option(help="CrossQuant's row exponents, with commas.")] = "0.15,0.55",
    columns: Annotated[str, typer.Option(help="Channel maxima over a call or a sequence.")] = "call",
    shares: Annotated[str, typer.Option(help="Shares of non-zero elements to set to zero in the remove-kernel experiment.")] = "0.01,0.02,0.05,0.1,0.2,0.3,0.4,0.5",
    remove: Annotated[bool, typer.Option(help="Run the remove-kernel experiment; its weights are in 8 bits.")] = True,
    device: Device = "auto",
) -> None:
    """Which activations a quantizer turns into zero, outliers of every linear's input, and what zeroing them costs."""
    from .analyze import study, write_analysis
    from .display import analysis_tables, windows_bar
    from .machine import pick_device

    with windows_bar(out) as tell, windows_bar(out, "runs") as removing:
        data = study(
            model, text, length=length, windows=windows, batch=batch, bits=_numbers(bits, int, "--bits"), columns=columns,
            exponents=_numbers(exponents, float, "--exponents"), shares=_numbers(shares, float, "--shares") if remove else None,
            device=str(pick_device(device)), progress=tell, removing=removing,
        )  # fmt: skip
    for table in analysis_tables(data):
        out.print(table)
    out.print(f"{write_analysis(output, data)}, analysis.json", highlight=False, soft_wrap=True)


def _numbers(text: str, kind: type[Any], option: str) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as e:
        raise LowbitError(f"{option} takes numbers with commas, got '{text}'.") from e
    if not found and option != "--exponents":
        raise LowbitError(f"{option} is empty.")
    return found


@app.command()
@_reported
def export(
    folder: Annotated[Path, typer.Argument(help="Artifact folder, as quantize wrote it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the exported model.")],
    to: Annotated[str, typer.Option(help="compressed-tensors (from the format of lowbit, rotations for vLLM included), gptq (symmetric), gptq_v2, awq, mlx.")] = "compressed-tensors",
    python: Python = sys.executable,
) -> None:
    """Lay the codes of an artifact out for another runtime, unchanged, and prove what was written with that runtime if it is there."""
    from .export import export as write

    out.print(f"{output}\nverified: {write(folder, output, to, python=python).summary}", highlight=False, soft_wrap=True)


@app.command()
@_reported
def compare(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    schemes: Annotated[str, typer.Option(help="With commas: W2A16g64,W3A16g64,W4A4,W4A8KV4.")],
    recipes: Annotated[str, typer.Option(help="With commas: rtn,awq,gptq,omniquant,tesseraq; parts are joined by +, as in smoothquant+gptq.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for cells and reports; a repeated command goes on from it.")],
    calib: Annotated[str, typer.Option(help="Calibration text of every recipe: stdlib, a file, a folder or hub dataset, wikitext2, c4, pile-val.")] = "stdlib",
    samples: Annotated[int, typer.Option(help="Calibration rows.")] = 128,
    length: Annotated[Optional[int], typer.Option(help="Tokens a calibration row; default 2048 or the model's context.")] = None,
    text: Annotated[str, typer.Option(help="Evaluation text: stdlib (its held-out side), a file, a folder or hub dataset, wikitext2, c4.")] = "stdlib",
    eval_length: Annotated[Optional[int], typer.Option(help="Tokens an evaluation window; default 2048 or the model's context.")] = None,
    windows: Annotated[Optional[int], typer.Option(help="Only the first so many evaluation windows.")] = None,
    tasks: Annotated[Optional[str], typer.Option(help="lm-eval tasks, with commas.")] = None,
    task_data: Annotated[Optional[Path], typer.Option(help="Folder of JSONL files for --tasks.")] = None,
    limit: Annotated[Optional[int], typer.Option(help="Only the first so many examples of each task.")] = None,
    set_: Annotated[Optional[list[str]], typer.Option("--set", help="METHOD.OPTION=VALUE for every recipe that has the method; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    keep: Annotated[bool, typer.Option(help="Keep the artifacts, in OUTPUT/artifacts.")] = False,
    device: Device = "auto",
) -> None:
    """Every recipe with every scheme on the same calibration tokens, seed and evaluation: table, Markdown, CSV, JSON, HTML with plots."""
    from .compare import Cell, Comparison, Terms, cells, fitting_length
    from .display import Progress, comparison_table
    from .model.calibration import Calibration
    from .report import write_comparison

    for name, given in (("--task-data", task_data), ("--limit", limit)):
        if given is not None and not tasks:
            raise LowbitError(f"{name} has no effect without --tasks. Give both or neither.")
    wanted = cells(_names(schemes), _names(recipes), set_ or [])
    terms = Terms(
        model, Calibration(calib, samples, fitting_length(model, length, "--length")), text, fitting_length(model, eval_length, "--eval-length"),
        windows, tuple(_names(tasks or "")), None if task_data is None else str(task_data), limit, seed, device, tuple(set_ or ()),
    )  # fmt: skip

    def show(cell: Cell) -> Progress:
        out.print(f"\n{cell.recipe}, {cell.scheme}", highlight=False)
        return Progress(out)

    comparison = Comparison(terms, output, keep)
    rows = []
    for row in comparison.run(wanted, show):
        rows.append(row)
        if "error" in row:
            out.print(f"failed: {row['recipe']}, {row['scheme']}: {row['error']}", highlight=False, markup=False, soft_wrap=True)
        title = (
            f"{model}; calibration {calib}, {samples} x {terms.calibration.length} tokens, seed {seed}; "
            f"evaluation {text}, windows of {terms.length} tokens"
        )
        write_comparison(output, rows, title)
    out.print(comparison_table(rows, title))
    out.print(f"{output / 'report.html'}, comparison.md, comparison.csv, comparison.json", highlight=False, soft_wrap=True)
    if any("error" in row for row in rows):
        raise typer.Exit(1)


def _names(given: str) -> list[str]:
    return [n.strip() for n in given.split(",") if n.strip()]


@app.command()
@_reported
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the artifacts and the report.")] = Path("demo-out"),
    scheme: Scheme = "W2A16g64",
    device: Device = "auto",
) -> None:
    """Quantize the embedded model to 2 bits with RTN, AWQ and TesseraQ, compare them, write an HTML report. Needs no network."""
    from .demo import run_demo

    run_demo(output, scheme, device, out)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    from .artifact import write_atomic

    write_atomic(path, (json.dumps(data, indent=1) + "\n").encode())


def main() -> None:
    """Entry point of the `lowbit` command and of `python -m lowbit`."""
    try:
        app()
    except KeyboardInterrupt:
        err.print("interrupted; the same command continues from the last finished block.")
        sys.exit(130)
