"""The variables of all blocks, in files: one block's are in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...artifact.disk import disk
from ...errors import LowbitError

Tensors = Mapping[str, Tensor]
_NOW, _BEST, _KEPT, _NOTE = "now", "best", "kept", "state.json"
MOMENTS = ("first.", "second.")  # before the name of a variable: Adam's, which the best needs not


class State:
    """A folder of files of tensors, one for each block, as they are now, as they were when they
    were best, and as they were when an interrupted run will go on from them.

    Args:
        folder: made if it is missing. blocks: how many there are.
    """

    def __init__(self, folder: Path, blocks: int) -> None:
        self._folder, self._blocks = folder, blocks

    @property
    def note(self) -> dict[str, Any] | None:
        """What was noted when the state was kept; None if there is none to go on from."""
        for name in (_KEPT, f"{_KEPT}.old"):  # killed while one took the place of the other
            try:
                found: dict[str, Any] = json.loads((self._folder / name / _NOTE).read_text())
                return found
            except (OSError, ValueError):
                continue
        return None

    def begin(self) -> None:
        """Forget everything."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with disk(self._folder):
            (self._folder / _NOW).mkdir(parents=True)

    def go_on(self, kept_by: State) -> None:
        """Be as another one was when it was last kept; it may be this one."""
        kept = kept_by._folder / _KEPT
        if not (kept / _NOTE).is_file():
            kept = kept_by._folder / f"{_KEPT}.old"
        self._copied(kept, _NOW)
        self._copied(kept / _BEST, _BEST)

    def keep(self, note: Mapping[str, Any], best: bool) -> None:
        """Be able to go on from here.

        Args:
            best: it is the best state so far.
        """
        if best:
            with disk(self._folder):
                (self._folder / _BEST).mkdir(exist_ok=True)
            for number in range(self._blocks):
                self.write(number, self.read(number, torch.device("cpu")), best=True)
        self._copied(self._folder / _NOW, f"{_KEPT}.new")
        new, old = self._folder / f"{_KEPT}.new", self._folder / f"{_KEPT}.old"
        self._copied(self._folder / _BEST, f"{_KEPT}.new/{_BEST}")
        with disk(new):
            (new / _NOTE).write_text(json.dumps(dict(note)))
            shutil.rmtree(old, ignore_errors=True)
            if (self._folder / _KEPT).exists():
                (self._folder / _KEPT).rename(old)
            new.rename(self._folder / _KEPT)
            shutil.rmtree(old, ignore_errors=True)

    def _copied(self, source: Path, to: str) -> None:
        target = self._folder / to
        shutil.rmtree(target, ignore_errors=True)
        with disk(target):
            target.mkdir(parents=True)
            for number in range(self._blocks):
                shutil.copyfile(source / self._name(number), target / self._name(number))

    def _name(self, block: int) -> str:
        return f"block-{block:05d}.safetensors"

    def read(
        self, block: int, device: torch.device, *, best: bool = False, moments: bool = False
    ) -> dict[str, Tensor]:
        """The variables of a block, as they are now or were at best.

        Args:
            moments: with what Adam keeps of them, see ``MOMENTS``.

        Raises:
            LowbitError: they cannot be read.
        """
        path = self._folder / (_BEST if best else _NOW) / self._name(block)
        try:
            with safe_open(path, "pt") as f:
                wanted = [k for k in f.keys() if moments or not k.startswith(MOMENTS)]  # noqa: SIM118
                return {k: f.get_tensor(k).to(device) for k in wanted}
        except (OSError, SafetensorError) as e:
            raise LowbitError(
                f"'{path}' cannot be read ({e}): remove '{self._folder}' and run the same command, "
                "which begins to polish anew."
            ) from e

    def write(self, block: int, tensors: Tensors, *, best: bool = False) -> None:
        """The tensors of a block as they are now, or are at best.

        Raises:
            LowbitError: the disk refuses.
        """
        path = self._folder / (_BEST if best else _NOW) / self._name(block)
        with disk(path):
            save_file({k: t.contiguous().cpu() for k, t in tensors.items()}, path)
