"""Self-contained HTML pages with tables and plots. Knows nothing of models: it is given rows of
plain data.
"""

from .comparison import write_comparison
from .demo import write_page

__all__ = ["write_comparison", "write_page"]
