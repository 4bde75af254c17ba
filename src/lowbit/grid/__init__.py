"""Which numbers a tensor may take."""

from .activation import ActivationGrid as ActivationGrid
from .activation import CrossQuant as CrossQuant
from .activation import LLMInt8 as LLMInt8
from .activation import PerToken as PerToken
from .activation import activation_grid as activation_grid
from .affine import Affine as Affine
from .affine import AffineParams as AffineParams
from .base import AnyGrid as AnyGrid
from .base import ColumnGrid as ColumnGrid
from .base import Grid as Grid
from .base import GroupedGrid as GroupedGrid
from .base import LinearGrid as LinearGrid
from .base import OrderedGrid as OrderedGrid
from .base import RangedGrid as RangedGrid
from .codebook import Codebook as Codebook
from .codebook import CodebookParams as CodebookParams
from .inputs import InputQuantizer as InputQuantizer
from .inputs import KVGrid as KVGrid
from .inputs import QuantizedStates as QuantizedStates
from .kquant import KQuant as KQuant
from .kquant import KQuantParams as KQuantParams
from .mxfp4 import MXFP4 as MXFP4
from .mxfp4 import MXFP4Params as MXFP4Params
from .params import Params as Params
from .qtensor import Coded as Coded
from .qtensor import Outliers as Outliers
from .qtensor import QTensor as QTensor
from .rotation import Rotation as Rotation

GRIDS: tuple[type[AnyGrid], ...] = (Affine, Codebook, KQuant, MXFP4)
