"""Whether models are in memory whole, or one block at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ..errors import unknown
from ..machine import free_memory
from ..model.config import load_config
from ..model.skeleton import build_skeleton
from ..model.source import open_files

_WAYS = ("auto", "whole", "blocks")
_BESIDE = 1.3  # what a load takes beside the weights: measured


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
    free = free_memory(torch.device(device))
    if free is None:
        return False
    models = [m for m in (given.model, given.reference) if m]
    narrow = given.dtype in ("bfloat16", "float16") or (
        given.dtype == "auto" and torch.device(device).type != "cpu"
    )
    return _BESIDE * (2 if narrow else 4) * _numbers(models) > free


def _numbers(models: Sequence[str]) -> int:
    """Parameters of some models together."""
    total = 0
    for model in models:
        checkpoint = open_files(model)
        skeleton = build_skeleton(load_config(checkpoint), checkpoint.name)
        total += sum(p.numel() for p in skeleton.parameters())
    return total
