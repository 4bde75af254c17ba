"""What a model's activations look like to a quantizer: the share that becomes zero, outliers, and
what losing those shares costs.
"""

from .page import write_analysis
from .study import StudyOptions, study

__all__ = ["StudyOptions", "study", "write_analysis"]
