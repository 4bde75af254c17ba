"""Work on the whole model: `Model -> Model`. What a method wants before the blocks is beside the
method (`lowbit.methods.entry.Entry.before`); the blocks themselves are here.
"""

from .blocks import Blocks as Blocks
from .blocks import BlockStore as BlockStore
from .blocks import Entered as Entered
from .blocks import advance as advance
from .blocks import apply_methods as apply_methods
