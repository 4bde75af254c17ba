"""lowbit: large language models in 2 to 4 bits, as artifacts that carry their proof.

What the package gives is imported when it is first asked for: torch takes seconds, and a command
that only says what is wrong with its options needs none of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import LowbitError as LowbitError
from .errors import VerificationError as VerificationError
from .runtime.hf import register_when_needed

if TYPE_CHECKING:
    from .artifact.proof import verify as verify
    from .grid import Affine as Affine
    from .grid import QTensor as QTensor
    from .methods import AWQ as AWQ
    from .methods import RTN as RTN
    from .methods import TesseraQ as TesseraQ
    from .recipe import Recipe as Recipe
    from .run.quantize import quantize as quantize

_MODULES = {
    "AWQ": "methods",
    "Affine": "grid",
    "QTensor": "grid",
    "RTN": "methods",
    "Recipe": "recipe",
    "TesseraQ": "methods",
    "quantize": "run.quantize",
    "verify": "artifact.proof",
}

register_when_needed()
__version__ = "0.1.0"
__all__ = [
    "AWQ",
    "RTN",
    "Affine",
    "LowbitError",
    "QTensor",
    "Recipe",
    "TesseraQ",
    "VerificationError",
    "quantize",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    found = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
