"""What goes wrong, said in one sentence; exit code 2 for bad input, 1 for a failed verification."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from ..console import Console
from ..errors import LowbitError, ToldElsewhere, VerificationError

err = Console(stderr=True)
_USAGE: Any = typer.BadParameter.__base__  # UsageError, which typer does not export


def complain(what: str, kind: str = "error: ") -> None:
    """Print what went wrong, also while a table is shown."""
    err.show_cursor()
    err.print(f"{kind}{what}", style="red")


def option_of(param: typer.CallbackParam) -> str:
    """Return an option as the user writes it, the long form if there are two."""
    return max(param.opts, key=len)


def check_needed(given: Mapping[str, object], needed: str, there: bool) -> None:
    """Refuse options that have no effect without another one.

    Args:
        given: name -> value, None where the option is not given.
        needed: the other option. there: whether it is given.

    Raises:
        LowbitError: naming both.
    """
    for name, value in given.items():
        if value is not None and not there:
            raise LowbitError(f"{name} has no effect without {needed}. Give both or neither.")


class Commands(TyperGroup):
    """All commands. They say in a sentence what is wrong with their arguments and input, and what
    the file system refuses.
    """

    def make_context(self, *args: Any, **options: Any) -> Any:
        """As typer has it."""
        with _told():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """As typer has it."""
        with _told():
            return super().invoke(ctx)


@contextmanager
def _told() -> Iterator[None]:
    """Print what is raised within as a sentence, and exit."""
    try:
        yield
    except ToldElsewhere as e:
        raise typer.Exit(2) from e
    except VerificationError as e:
        err.print(f"verification failed: {e}", style="red")
        raise typer.Exit(1) from e
    except LowbitError as e:
        complain(str(e))
        raise typer.Exit(2) from e
    except _USAGE as e:
        _complain_of_usage(e)
        raise typer.Exit(2) from e
    except OSError as e:
        if e.errno == errno.EPIPE:  # typer ends quietly where nobody reads on
            raise
        complain(_refused(e))
        raise typer.Exit(2) from e


def _complain_of_usage(e: Any) -> None:
    """Print what typer finds wrong with the arguments, and where help is."""
    what = e.format_message()
    if "\n" in what:  # the help, where no command is given
        err.print(what)
        return
    command = e.ctx.command_path if e.ctx is not None else "lowbit"
    complain(
        f"{what[:1].lower()}{what[1:].rstrip('.')}; '{command} --help' lists what can be given."
    )


def _refused(e: OSError) -> str:
    """Return what the system refused, with the path if the error has one."""
    path = e.filename2 or e.filename
    said = " ".join(str(e.strerror or e).split()).rstrip(".")
    if path is not None:
        return f"'{path}' cannot be read or written: {said}."
    if e.errno is None:  # a library's own, which says what it is about
        return f"{said or type(e).__name__}."
    return (
        f"the system cannot read or write something: {said}. Mend that and run the same command "
        "again."
    )
