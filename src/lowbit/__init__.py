"""lowbit: large language models in 2 to 4 bits, as artifacts that carry their proof."""

from .artifact.proof import verify as verify
from .errors import LowbitError as LowbitError
from .errors import VerificationError as VerificationError
from .grid import Affine as Affine
from .grid import QTensor as QTensor
from .methods import AWQ as AWQ
from .methods import RTN as RTN
from .methods import TesseraQ as TesseraQ
from .recipe import Recipe as Recipe
from .run.quantize import quantize as quantize
from .runtime.hf import register_when_needed

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
