"""Which numbers a tensor may take."""

from .activation import ActivationGrid as ActivationGrid
from .activation import CrossQuant as CrossQuant
from .activation import LLMInt8 as LLMInt8
from .activation import PerToken as PerToken
from .activation import activation_grid as activation_grid
from .affine import Affine as Affine
from .affine import AffineParams as AffineParams
from .base import Grid as Grid
from .base import Outliers as Outliers
from .base import QTensor as QTensor
from .codebook import Codebook as Codebook
from .codebook import CodebookParams as CodebookParams
from .reading import KVGrid as KVGrid
from .reading import QuantizedStates as QuantizedStates
from .reading import Reading as Reading
from .rotation import Rotation as Rotation
