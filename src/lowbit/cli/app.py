"""What the commands share: the app, its console, options that several have, and how they end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any, Optional

import typer

from ..console import Console
from ..errors import Interrupted
from . import numbers
from .sentences import Commands, complain

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(
        "Make large language models small: 2 to 4 bit weights, accuracy kept, artifacts that "
        "carry their proof."
    ),
)
out = Console()

Seed = Annotated[
    int,
    typer.Option(
        help="For everything random. Same seed, same machine: same bytes.", callback=numbers.seed
    ),
]
Calib = Annotated[
    Optional[str],
    typer.Option(
        help=(
            "Calibration text: stdlib (this Python's own sources), a file (.txt, .json, .jsonl, "
            ".csv, .parquet, also compressed; conversations go through the model's chat template), "
            "a folder or hub dataset, or wikitext2, c4, pile-val. Default: the recipe's, wikitext2 "
            "or c4 for those with 'claq' or '-paper' in their name, else stdlib."
        )
    ),
]
BOS = (
    "What rows of tokens begin with: yes (BOS), no (the text goes on), or auto: BOS where the "
    "tokenizer adds it to a text, but wikitext2, c4 and pile-val are cut as papers cut them."
)
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, xpu.")]
Dtype = Annotated[
    str,
    typer.Option(
        help=(
            "Arithmetic of forward passes: float32, bfloat16, float16. 'auto': the model's on a "
            "GPU; on a CPU bfloat16 for models of 512 hidden units or more where that was measured "
            "to be faster, else float32."
        )
    ),
]
Offload = Annotated[
    str,
    typer.Option(
        help=(
            "Where the activations between blocks live: on the device, on the host, on disk, or "
            "auto: the first of these that has the room. Changes no byte of the result."
        )
    ),
]
Python = Annotated[
    str,
    typer.Option(
        help=(
            "Interpreter that has the runtime, if this one has not: gptqmodel and optimum for "
            "GPTQ and AWQ, mlx-lm for MLX, llama-cpp-python for GGUF."
        ),
        show_default=False,
    ),
]
_SCHEME = (
    "W<bits>A<bits>[KV<bits>][g<group size>][sym], for example W2A16g64, W4A4 or W4A8KV4; without "
    "g one scale per output channel. W2A16:column (row, tensor): codebooks. mxfp4: 4-bit floats. "
    "Or a K-quant of llama.cpp: gguf:q2_k, q3_k, q4_k, q6_k."
)
Scheme = Annotated[str, typer.Option(help=_SCHEME)]
OwnScheme = Annotated[
    Optional[str], typer.Option(help=_SCHEME + " Default: the recipe's, W4A16g128 if it has none.")
]


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that keeps the libraries it calls quiet.

    When it is interrupted it says what is kept and exits with 130, or with 143 on SIGTERM.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        told = [signal.SIGINT]
        try:
            with _terminable(told):
                _quiet()
                command(*args, **kwargs)
        except KeyboardInterrupt as e:
            if os.environ.get("RANK", "0") == "0":  # torchrun's other processes are told to end too
                complain(f"interrupted. {e}" if isinstance(e, Interrupted) else "interrupted.", "")
            raise typer.Exit(128 + told[-1]) from e

    return run


@contextmanager
def _terminable(told: list[signal.Signals]) -> Iterator[None]:
    """Let SIGTERM (of `docker stop`, of a batch system) end a command like Ctrl-C, and add it to
    ``told``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        told.append(signal.Signals(number))
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _quiet() -> None:
    """Keep the libraries' own progress bars and advice out of our output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
