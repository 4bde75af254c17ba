"""The table of methods. One paper, one file: a frozen dataclass of its knobs, called with a Block,
returning a Block.
"""

from __future__ import annotations

from . import awq, claq, crossquant, gptq, omniquant, polish, quarot, rtn, tesseraq
from .awq import AWQ as AWQ
from .claq import CLAQ as CLAQ
from .crossquant import CrossQuant as CrossQuant
from .entry import ONCE as ONCE
from .entry import ROLES as ROLES
from .entry import Entry as Entry
from .gptq import GPTQ as GPTQ
from .omniquant import OmniQuant as OmniQuant
from .polish import Polish as Polish
from .quarot import QuaRot as QuaRot
from .rtn import RTN as RTN
from .smoothquant import SmoothQuant as SmoothQuant
from .tesseraq import TesseraQ as TesseraQ

METHODS: dict[str, Entry] = {
    "quarot": Entry(QuaRot, "rotation", before=quarot.before),
    "smoothquant": Entry(SmoothQuant, "transform"),
    "crossquant": Entry(
        CrossQuant, "transform", crossquant.cost, crossquant.check, crossquant.before
    ),
    "awq": Entry(AWQ, "clip", awq.cost, fixes_ranges=awq.fixes_ranges),
    "omniquant": Entry(
        OmniQuant,
        "clip",
        omniquant.cost,
        omniquant.check,
        omniquant.before,
        decides=omniquant.decides,
    ),
    "rtn": Entry(RTN, "solver", rtn.cost),
    "gptq": Entry(GPTQ, "solver", gptq.cost),
    "claq": Entry(
        CLAQ, "solver", claq.cost, claq.check, claq.before, claq.extra_bytes, claq.outliers
    ),
    "tesseraq": Entry(TesseraQ, "learner", tesseraq.cost, tesseraq.check, decides=tesseraq.decides),
    "polish": Entry(
        Polish, "polish", polish.cost, polish.check, further=polish.further, decides=polish.decides
    ),
}
