"""One paper, one file. Every method is a frozen dataclass of that paper's knobs, called with a Block, returning a Block."""

from __future__ import annotations

from typing import Union

from .awq import AWQ as AWQ
from .rtn import RTN as RTN
from .tesseraq import TesseraQ as TesseraQ

Method = Union[RTN, AWQ, TesseraQ]

METHODS: dict[str, type[RTN] | type[AWQ] | type[TesseraQ]] = {"rtn": RTN, "awq": AWQ, "tesseraq": TesseraQ}
