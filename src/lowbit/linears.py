"""Linears with packed weights, as the transformers quantizer puts them into a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from . import kernels
from .formats import blocks
from .formats import columns as layout
from .formats.packing import unpack
from .grid import Affine, Codebook, Grid, KQuant, Reading
from .grid.bits import packed_words
from .grid.packed import PackedColumns


class _PackedLinear(nn.Module):
    """What both kinds share: the place in the model, the reading of the input, the bias, the packed tensors as buffers.

    The packed tensors move with the model and are never cast with it: what is saved again is what was loaded.

    Args:
        name: full name, for errors. linear: what it replaces; may be on the meta device.
        outliers: number of weights kept apart, None without any.
        reading: what happens to the input. stored: dtype to which decoded weights are rounded.
    """

    bias: nn.Parameter | None

    def __init__(self, name: str, linear: nn.Linear, grid: Grid, outliers: int | None, reading: Reading, stored: torch.dtype) -> None:
        super().__init__()
        self.name, self.grid, self.reading, self.stored = name, grid, reading, stored
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._device = linear.weight.device
        self._hold("weight_shape", (2,), torch.int64)
        if outliers is not None:
            self._hold("weight_outlier_starts", (self.out_features + 1,), torch.int32)
            self._hold("weight_outlier_columns", (outliers,), layout.index_dtype(self.in_features))
            self._hold("weight_outlier_values", (outliers,), torch.float16)
        self.register_parameter("bias", linear.bias)

    def _hold(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.register_buffer(name, torch.empty(shape, dtype=dtype, device=self._device))

    def _held(self) -> dict[str, Tensor]:
        return {k: t for k, t in self.named_buffers() if k.startswith("weight_")}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _PackedLinear:
        before = self._held()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, t in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != t.dtype:
                self._buffers[name] = t.to(after.device)
        return self


class DecodedLinear(_PackedLinear):
    """A linear on a uniform grid or a K-quant; its weight is decoded at the first use and kept. Arguments as `_PackedLinear`."""

    weight_shape: Tensor

    def __init__(self, name: str, linear: nn.Linear, grid: Affine | KQuant, outliers: int | None, reading: Reading, stored: torch.dtype) -> None:
        super().__init__(name, linear, grid, outliers, reading, stored)
        rows, width = self.out_features, self.in_features
        if isinstance(grid, KQuant):
            self._hold("weight_blocks", (rows, blocks.row_bytes(grid, width)), torch.uint8)
        else:
            groups = width // grid.group(width)
            self._hold("weight_packed", (rows, packed_words(width, grid.bits)), torch.int32)
            self._hold("weight_scale", (rows, groups), stored)
            if not grid.symmetric:
                self._hold("weight_zero_point", (packed_words(rows, grid.bits), groups), torch.int32)
        self._dense: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The (out, in) weight in the dtype of the artifact's scales, decoded at first use."""
        if self._dense is None or self._dense.device != self.weight_shape.device:
            held = {k: t.cpu() for k, t in self._held().items()}
            self._dense = unpack(held, self.grid, self.name).decode(self.stored).to(self.weight_shape.device)
        return self._dense

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return nn.functional.linear(self.reading(x), self.weight.to(x.dtype), self.bias)


class CodebookLinear(_PackedLinear):
    """A linear on codebooks. Those of single columns stay packed in memory; shared ones are decoded for every product.

    Args:
        columns: bits -> number of columns, by rising bits. Others as `_PackedLinear`.
    """

    weight_shape: Tensor

    def __init__(
        self, name: str, linear: nn.Linear, grid: Codebook, columns: Mapping[int, int], outliers: int | None, reading: Reading, stored: torch.dtype
    ) -> None:
        super().__init__(name, linear, grid, outliers, reading, stored)
        books = grid.books(self.out_features, self.in_features)
        if len(columns) > 1:
            self._hold("weight_columns", (self.in_features,), layout.index_dtype(self.in_features))
        for bits, count in columns.items():
            self._hold(f"weight_codes_{bits}", (packed_words(count, bits), self.out_features), torch.int32)
            self._hold(f"weight_levels_{bits}", (count if len(columns) > 1 else books, 1 << bits), torch.float16)
        self.grid: Codebook = grid
        self._packed: PackedColumns | None = None

    @property
    def packed(self) -> PackedColumns:
        """The weight as kernels take it; every index is checked when this is first asked for.

        Raises:
            LowbitError: a tensor is damaged.
        """
        if self._packed is None or self._packed.segments[0].codes.device != self.weight_shape.device:
            self._packed = layout.read(self._held(), self.grid, self.stored, self.name)
        return self._packed

    @property
    def weight(self) -> Tensor:
        """The (out, in) weight in the dtype of the model that was quantized, decoded anew."""
        held = {k: t.cpu() for k, t in self._held().items()}
        return unpack(held, self.grid, self.name).decode(self.stored).to(self.weight_shape.device)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        x = self.reading(x)
        if self.grid.scales_with_inputs:
            y = kernels.linear(x, self.packed)
            return y if self.bias is None else y + self.bias
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
