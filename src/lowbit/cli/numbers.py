"""Checks of the numbers that options take, before a command begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import typer

from ..errors import LowbitError
from .sentences import option_of

# Of what is counted: what is more cannot be meant, and no tensor could have so many rows.
MOST = 2**31 - 1
_SEEDS = 2**63 - 1  # torch takes one bit more, so that a method can count on from the seed


def whole(
    least: int = 1, most: int = MOST
) -> Callable[[typer.CallbackParam, Optional[int]], Optional[int]]:
    """Return a check that an option is a whole number in a range, ends included.

    Raises (when it is called):
        LowbitError: naming the option, the number and the range.
    """

    def check(param: typer.CallbackParam, value: Optional[int]) -> Optional[int]:
        if value is not None and not least <= value <= most:
            raise LowbitError(
                f"{option_of(param)} {value}: give a whole number from {least} to {most}."
            )
        return value

    return check


def seed(param: typer.CallbackParam, value: int) -> int:
    """Check a seed. Raises LowbitError."""
    found = whole(0, _SEEDS)(param, value)
    assert found is not None
    return found


def real(
    least: float, most: float, unit: str = "", zero: bool = False
) -> Callable[[typer.CallbackParam, Optional[float]], Optional[float]]:
    """Return a check that an option is a number in a range, ends included.

    Args:
        unit: for the sentence, such as "of GiB".
        zero: whether 0 is allowed besides.

    Raises (when it is called):
        LowbitError: naming the option, the number and the range; so for nan.
    """

    def check(param: typer.CallbackParam, value: Optional[float]) -> Optional[float]:
        if value is not None and not least <= value <= most and not (zero and value == 0):
            also = "0, or " if zero else ""
            kind = f"a number {unit}" if unit else "a number"
            raise LowbitError(
                f"{option_of(param)} {value:g}: give {also}{kind} from {least:g} to {most:g}."
            )
        return value

    return check
