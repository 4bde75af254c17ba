"""Whether models are in memory whole, or one block at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ..errors import LowbitError, unknown
from ..machine import fits_whole
from ..model.config import load_config
from ..model.skeleton import build_skeleton
from ..model.source import open_files
from ..runtime.by_block import ByBlock

_WAYS = ("auto", "whole", "blocks")


class Asked(Protocol):
    """What a command was given."""

    @property
    def model(self) -> str: ...
    @property
    def reference(self) -> str | None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def load(self) -> str: ...


def check_loading(asked: str) -> None:
    """Raise LowbitError: no such way."""
    if asked not in _WAYS:
        raise unknown("way of loading", asked, _WAYS)


def by_block(given: Asked, device: str) -> bool:
    """Whether the models of a command go through memory block by block: where that was asked for,
    or where they do not fit whole and can.
    """
    if given.load != "auto":
        return given.load == "blocks"
    models = [m for m in (given.model, given.reference) if m]
    narrow = given.dtype != "float32"  # "auto" is that of a model on an accelerator
    if fits_whole(_numbers(models), 2 if narrow else 4, torch.device(device)):
        return False
    return all(map(_can, models))


def _can(model: str) -> bool:
    """Whether a model is one of floats, or an artifact as `quantize` writes it."""
    try:
        ByBlock(model, torch.device("cpu"))
    except LowbitError:
        return False
    return True


def _numbers(models: Sequence[str]) -> int:
    """Parameters of some models together."""
    total = 0
    for model in models:
        checkpoint = open_files(model)
        skeleton = build_skeleton(load_config(checkpoint), checkpoint.name)
        total += sum(p.numel() for p in skeleton.parameters())
    return total
