"""The quantizer by which transformers loads the library's own format. Importing this module
registers it, and imports transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import LowbitError
from ..formats import native
from ..formats.packing import packed_linears
from ..grid import KVGrid, QuantizedStates
from ..model.experts import fuse_again, replace_fused
from ..model.fused import DOWN, GATE, UP
from ..model.modules import ModuleNames, renamings
from .linears import PackedLinear, module_for


@register_quantization_config(native.NAME)
class LowbitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` as `lowbit.formats.native` describes it."""

    def __init__(self, **fields: Any) -> None:
        self.fields = {k: v for k, v in fields.items() if k != "quant_method"}
        self.quant_method = native.NAME

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": native.NAME, **self.fields}


@dataclass(frozen=True)
class QuantizeStates:
    """A pre-hook of an attention module: its keys and values pass through a grid. Of this module,
    so that models can be pickled.
    """

    kv: KVGrid

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        return args, {
            **kwargs,
            "past_key_values": QuantizedStates(self.kv, kwargs.get("past_key_values")),
        }


@register_quantizer(native.NAME)
class LowbitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads packed weights; cannot quantize on the fly."""

    requires_calibration = True

    def __init__(self, quantization_config: LowbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._hooks: list[RemovableHandle] = []
        self._mixtures: frozenset[str] = frozenset()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        try:
            native.check(self.quantization_config.to_dict())
        except LowbitError as e:
            raise ValueError(str(e)) from e

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        stored = None if checkpoint_files is None else _tensor_names(checkpoint_files)
        self._mixtures = _replace_linears(model, self.quantization_config.to_dict(), stored)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """What transformers does to names and tensors while it loads: experts stay apart."""
        names = native.experts_of(self.quantization_config.to_dict())
        kept = [c for c in weight_conversions if not _fuses(c, self._mixtures)]
        # After transformers' own renaming, as `lowbit.model.modules` has it.
        found: list[Any] = super().update_weight_conversions(kept + renamings(names or {}), model)
        return found

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        found = native.kv_of(self.quantization_config.to_dict())
        if found is not None:
            kv, patterns = found
            matching = [
                m
                for n, m in model.named_modules()
                if any(fnmatchcase(n, pattern) for pattern in patterns)
            ]
            self._hooks = [
                m.register_forward_pre_hook(QuantizeStates(kv), with_kwargs=True) for m in matching
            ]

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Plain linears in place of packed ones; activations, keys and values are no longer
        quantized.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        dtype = dtype or model.dtype
        if isinstance(dtype, str):  # save_pretrained leaves its name in the config
            dtype = getattr(torch, dtype)
        # Names only: a linear that is held keeps its packed tensors, and a decoded weight, until
        # the last one is replaced.
        for name in [n for n, m in model.named_modules() if isinstance(m, PackedLinear)]:
            _replace(model, name, model.get_submodule(name).plain(dtype))
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        fuse_again(model)
        if self._mixtures:  # what is saved now is converted as of any model of the class
            model._weight_conversions = None
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # what lies beside the packed weights: adapters, norms, heads


def _fuses(conversion: Any, mixtures: frozenset[str]) -> bool:
    """Whether a conversion of transformers makes one tensor of those of experts that are apart."""
    if not isinstance(conversion, WeightConverter):
        return False
    # A copy, since a conversion notes that it was used.
    again = conversion.copy(
        list(conversion._original_source_patterns),
        list(conversion._original_target_patterns),
        operations=list(conversion.operations),
    )
    names = (
        f"{m}.0.{linear}.{kind}"
        for m in mixtures
        for linear in (GATE, UP, DOWN)
        for kind in ("weight", "bias")
    )
    return any(again.rename_source_key(name)[1] is not None for name in names)


def _tensor_names(files: Sequence[str]) -> set[str]:
    """The names of all tensors in safetensors files."""
    names: set[str] = set()
    for path in files:
        if Path(path).suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                names.update(f.keys())
    return names


def _replace_linears(
    model: Any, config: Mapping[str, Any], stored: set[str] | None
) -> frozenset[str]:
    """Put packed linears where the artifact holds packed tensors, and experts as modules of their
    own where it holds theirs; every other module is left as the model's class made it.

    Args:
        stored: names of the tensors in the files, by which a head that was never quantized is told
            apart; None if there are no files.

    Returns:
        Names of the mixtures of experts that were replaced.

    Raises:
        LowbitError: the files lack a tensor of a linear that they hold otherwise, or the class
            names its blocks as no file does.
    """
    places = _places(model, config, stored)
    replaced = replace_fused(model, {n.rpartition(".")[0].rpartition(".")[0] for n in places})
    done = 0
    for name, full in places.items():
        module = _module(model, name)
        if not isinstance(module, nn.Linear):
            continue
        quantized = _quantized(full, name, module, config)
        if quantized is None:
            continue
        for tensor in quantized.held():
            if stored is not None and f"{full}.{tensor}" not in stored:
                raise LowbitError(
                    f"the artifact has no tensor '{full}.{tensor}': make it again, or download it "
                    "again."
                )
        _replace(model, name, quantized)
        done += 1
    if not done:
        raise LowbitError(
            f"no linear of the artifact has a place in {type(model).__name__}, which names its "
            "blocks otherwise, so that all weights would be "
            "made up: load it with AutoModel and put a head on that."
        )
    return frozenset(replaced)


def _places(model: Any, config: Mapping[str, Any], stored: set[str] | None) -> dict[str, str]:
    """Name of a linear in the model -> in the files, of those that are packed there."""
    if stored is not None:
        modules = ModuleNames(model, native.experts_of(config))
        return {modules.of(full): full for full in packed_linears(stored)}
    # The config names linears as the model with its head does; AutoModel has no head and prefix.
    prefix = f"{model.base_model_prefix}." if model.base_model is model else ""
    linears = (n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    return {name: prefix + name for name in linears}


def _module(model: nn.Module, name: str) -> nn.Module | None:
    """The module of this name; None without one."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _quantized(
    full: str, name: str, linear: nn.Linear, config: Mapping[str, Any]
) -> PackedLinear | None:
    """The packed linear of a name in the files; None of one that is not quantized.

    Args:
        name: of the linear in the model.
    """
    grid = native.grid_of(config, full)
    if grid is None:
        return None
    columns, outliers = native.columns_of(config, full), native.outliers_of(config, full)
    input_quantizer, stored = native.input_quantizer_of(config, name), native.dtype_of(config)
    return module_for(grid)(full, linear, grid, columns, outliers, input_quantizer, stored)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
