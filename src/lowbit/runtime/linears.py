"""Linears with packed weights, as the transformers quantizer puts them into a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .. import kernels
from ..errors import LowbitError
from ..formats import codebook
from ..formats.packing import buffers, unpack
from ..grid import AnyGrid, Codebook, InputQuantizer
from ..grid.packed import PackedColumns

# What these return shares memory and is no tensor.
_UNGUARDED = (
    "numpy",
    "__array__",
    "__dlpack__",
)


class ReadOnly(Tensor):
    """A decoded weight to look at. Writing to it would be lost, or kept in memory and lost in the
    next file, so that is refused.
    """

    owner: str

    @classmethod
    def of(cls, t: Tensor, owner: str) -> ReadOnly:
        """The tensor, read-only. ``owner``: the linear's full name, for the error."""
        out = t.detach().as_subclass(cls)
        out.owner = owner
        return out

    @staticmethod
    def refusal(owner: str) -> LowbitError:
        """The error for whoever writes."""
        return LowbitError(
            f"the weight of '{owner}' is packed: nothing can be written to it or merged into it. "
            "Keep adapters beside it, or call "
            "model.dequantize() first, which makes a plain floating-point model."
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Every operation on the plain tensor; what shares its memory is read-only too."""
        kwargs = dict(kwargs or {})
        mine: list[ReadOnly] = []

        def plain(value: Any) -> Any:
            if isinstance(value, cls):
                mine.append(value)
            if not isinstance(value, cls):
                return value
            bare = value.as_subclass(Tensor)
            return bare.clone() if func.__name__ in _UNGUARDED else bare

        written = args[:1] if _writes(func.__name__) or kwargs.get("inplace") is True else ()
        for value in tree_leaves((written, kwargs.get("out"))):
            if isinstance(value, cls):
                raise cls.refusal(value.owner)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*tree_map(plain, tuple(args)), **tree_map(plain, kwargs))

        def guarded(value: Any) -> Any:
            for source in mine if isinstance(value, Tensor) else ():
                if value.untyped_storage()._cdata == source.untyped_storage()._cdata:
                    return cls.of(value, source.owner)
            return value

        with torch._C.DisableTorchFunctionSubclass():
            return tree_map(guarded, out)


def _writes(name: str) -> bool:
    """Whether the function of this name changes its first argument: ``add_``, ``__iadd__``,
    ``__setitem__``, an attribute's ``__set__``.
    """
    if name.startswith("__"):
        return name in ("__set__", "__setitem__") or (
            name.startswith("__i")
            and name not in ("__index__", "__int__", "__invert__", "__iter__")
        )
    return name.endswith("_")


class PackedLinear(nn.Linear):
    """What both kinds share: the place in the model, the reading of the input, the bias, the packed
    tensors as buffers.

    The packed tensors move with the model and are never cast with it: what is saved again is what
    was loaded. A gradient flows to the input; the weight has none and cannot be written to. What is
    made of the tensors for computing is made again where they change, and is not pickled.

    Args:
        name: full name, for errors. linear: what it replaces; may be on the meta device.
        columns: bits -> number of columns, by rising bits, where columns may differ.
        outliers: number of weights kept apart, None without any.
        input_quantizer: what happens to the input. stored: dtype to which decoded weights are
            rounded.
    """

    # nn.Linear's type leaves out that it may have none.
    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        name: str,
        linear: nn.Linear,
        grid: AnyGrid,
        columns: Mapping[int, int],
        outliers: int | None,
        input_quantizer: InputQuantizer,
        stored: torch.dtype,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a dense weight
        self.name, self.grid, self.stored = name, grid, stored
        self.input_quantizer = input_quantizer
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # else transformers decodes the weight while it loads, to see whether it wants initializing
        self._is_hf_initialized = True
        self._made: Any = None
        place, size = linear.weight.device, (self.out_features, self.in_features)
        held = buffers(grid, size, stored, columns, outliers)
        self._first = next(iter(held))
        for local, (shape, dtype) in held.items():
            self.register_buffer(local, torch.empty(shape, dtype=dtype, device=place))
        self.register_parameter("bias", linear.bias)

    @property
    def place(self) -> torch.device:
        """The device of the packed tensors."""
        first: Tensor = getattr(self, self._first)
        return first.device

    def held(self) -> dict[str, Tensor]:
        """The packed tensors by their local names."""
        return {k: t for k, t in self.named_buffers() if k.startswith("weight_")}

    def decoded(self) -> Tensor:
        """The (out, in) weight in the dtype of the model that was quantized, decoded anew, on the
        device of the packed tensors.

        Raises:
            LowbitError: a tensor is damaged.
        """
        where = self.place
        if where.type == "meta":
            return torch.empty(self.out_features, self.in_features, dtype=self.stored, device=where)
        held = {k: t.cpu() for k, t in self.held().items()}
        return unpack(held, self.grid, self.name).decode(self.stored).to(where)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # read-only on purpose
        """As `decoded`, or what is kept of it on this device; whoever writes to it gets a
        LowbitError.
        """
        return ReadOnly.of(self._looked_at(), self.name)

    def _looked_at(self) -> Tensor:
        return self.decoded()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise ReadOnly.refusal(self.name)
        super().__setattr__(name, value)

    def plain(self, dtype: torch.dtype) -> nn.Linear:
        """A linear without packed tensors that does the same to an input that is not quantized; an
        online rotation goes into its weight.
        """
        weight = self.decoded()
        if self.input_quantizer.rotation is not None:
            weight = self.input_quantizer.rotation.inverse(weight.float())
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight.to(dtype))
        plain.register_parameter("bias", self.bias)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, grid={self.grid}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    def _load_from_state_dict(self, *args: Any) -> None:
        self._made = None
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        before = self.held()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, t in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != t.dtype:
                self._buffers[name] = t.to(after.device)
        return self


class DecodedLinear(PackedLinear):
    """A linear whose weight is decoded at the first use and kept. Arguments as `PackedLinear`."""

    def _looked_at(self) -> Tensor:
        """What is kept, if anything is. To look is no reason to keep it: who only asks for a dtype
        would fill the memory.
        """
        made: Tensor | None = self._made
        return self.decoded() if made is None or made.device != self.place else made

    def kept(self) -> Tensor:
        """The decoded weight, made at the first use."""
        if self._made is None or self._made.device != self.place:
            self._keep()
        made: Tensor = self._made
        return made

    @torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
        reason=(
            "packed weights are decoded at the first forward pass: let one pass before a full "
            "graph is compiled"
        )
    )
    def _keep(self) -> None:
        self._made = self.decoded()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return nn.functional.linear(self.input_quantizer(x), self.kept().to(x.dtype), self.bias)


class CodebookLinear(PackedLinear):
    """A linear on codebooks. Those of single columns stay packed in memory; shared ones are decoded
    for every product. Arguments as `PackedLinear`.
    """

    grid: Codebook

    @property
    def packed(self) -> PackedColumns:
        """The weight as kernels take it; every index is checked when this is first asked for.

        Raises:
            LowbitError: a tensor is damaged.
        """
        if self._made is None or self._made.segments[0].codes.device != self.place:
            self._made = codebook.read(self.held(), self.grid, self.stored, self.name)
        made: PackedColumns = self._made
        return made

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        x = self.input_quantizer(x)
        if self.grid.scales_with_inputs:
            y: Tensor = self._product(x)
            return y if self.bias is None else y + self.bias
        return nn.functional.linear(x, self.decoded().to(x.dtype), self.bias)

    @torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
        reason=(
            "weights on codebooks are multiplied by kernels that no graph can hold: compile "
            "without fullgraph=True"
        )
    )
    def _product(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.packed)


MODULES: dict[type[AnyGrid], type[PackedLinear]] = {Codebook: CodebookLinear}
"""Modules for weights that are not decoded once and kept."""


def module_for(grid: AnyGrid) -> type[PackedLinear]:
    """The kind of module for weights on a grid."""
    return MODULES.get(type(grid), DecodedLinear)
