"""One paper, one file. Every method is a frozen dataclass of that paper's knobs, called with a
Block, returning a Block.
"""

from __future__ import annotations

from typing import Union

from .awq import AWQ as AWQ
from .claq import CLAQ as CLAQ
from .crossquant import CrossQuant as CrossQuant
from .gptq import GPTQ as GPTQ
from .omniquant import OmniQuant as OmniQuant
from .quarot import QuaRot as QuaRot
from .rtn import RTN as RTN
from .smoothquant import SmoothQuant as SmoothQuant
from .tesseraq import TesseraQ as TesseraQ

Method = Union[QuaRot, SmoothQuant, CrossQuant, AWQ, OmniQuant, RTN, GPTQ, CLAQ, TesseraQ]
# End on codes; what changes weights or ranges comes before them.
SOLVERS = (
    RTN,
    GPTQ,
    CLAQ,
    TesseraQ,
)

METHODS: dict[str, type[Method]] = {
    "quarot": QuaRot,
    "smoothquant": SmoothQuant,
    "crossquant": CrossQuant,
    "awq": AWQ,
    "omniquant": OmniQuant,
    "rtn": RTN,
    "gptq": GPTQ,
    "claq": CLAQ,
    "tesseraq": TesseraQ,
}
