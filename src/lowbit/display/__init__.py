"""What a person sees of a run: progress while it goes on, tables and sentences at its end."""

from .analysis import analysis_tables
from .closing import summary
from .comparison import comparison_table
from .plan import memory_rows, runtime_table, runtimes_table
from .progress import Progress, progress_bar
from .units import duration, size

__all__ = [
    "Progress",
    "analysis_tables",
    "comparison_table",
    "duration",
    "memory_rows",
    "progress_bar",
    "runtime_table",
    "runtimes_table",
    "size",
    "summary",
]
