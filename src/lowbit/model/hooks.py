"""Hooks that live for one pass: inputs quantized on their way, calls shown to a visitor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..grid import InputQuantizer
from .statistics import Call


class AllSeen(Exception):
    """Everything that was asked for has been seen: the rest of the pass need not run."""


@contextmanager
def quantized_inputs(
    module: nn.Module, input_quantizers: Mapping[str, InputQuantizer]
) -> Iterator[None]:
    """Within, linears that run get their inputs through these input quantizers."""
    handles: list[RemovableHandle] = []
    # Linears of a site read the same tensor: prepare it once.
    last: list[tuple[Tensor, InputQuantizer, Tensor]] = []

    def hook_of(input_quantizer: InputQuantizer) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if not (last and last[0][0] is args[0] and last[0][1] is input_quantizer):
                last[:] = [(args[0], input_quantizer, input_quantizer(args[0]))]
            return (last[0][2], *args[1:])

        return hook

    try:
        for name, one in input_quantizers.items():
            handles.append(module.get_submodule(name).register_forward_pre_hook(hook_of(one)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(
    module: nn.Module, names: Sequence[str], visit: Callable[[str, Call], None]
) -> Iterator[set[str]]:
    """Within, passes show their calls of some submodules, and end with `AllSeen` when the set
    given, the names still to come, is empty.
    """
    handles: list[RemovableHandle] = []
    left: set[str] = set()

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            visit(name, Call(args, kwargs))
            left.discard(name)
            if not left:
                raise AllSeen

        return hook

    try:
        for name in names:
            submodule = module.get_submodule(name)
            handles.append(submodule.register_forward_pre_hook(hook_of(name), with_kwargs=True))
        yield left
    finally:
        for handle in handles:
            handle.remove()
