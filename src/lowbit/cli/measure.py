"""Commands that measure what a model is worth: text, tasks, and recipes against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import LowbitError
from . import numbers
from .app import Device, Seed, app, out, reported
from .numbers import real, whole
from .places import json_file, write_json


@app.command(name="eval")
@reported
def eval_(
    model: Annotated[str, typer.Argument(help="Model or artifact: folder or hub id.")],
    text: Annotated[
        Optional[str],
        typer.Option(
            help=(
                "Text for perplexity: stdlib (its held-out side), a file, a folder or hub dataset, "
                "or wikitext2, c4. Default: stdlib, or no text if there are --tasks."
            )
        ),
    ] = None,
    length: Annotated[
        Optional[int],
        typer.Option(
            help="Window length; default 2048 or the model's context if shorter.", callback=whole(2)
        ),
    ] = None,
    windows: Annotated[
        Optional[int], typer.Option(help="Use only the first so many windows.", callback=whole())
    ] = None,
    reference: Annotated[
        Optional[str],
        typer.Option(help="Also measure mean KL and top-1 agreement to this model, on the text."),
    ] = None,
    tasks: Annotated[
        Optional[str],
        typer.Option(
            help=(
                "Accuracy on lm-eval's tasks, with commas: "
                "piqa,arc_easy,arc_challenge,hellaswag,winogrande,mmlu. Needs pip install "
                "'lowbit[eval]'."
            )
        ),
    ] = None,
    shots: Annotated[
        Optional[int],
        typer.Option(
            help=(
                "Worked examples in each prompt of --tasks; default: none, unless the task says so."
            ),
            callback=whole(0),
        ),
    ] = None,
    limit: Annotated[
        Optional[int],
        typer.Option(help="Only the first so many examples of each task.", callback=whole()),
    ] = None,
    task_data: Annotated[
        Optional[Path],
        typer.Option(
            help=(
                "Folder of JSONL files for --tasks, in place of the Hugging Face hub; "
                "docs/evaluation.md has the form."
            )
        ),
    ] = None,
    batch: Annotated[
        Optional[int],
        typer.Option(help="Prompts of --tasks a forward pass; default 8.", callback=whole()),
    ] = None,
    integers: Annotated[
        bool,
        typer.Option(
            "--integers",
            help="Compute an artifact's linears in integers, where its activations are quantized.",
        ),
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(help="auto (float32 on a CPU, else the model's), float32, bfloat16, float16."),
    ] = "auto",
    device: Device = "auto",
    json_: Annotated[
        Optional[Path],
        typer.Option(
            "--json",
            help=(
                "Write perplexity, nll, tokens, windows, length, batch (windows in one pass), kl, "
                "top1 here, and tasks."
            ),
            callback=json_file,
        ),
    ] = None,
) -> None:
    """Perplexity on non-overlapping windows, as the papers compute it; with --reference also KL and
    top-1 agreement; with --tasks accuracy.
    """
    from ..display import windows_bar
    from ..evaluate import evaluate, load_causal_lm, together
    from ..machine import pick_device
    from ..model.calibration import evaluation_windows
    from ..model.checkpoint import Checkpoint
    from ..model.stream import load_config, load_tokenizer
    from ..runtime.integers import in_integers
    from ..tasks import evaluate_tasks, prepare
    from ..tasks.show import notes, rows_bar, table

    for name, given, needs, there in (
        *(
            ("--" + n, v, "--tasks", tasks)
            for n, v in (
                ("shots", shots),
                ("limit", limit),
                ("task-data", task_data),
                ("batch", batch),
            )
        ),
        *(
            ("--" + n, v, "--text", text or not tasks)
            for n, v in (("length", length), ("windows", windows), ("reference", reference))
        ),
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
    ids = (
        evaluation_windows(text, tokenizer, length or min(2048, context), windows)
        if text is not None
        else None
    )
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
        line = (
            f"{model} on {text}: perplexity {result.perplexity:.4f} (nll {result.nll:.5f}; "
            f"{result.windows} windows x {result.length}, {result.tokens} tokens, "
            f"{together(result.batch)})"
        )
        if result.kl is not None and result.top1 is not None:
            line += f"; to {reference}: KL {result.kl:.5f}, top-1 {result.top1:.2%}"
        out.print(line)
        data = result.as_dict()
    if tasks is not None:
        with rows_bar(out) as tell:
            found = evaluate_tasks(
                prepared,
                loaded,
                tokenizer,
                limit=limit,
                batch=8 if batch is None else batch,
                progress=tell,
            )
        out.print(table(found))
        for note in notes(found):
            out.print(note)
        data["tasks"] = found.as_dict()
    if json_:
        write_json(json_, data)


@app.command()
@reported
def generate(
    model: Annotated[str, typer.Argument(help="Model or artifact: folder or hub id.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(help="At most so many new tokens.", callback=whole())] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 is greedy.", callback=real(1e-4, 1e4, zero=True))
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="For sampling.", callback=numbers.seed)] = 0,
    integers: Annotated[
        bool,
        typer.Option(
            "--integers",
            help="Compute an artifact's linears in integers, where its activations are quantized.",
        ),
    ] = False,
    device: Device = "auto",
) -> None:
    """Continue a text, through plain transformers."""
    from ..evaluate import continue_text, load_causal_lm
    from ..machine import pick_device
    from ..model.checkpoint import Checkpoint
    from ..model.stream import load_tokenizer
    from ..runtime.integers import in_integers

    tokenizer = load_tokenizer(Checkpoint(model))
    loaded = load_causal_lm(model, str(pick_device(device)))
    if integers:
        loaded = in_integers(loaded, Path(model))
    out.print(continue_text(loaded, tokenizer, prompt, tokens, temperature, seed))


@app.command()
@reported
def compare(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    schemes: Annotated[str, typer.Option(help="With commas: W2A16g64,W3A16g64,W4A4,W4A8KV4.")],
    recipes: Annotated[
        str,
        typer.Option(
            help=(
                "With commas: rtn,awq,gptq,omniquant,tesseraq; parts are joined by +, as in "
                "smoothquant+gptq."
            )
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="Folder for cells and reports; a repeated command goes on from it.",
        ),
    ],
    calib: Annotated[
        str,
        typer.Option(
            help=(
                "Calibration text of every recipe: stdlib, a file, a folder or hub dataset, "
                "wikitext2, c4, pile-val."
            )
        ),
    ] = "stdlib",
    samples: Annotated[int, typer.Option(help="Calibration rows.", callback=whole())] = 128,
    length: Annotated[
        Optional[int],
        typer.Option(
            help="Tokens a calibration row; default 2048 or the model's context.", callback=whole(2)
        ),
    ] = None,
    text: Annotated[
        str,
        typer.Option(
            help=(
                "Evaluation text: stdlib (its held-out side), a file, a folder or hub dataset, "
                "wikitext2, c4."
            )
        ),
    ] = "stdlib",
    eval_length: Annotated[
        Optional[int],
        typer.Option(
            help="Tokens an evaluation window; default 2048 or the model's context.",
            callback=whole(2),
        ),
    ] = None,
    windows: Annotated[
        Optional[int],
        typer.Option(help="Only the first so many evaluation windows.", callback=whole()),
    ] = None,
    tasks: Annotated[Optional[str], typer.Option(help="lm-eval tasks, with commas.")] = None,
    task_data: Annotated[
        Optional[Path], typer.Option(help="Folder of JSONL files for --tasks.")
    ] = None,
    limit: Annotated[
        Optional[int],
        typer.Option(help="Only the first so many examples of each task.", callback=whole()),
    ] = None,
    set_: Annotated[
        Optional[list[str]],
        typer.Option(
            "--set", help="METHOD.OPTION=VALUE for every recipe that has the method; repeatable."
        ),
    ] = None,
    seed: Seed = 0,
    keep: Annotated[bool, typer.Option(help="Keep the artifacts, in OUTPUT/artifacts.")] = False,
    device: Device = "auto",
) -> None:
    """Every recipe with every scheme on the same calibration tokens, seed and evaluation: table,
    Markdown, CSV, JSON, HTML with plots.
    """
    from ..compare import Cell, Terms, cells, fitting_length, opened
    from ..disk import disk
    from ..display import Progress, comparison_table
    from ..evaluate import together
    from ..model.calibration import Calibration
    from ..report import write_comparison

    for name, given in (("--task-data", task_data), ("--limit", limit)):
        if given is not None and not tasks:
            raise LowbitError(f"{name} has no effect without --tasks. Give both or neither.")
    wanted = cells(_names(schemes), _names(recipes), set_ or [])
    terms = Terms(
        model,
        Calibration(calib, samples, fitting_length(model, length, "--length")),
        text,
        fitting_length(model, eval_length, "--eval-length"),
        windows,
        tuple(_names(tasks or "")),
        None if task_data is None else str(task_data),
        limit,
        seed,
        device,
        tuple(set_ or ()),
    )

    def show(cell: Cell) -> Progress:
        out.print(f"\n{cell.recipe}, {cell.scheme}")
        return Progress(out)

    rows: list[dict[str, Any]] = []
    title = ""
    with opened(terms, output, keep) as comparison:
        for row in comparison.run(wanted, show):
            rows.append(row)
            if "error" in row:
                out.print(f"failed: {row['recipe']}, {row['scheme']}: {row['error']}")
            passes = "".join(
                f", {together(n)}" for n in sorted({r["batch"] for r in rows if "batch" in r})
            )
            title = (
                f"{model}; calibration {calib}, {samples} x {terms.calibration.length} tokens, "
                f"seed {seed}; "
                f"evaluation {text}, windows of {terms.length} tokens{passes}"
            )
            with disk(output):
                write_comparison(output, rows, title)
    out.print(comparison_table(rows, title))
    out.print(f"{output / 'report.html'}, comparison.md, comparison.csv, comparison.json")
    if any("error" in row for row in rows):
        raise typer.Exit(1)


def _names(given: str) -> list[str]:
    return [n.strip() for n in given.split(",") if n.strip()]
