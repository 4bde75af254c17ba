"""Options of the commands that measure, look and share, as types: a command names what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import numbers
from .app import BOS
from .numbers import real, whole
from .places import json_file

# --- of several commands --------------------------------------------------------------------------

Model = Annotated[str, typer.Argument(help="Model folder, hub id, or GGUF file.")]
ModelOrArtifact = Annotated[
    str, typer.Argument(help="Model or artifact: folder, hub id, or GGUF file.")
]
Length = Annotated[
    int | None,
    typer.Option(
        help="Window length; default 2048 or the model's context if shorter.", callback=whole(2)
    ),
]
Windows = Annotated[
    int | None, typer.Option(help="Use only the first so many windows.", callback=whole())
]
Bos = Annotated[str, typer.Option(help=BOS)]
Limit = Annotated[
    int | None,
    typer.Option(help="Only the first so many examples of each task.", callback=whole()),
]
Integers = Annotated[
    bool,
    typer.Option(
        "--integers",
        help="Compute an artifact's linears in integers, where its activations are quantized.",
    ),
]

# --- of eval --------------------------------------------------------------------------------------

EvalText = Annotated[
    str | None,
    typer.Option(
        help=(
            "Text for perplexity: stdlib (its held-out side), a file, a folder or hub dataset, "
            "or wikitext2, c4. Default: stdlib, or no text if there are --tasks."
        )
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(help="Also measure mean KL and top-1 agreement to this model, on the text."),
]
EvalTasks = Annotated[
    str | None,
    typer.Option(
        help=(
            "Accuracy on lm-eval's tasks, with commas: "
            "piqa,arc_easy,arc_challenge,hellaswag,winogrande,mmlu. Needs pip install "
            "'lowbit[eval]'."
        )
    ),
]
Shots = Annotated[
    int | None,
    typer.Option(
        help="Worked examples in each prompt of --tasks; default: none, unless the task says so.",
        callback=whole(0),
    ),
]
EvalTaskData = Annotated[
    Path | None,
    typer.Option(
        help=(
            "Folder of JSONL files for --tasks, in place of the Hugging Face hub; "
            "docs/evaluation.md has the form."
        )
    ),
]
TaskBatch = Annotated[
    int | None,
    typer.Option(help="Prompts of --tasks a forward pass; default 8.", callback=whole()),
]
EvalJson = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help=(
            "Write perplexity, nll, tokens, windows, length, batch (windows in one pass), dtype "
            "(of the arithmetic), kl, top1 here, and tasks."
        ),
        callback=json_file,
    ),
]

# --- of generate ----------------------------------------------------------------------------------

Prompt = Annotated[str, typer.Option(help="Text to continue.")]
Tokens = Annotated[int, typer.Option(help="At most so many new tokens.", callback=whole())]
Temperature = Annotated[
    float, typer.Option(help="0 is greedy.", callback=real(1e-4, 1e4, zero=True))
]
SamplingSeed = Annotated[int, typer.Option(help="For sampling.", callback=numbers.seed)]

# --- of compare -----------------------------------------------------------------------------------

Schemes = Annotated[str, typer.Option(help="With commas: W2A16g64,W3A16g64,W4A4,W4A8KV4.")]
Recipes = Annotated[
    str,
    typer.Option(
        help=(
            "With commas: rtn,awq,gptq,omniquant,tesseraq; parts are joined by +, as in "
            "smoothquant+gptq."
        )
    ),
]
CompareOutput = Annotated[
    Path,
    typer.Option(
        "-o",
        "--output",
        help="Folder for cells and reports; a repeated command goes on from it.",
    ),
]
CompareCalib = Annotated[
    str,
    typer.Option(
        help=(
            "Calibration text of every recipe: stdlib, a file, a folder or hub dataset, "
            "wikitext2, c4, pile-val."
        )
    ),
]
Samples = Annotated[int, typer.Option(help="Calibration rows.", callback=whole())]
CalibLength = Annotated[
    int | None,
    typer.Option(
        help="Tokens a calibration row; default 2048 or the model's context.", callback=whole(2)
    ),
]
CompareText = Annotated[
    str,
    typer.Option(
        help=(
            "Evaluation text: stdlib (its held-out side), a file, a folder or hub dataset, "
            "wikitext2, c4."
        )
    ),
]
EvalLength = Annotated[
    int | None,
    typer.Option(
        help="Tokens an evaluation window; default 2048 or the model's context.",
        callback=whole(2),
    ),
]
EvalWindows = Annotated[
    int | None,
    typer.Option(help="Only the first so many evaluation windows.", callback=whole()),
]
CompareTasks = Annotated[str | None, typer.Option(help="lm-eval tasks, with commas.")]
CompareTaskData = Annotated[Path | None, typer.Option(help="Folder of JSONL files for --tasks.")]
CompareSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="METHOD.OPTION=VALUE for every recipe that has the method; repeatable."
    ),
]
Keep = Annotated[bool, typer.Option(help="Keep the artifacts, in OUTPUT/artifacts.")]

# --- of analyze -----------------------------------------------------------------------------------

AnalysisOutput = Annotated[
    Path, typer.Option("-o", "--output", help="Folder for analysis.json and analysis.html.")
]
AnalysisText = Annotated[
    str,
    typer.Option(
        help=(
            "Text that passes: stdlib (its held-out side), a file, a folder or hub dataset, "
            "wikitext2, c4."
        )
    ),
]
WindowBatch = Annotated[
    int,
    typer.Option(
        help=(
            "Windows that pass together: over them a channel's maximum is taken with "
            "--columns call."
        ),
        callback=whole(),
    ),
]
Bits = Annotated[str, typer.Option(help="Widths of the activation grids, with commas.")]
Exponents = Annotated[str, typer.Option(help="CrossQuant's row exponents, with commas.")]
Columns = Annotated[str, typer.Option(help="Channel maxima over a call or a sequence.")]
Shares = Annotated[
    str,
    typer.Option(
        help="Shares of non-zero elements to set to zero in the remove-kernel experiment."
    ),
]
Remove = Annotated[
    bool, typer.Option(help="Run the remove-kernel experiment; its weights are in 8 bits.")
]

# --- of inspect, verify and push ------------------------------------------------------------------

Artifact = Annotated[Path, typer.Argument(help="Artifact folder.")]
MovedArtifact = Annotated[Path, typer.Argument(help="Artifact folder, also a copy that was moved.")]
Loader = Annotated[bool, typer.Option(help="Also load it with its runtime and compare logits.")]
EvalLoad = Annotated[
    str,
    typer.Option(
        help=(
            "How models are in memory: 'whole', or 'blocks' for one block at a time (a text; "
            "models of floats, GGUF files and lowbit's own artifacts). 'auto': whole if that fits."
        )
    ),
]
Load = Annotated[
    str,
    typer.Option(
        help=(
            "How its runtime has it in memory: 'whole', or 'blocks' for one block at a time, "
            "where transformers is the runtime. 'auto': whole if that fits."
        )
    ),
]
Source = Annotated[
    str | None,
    typer.Option(
        help=(
            "The model it was made of, folder or hub id: also compare every byte of its files "
            "with what was quantized."
        ),
        show_default=False,
    ),
]
ArtifactOrExport = Annotated[Path, typer.Argument(help="Artifact folder, or an export of one.")]
Repository = Annotated[
    str,
    typer.Argument(
        help="Model repository on the Hugging Face Hub, owner/name; made if it is not there."
    ),
]
Private = Annotated[
    bool,
    typer.Option(
        "--private", help="Make a new repository private; one that exists stays as it is."
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, made if it is not there. Default: main.")
]
Token = Annotated[
    str | None,
    typer.Option(
        help="Token that may write. Default: HF_TOKEN, or that of `hf auth login`.",
        show_default=False,
    ),
]
