"""Which numbers a tensor may take."""

from .affine import Affine as Affine
from .affine import AffineParams as AffineParams
from .base import QTensor as QTensor
