"""Perplexity as the papers compute it, and distance to a reference model: mean KL and top-1
agreement.
"""

from .by_block import evaluate_by_block
from .continuation import continue_text
from .loading import load_causal_lm
from .perplexity import evaluate
from .tally import Evaluation, Tally, together
from .windows import window_length

__all__ = [
    "Evaluation",
    "Tally",
    "continue_text",
    "evaluate",
    "evaluate_by_block",
    "load_causal_lm",
    "together",
    "window_length",
]
