"""Recipes and schemes side by side on one model: the same calibration tokens, seed and evaluation
for all, cell by cell.
"""

from .comparison import Comparison, opened
from .terms import Cell, Terms, cells, title_of

__all__ = ["Cell", "Comparison", "Terms", "cells", "opened", "title_of"]
