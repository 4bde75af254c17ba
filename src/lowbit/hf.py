"""The transformers quantizer for artifacts in the library's own format: after `import lowbit`, from_pretrained just works.

Weights on uniform grids are decoded at their first use and kept, those on codebooks stay packed; activation grids, online rotations and
quantized keys and values are active in every forward pass, also in generation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from torch import nn

from .errors import LowbitError
from .formats import native
from .grid import Affine, Codebook, KQuant, QuantizedStates
from .linears import CodebookLinear, DecodedLinear

_HOOKED = "transformers.quantizers"


def _replace_linears(model: Any, config: dict[str, Any]) -> None:
    # The config names linears as the model with its head does; AutoModel loads the same files without head and prefix.
    prefix = f"{model.base_model_prefix}." if model.base_model is model else ""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            quantized = _quantized(prefix + name, module, config)
            if quantized is not None:
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, quantized)


def _quantized(name: str, linear: nn.Linear, config: dict[str, Any]) -> nn.Module | None:
    grid, outliers = native.grid_of(config, name), native.outliers_of(config, name)
    reading, stored = native.reading_of(config, name), native.dtype_of(config)
    if isinstance(grid, Codebook):
        return CodebookLinear(name, linear, grid, native.columns_of(config, name), outliers, reading, stored)
    return DecodedLinear(name, linear, grid, outliers, reading, stored) if isinstance(grid, (Affine, KQuant)) else None


def _quantize_states(model: nn.Module, config: dict[str, Any]) -> None:
    found = native.kv_of(config)
    if found is None:
        return
    kv, pattern = found

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "past_key_values": QuantizedStates(kv, kwargs.get("past_key_values"))}

    for name, module in model.named_modules():
        if fnmatchcase(name, pattern):
            module.register_forward_pre_hook(hook, with_kwargs=True)


def register() -> None:
    """Make transformers know the format; harmless when repeated."""
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if native.NAME in AUTO_QUANTIZER_MAPPING:
        return

    class LowbitConfig(QuantizationConfigMixin):  # type: ignore[misc]
        """`quantization_config` as `lowbit.formats.native` describes it."""

        def __init__(self, **fields: Any) -> None:
            self.fields = {k: v for k, v in fields.items() if k != "quant_method"}
            self.quant_method = native.NAME

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": native.NAME, **self.fields}

    class LowbitQuantizer(HfQuantizer):  # type: ignore[misc]
        """Loads packed weights; cannot quantize on the fly."""

        requires_calibration = True

        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            try:
                native.check(self.quantization_config.to_dict())
            except LowbitError as e:
                raise ValueError(str(e)) from e

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            _replace_linears(model, self.quantization_config.to_dict())

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
            _quantize_states(model, self.quantization_config.to_dict())

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return False

    register_quantization_config(native.NAME)(LowbitConfig)
    register_quantizer(native.NAME)(LowbitQuantizer)


class _WhenImported(MetaPathFinder, Loader):
    """Registers the format right after transformers' quantizers are first imported: importing them costs seconds."""

    def __init__(self) -> None:
        self._loader: Any = None

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
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
