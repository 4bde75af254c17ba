"""Commands that measure what a model is worth: text, tasks, and recipes against each other."""

from __future__ import annotations

from pathlib import Path

import typer

from . import options
from .app import Device, Dtype, Seed, app, out, reported
from .places import write_json


@app.command(name="eval")
@reported
def eval_(
    model: options.ModelOrArtifact,
    text: options.EvalText = None,
    length: options.Length = None,
    windows: options.Windows = None,
    bos: options.Bos = "auto",
    reference: options.Reference = None,
    tasks: options.EvalTasks = None,
    shots: options.Shots = None,
    limit: options.Limit = None,
    task_data: options.EvalTaskData = None,
    batch: options.TaskBatch = None,
    integers: options.Integers = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    load: options.EvalLoad = "auto",
    json_: options.EvalJson = None,
) -> None:
    """Perplexity on non-overlapping windows, as the papers compute it; with --reference also KL and
    top-1 agreement; with --tasks accuracy.
    """
    from .evaluation import EvalOptions, run_eval

    given = EvalOptions(
        model=model,
        text=text,
        length=length,
        windows=windows,
        bos=bos,
        reference=reference,
        tasks=tasks,
        shots=shots,
        limit=limit,
        task_data=task_data,
        batch=batch,
        integers=integers,
        dtype=dtype,
        device=device,
        load=load,
    )
    data = run_eval(given, out)
    if json_:
        write_json(json_, data)


@app.command()
@reported
def generate(
    model: options.ModelOrArtifact,
    prompt: options.Prompt,
    tokens: options.Tokens = 64,
    temperature: options.Temperature = 0.0,
    seed: options.SamplingSeed = 0,
    integers: options.Integers = False,
    device: Device = "auto",
) -> None:
    """Continue a text, through plain transformers."""
    from ..evaluate import continue_text, load_causal_lm
    from ..machine import pick_device
    from ..model.source import open_files
    from ..model.tokenizer import load_tokenizer
    from ..runtime.integers import in_integers

    tokenizer = load_tokenizer(open_files(model))
    loaded = load_causal_lm(model, str(pick_device(device)))
    if integers:
        loaded = in_integers(loaded, Path(model))
    out.print(continue_text(loaded, tokenizer, prompt, tokens, temperature, seed))


@app.command()
@reported
def compare(
    model: options.Model,
    schemes: options.Schemes,
    recipes: options.Recipes,
    output: options.CompareOutput,
    calib: options.CompareCalib = "stdlib",
    samples: options.Samples = 128,
    length: options.CalibLength = None,
    text: options.CompareText = "stdlib",
    eval_length: options.EvalLength = None,
    windows: options.EvalWindows = None,
    bos: options.Bos = "auto",
    tasks: options.CompareTasks = None,
    task_data: options.CompareTaskData = None,
    limit: options.Limit = None,
    set_: options.CompareSettings = None,
    seed: Seed = 0,
    keep: options.Keep = False,
    device: Device = "auto",
) -> None:
    """Every recipe with every scheme on the same calibration tokens, seed and evaluation: table,
    Markdown, CSV, JSON, HTML with plots.
    """
    from .comparison import CompareOptions, run_compare

    given = CompareOptions(
        model=model,
        schemes=schemes,
        recipes=recipes,
        output=output,
        calib=calib,
        samples=samples,
        length=length,
        text=text,
        eval_length=eval_length,
        windows=windows,
        bos=bos,
        tasks=tasks,
        task_data=task_data,
        limit=limit,
        settings=tuple(set_ or ()),
        seed=seed,
        keep=keep,
        device=device,
    )
    rows = run_compare(given, out)
    if any("error" in row for row in rows):
        raise typer.Exit(1)
