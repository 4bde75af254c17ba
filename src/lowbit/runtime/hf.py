"""After `import lowbit`, from_pretrained just works on artifacts in the library's own format:
`quantizer` is imported when it is needed.

Weights on uniform grids are decoded at their first use and kept, those on codebooks stay packed;
activation grids, online rotations and quantized keys and values are active in every forward pass,
also in generation.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_HOOKED = "transformers.quantizers"
_QUANTIZER = f"{__package__}.quantizer"


def register() -> None:
    """Make transformers know the format; harmless when repeated."""
    importlib.import_module(_QUANTIZER)


class _WhenImported(MetaPathFinder, Loader):
    """Registers the format right after transformers' quantizers are first imported: importing them
    costs seconds.
    """

    def __init__(self) -> None:
        self._loader: Any = None

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _HOOKED:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        found: ModuleType | None = self._loader.create_module(spec)
        return found

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        assert module.__spec__ is not None
        module.__spec__.loader = self._loader
        register()


def register_when_needed() -> None:
    """Register now if transformers' quantizers are loaded already, else as soon as they are."""
    if _HOOKED in sys.modules:
        register()
    elif not any(isinstance(f, _WhenImported) for f in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())
