"""What a person sees of a run: progress while it goes on, tables and sentences at its end."""

from .analysis import analysis_tables
from .artifact import artifact_lines, linears_table
from .closing import summary
from .comparison import comparison_table
from .graph import graph_data, graph_tables
from .plan import memory_rows, plan_rows, runtime_table, runtimes_table
from .progress import Progress, progress_bar
from .units import duration, size

__all__ = [
    "Progress",
    "analysis_tables",
    "artifact_lines",
    "comparison_table",
    "duration",
    "graph_data",
    "graph_tables",
    "linears_table",
    "memory_rows",
    "plan_rows",
    "progress_bar",
    "runtime_table",
    "runtimes_table",
    "size",
    "summary",
]
