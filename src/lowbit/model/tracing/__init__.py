"""The graphs of a model's blocks, discovered by running a narrow copy of the model.

`shrink` makes the narrow config, `tiny` the copy with one live block of each kind, `chain` sees
that its blocks run one after the other, `passing` finds what goes from block to block beside the
stream, `replay` runs a block and sees who reads which tensor. `kind` holds one block under study;
`sources`, `channels`, `attention` and `writers` each ask it one question; `assemble` puts the graph
together.
"""

from .discover import described

__all__ = ["described"]
