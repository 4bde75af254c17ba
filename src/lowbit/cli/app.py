"""What the commands share: the app, the consoles, options that several have, and errors as sentences."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from ..errors import Interrupted, LowbitError, ToldElsewhere, VerificationError

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
Offload = Annotated[str, typer.Option(help="Where the activations between blocks live: on the device, on the host, on disk, or auto: the first of these that has the room. Changes no byte of the result.")]
Python = Annotated[str, typer.Option(help="Interpreter that has the runtime, if this one has not: gptqmodel and optimum for GPTQ and AWQ, mlx-lm for MLX, llama-cpp-python for GGUF.", show_default=False)]
_SCHEME = "W<bits>A<bits>[KV<bits>][g<group size>][sym], for example W2A16g64, W4A4 or W4A8KV4; without g one scale per output channel. Or a K-quant of llama.cpp: gguf:q2_k, q3_k, q4_k, q6_k."
Scheme = Annotated[str, typer.Option(help=_SCHEME)]
OwnScheme = Annotated[Optional[str], typer.Option(help=_SCHEME + " Default: the recipe's, W4A16g128 if it has none.")]


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Print our errors as the one or two sentences they are; 2 for bad input, 1 for a failed verification, 130 and 143 when told to end."""

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
        except ToldElsewhere as e:
            raise typer.Exit(2) from e
        except VerificationError as e:
            err.print(f"verification failed: {e}", style="red", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from e
        except LowbitError as e:
            complain(str(e))
            raise typer.Exit(2) from e

    return run


@contextmanager
def _terminable(told: list[signal.Signals]) -> Iterator[None]:
    """Within, SIGTERM (of `docker stop`, of a batch system) ends a command like Ctrl-C, and is added to ``told``."""
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


def complain(what: str, kind: str = "error: ") -> None:
    """Print what went wrong, also while a table is shown."""
    err.show_cursor()
    err.print(f"{kind}{what}", style="red", highlight=False, soft_wrap=True, markup=False)


def _quiet() -> None:
    """Keep the libraries' own progress bars and advice out of our output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file that a command was asked for."""
    from ..disk import write_atomic

    write_atomic(path, (json.dumps(data, indent=1) + "\n").encode())
