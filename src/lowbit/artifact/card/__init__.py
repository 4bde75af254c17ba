"""The model card: the README.md of an artifact or an export, made from its report alone, so that
equal reports make equal cards.
"""

from .front_matter import terms_of
from .numbers import polished
from .page import model_card

__all__ = ["model_card", "polished", "terms_of"]
