"""Modules of Triton kernels beside others, for CUDA; none where they do not work.

Nothing depends on them: every caller has a way in torch, as with `compiled`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType

import torch


def tried(device: torch.device) -> bool:
    """Whether there may be kernels for a device; they have not been built."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


@functools.cache
def kernels(name: str, device: torch.device) -> ModuleType | None:
    """A module of kernels, or None: not a CUDA device, no triton, or kernels that cannot be built
    there, of which is warned.

    Args:
        name: full name of the module. Its ``try_out(device)`` launches each of its kernels: Triton
            builds them there and then, with a C compiler.

    Raises:
        OutOfMemoryError: there is no memory to try them with.
    """
    if not tried(device):
        return None
    module = importlib.import_module(name)
    try:
        module.try_out(device)
    except torch.OutOfMemoryError:
        raise
    # a compiler or its headers missing, a card too old: Triton has an error of its own for each
    except Exception as e:
        reason = (str(e).splitlines() or ["no reason given"])[0]
        warnings.warn(
            f"Triton does not work on {device} ({type(e).__name__}: {reason}): plain "
            f"torch, which is slower, takes the place of '{name}'.",
            stacklevel=2,
        )
        return None
    return module
