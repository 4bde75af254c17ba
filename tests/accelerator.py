"""A pretend accelerator: tensors that say they lie on a device of their own, computed on the CPU.

What a GPU refuses raises here too: operands on two devices, a random generator of the other device,
a pointer to device memory. What makes the host wait for a GPU is counted by the line of lowbit that
asked for it. Times and kernels are not imitated.

torch's "lazy" device lends its name: it has no implementation of its own, and factories reach a
dispatch mode.
"""

from __future__ import annotations

import collections
import functools
import itertools
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit
from lowbit.run import shards

NAME = "lazy"
# As on CUDA, a tensor's device has an index where the one asked for had none.
_DEVICE = torch.device(NAME, 0)
_PACKAGE = f"{Path(lowbit.__file__).parent}{os.sep}"

_Operator = Any  # torch._ops.OpOverload
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
_TAKES_SCALARS = {"fill_", "fill", "masked_fill", "masked_fill_"}  # besides all pointwise operators
# Besides what torch marks by its tags.
_READ_BACK = {
    "_linalg_check_errors",
    "linalg_eigh",
    "_linalg_eigh",
}
_READ_BACK_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class OnDevice(torch.Tensor):
    """A tensor of the pretend accelerator; ``held`` is the CPU tensor with its numbers."""

    held: torch.Tensor
    owner: Accelerator

    @staticmethod
    def __new__(cls, held: torch.Tensor, owner: Accelerator) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=_DEVICE,
        )
        made.held, made.owner = held, owner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: _Operator, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Reached from autograd's threads, where no mode is active."""
        first = next(
            t for t in _tensors([*args, *(kwargs or {}).values()]) if isinstance(t, OnDevice)
        )
        return first.owner.run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnDevice({self.held!r})"

    def __getitem__(self, index: Any) -> torch.Tensor:
        """torch makes an index of a list in C++, where no mode sees it."""

        def sent(i: Any) -> Any:
            if not isinstance(i, list):
                return i
            self.owner.waits_for("an index from a list")
            return OnDevice(torch.tensor(i), self.owner)

        return super().__getitem__(
            tuple(map(sent, index)) if isinstance(index, tuple) else sent(index)
        )

    def tolist(self) -> Any:
        self.owner.waits_for("tolist")
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"numpy() of a tensor on the accelerator, at {_place()}")

    def data_ptr(self) -> int:
        raise RuntimeError(
            "data_ptr() of a tensor on the accelerator, which code for the CPU would read, at "
            f"{_place()}"
        )

    def record_stream(self, _: Any) -> None:
        """Memory of this accelerator is never given away early."""


class Accelerator(TorchDispatchMode):
    """While it is entered, device "lazy" can be computed on.

    Attributes:
        waits: how often the host waited for the device, by (what, where in lowbit).
        operations: how many operators ran on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.operations = 0
        self._generators: list[torch.Generator] = []
        self._locked: list[
            torch.Tensor
        ] = []  # page-locked host memory; held, so that no address is used twice

    def __torch_dispatch__(
        self, func: _Operator, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def generator(self) -> type[torch.Generator]:
        """What stands in for torch.Generator: one of this device is the CPU's, and noted."""
        noted = self._generators

        class Generator(torch.Generator):
            def __new__(cls, device: Any = "cpu") -> torch.Generator:
                made = super().__new__(cls)
                if torch.device(device).type == NAME:
                    noted.append(made)
                return made

        return Generator

    def waits_for(self, what: str) -> None:
        self.waits[what, _place()] += 1

    def run(self, func: _Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One operator: refused or counted, computed on the CPU, its results put where a GPU would
        have them.
        """
        name = func.overloadpacket.__name__
        tensors = list(_tensors([*args, *kwargs.values()]))
        inside = [t for t in tensors if isinstance(t, OnDevice)]
        asked = kwargs.get("device")
        there = bool(inside) if asked is None else torch.device(asked).type == NAME
        if name == "copy_":
            there = isinstance(args[0], OnDevice)
        if not there and not inside:
            return self._on_host(func, args, kwargs)
        self._check_generator(name, kwargs.get("generator"), there)
        if name in ("copy_", "_to_copy"):
            source = args[0 if name == "_to_copy" else 1]
            target = args[0] if name == "copy_" else None
            self._count_copy(source, target, [*args[2:], kwargs.get("non_blocking")], there)
        elif inside:
            if len(inside) < len(tensors):
                self._refuse(func, name, args, kwargs, tensors)
            self._count(func, name, args, kwargs)
        self.operations += not func.is_view
        given = {k: _held(v) for k, v in kwargs.items()}
        if asked is not None:
            given["device"] = torch.device("cpu")
        out = func(*map(_held, args), **given)
        return _wrapped(out, _written(func, args, kwargs), self if there else None)

    def _on_host(self, func: _Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        self._check_generator(func.overloadpacket.__name__, kwargs.get("generator"), False)
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        out = func(*args, **{**kwargs, "pin_memory": False})  # only a driver can lock pages
        self._locked.append(out)
        return out

    def _refuse(
        self,
        func: _Operator,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tensors: list[torch.Tensor],
    ) -> None:
        """Raise where operands lie on two devices and a GPU would not take them."""
        outside = [t for t in tensors if not isinstance(t, OnDevice)]
        if name in _INDEXED and isinstance(args[0], OnDevice):  # the index may lie on the CPU
            outside = [
                t
                for t in args[2:3]
                if isinstance(t, torch.Tensor) and not isinstance(t, OnDevice) and t.dim()
            ]
        elif torch.Tag.pointwise in func.tags or name in _TAKES_SCALARS:
            outside = [t for t in outside if t.dim()] + [
                t for t in _written(func, args, kwargs) if not isinstance(t, OnDevice)
            ]
        if outside:
            shapes = [tuple(t.shape) for t in outside]
            raise RuntimeError(
                f"{name} mixes devices: tensors of shapes {shapes} are on the CPU, at {_place()}"
            )

    def _check_generator(self, name: str, generator: Any, there: bool) -> None:
        if generator is not None and there != any(
            generator._cdata == g._cdata for g in self._generators
        ):
            raise RuntimeError(f"{name} was given a generator of the other device, at {_place()}")

    def _count_copy(
        self,
        source: torch.Tensor,
        target: torch.Tensor | None,
        non_blocking: Iterable[Any],
        there: bool,
    ) -> None:
        if not there:
            if target is None or not (any(non_blocking) and self._page_locked(target)):
                self.waits_for("a copy to the host")
        elif not isinstance(source, OnDevice) and not (
            any(non_blocking) and self._page_locked(source)
        ):
            self.waits_for("a copy to the device")

    def _count(
        self, func: _Operator, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        if name in _INDEXED:
            indices = [i for i in args[1] if i is not None]
            if not all(isinstance(i, OnDevice) for i in indices):
                self.waits_for("an index from the host")
            masked = any(i.dtype in (torch.bool, torch.uint8) for i in indices)
            # One number is filled in by the mask itself.
            if masked and (name == "index" or args[2].numel() != 1):
                self.waits_for("an index by a mask")
        elif (name in _READ_BACK or _READ_BACK_TAGS & set(func.tags)) and kwargs.get(
            "output_size"
        ) is None:
            self.waits_for(name)

    def _page_locked(self, t: torch.Tensor) -> bool:
        address = t.untyped_storage().data_ptr()
        return any(address == locked.untyped_storage().data_ptr() for locked in self._locked)


class Stream:
    """Stands in for torch.Stream and what it hands out: on this accelerator all work is done in
    turn.
    """

    def __init__(self, device: Any = None) -> None:
        assert torch.device(device).type == NAME

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def wait_stream(self, _: Stream) -> None: ...

    def wait_event(self, _: Stream) -> None: ...

    def record_event(self) -> Stream:
        return self


def entered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    """An accelerator for a test, as a fixture's body; what torch asks drivers for in C++ is
    answered by stand-ins.
    """
    accelerator = Accelerator()
    monkeypatch.setattr(torch, "Generator", accelerator.generator())
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.accelerator, "current_stream", Stream)
    monkeypatch.setattr(
        torch.accelerator, "synchronize", lambda _: accelerator.waits_for("all work")
    )
    monkeypatch.setattr(torch, "tensor", _sent(torch.tensor))
    monkeypatch.setattr(torch, "autocast", _on_cpu(torch.autocast))
    monkeypatch.setattr(torch, "is_autocast_enabled", _on_cpu(torch.is_autocast_enabled))
    # A mode is of the thread that entered it.
    monkeypatch.setattr(shards, "beside", _everywhere(accelerator, shards.beside))
    with accelerator:
        yield accelerator


def _everywhere(accelerator: Accelerator, begin: Callable[..., Any]) -> Callable[..., Any]:
    """What begins work in a thread, the accelerator being there, too."""

    def begun(work: Callable[[], Any], name: str) -> Any:
        def entered_there() -> Any:
            with accelerator:
                return work()

        return begin(entered_there, name)

    return begun


def _sent(made: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.tensor, whose device no mode is asked for."""

    def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        out = made(data, **options)
        return out if device is None else out.to(device)

    return tensor


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast of this device is the CPU's."""

    def called(device_type: str = "cpu", *args: Any, **options: Any) -> Any:
        return function("cpu" if device_type == NAME else device_type, *args, **options)

    return called


def _place() -> str:
    """The three innermost lines of lowbit in the stack."""
    frames = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None))
    lines = (
        f"{name[len(_PACKAGE) :]}:{line}" for name, line in frames if name.startswith(_PACKAGE)
    )
    return " < ".join(itertools.islice(lines, 3)) or "outside lowbit"


# --- an operator's arguments: tensors, lists of tensors and others; torch's own trees would take mo


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for v in values:
        if isinstance(v, torch.Tensor):
            yield v
        elif isinstance(v, (list, tuple)):
            yield from _tensors(v)


def _held(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.held
    return [_held(v) for v in value] if isinstance(value, (list, tuple)) else value


def _written(func: _Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    return list(
        _tensors(args[i] if i < len(args) else kwargs.get(name) for i, name in _outputs(func))
    )


@functools.cache
def _outputs(func: _Operator) -> list[tuple[int, str]]:
    """Position and name of the arguments that an operator writes."""
    return [
        (i, a.name)
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]


def _wrapped(out: Any, written: Sequence[torch.Tensor], owner: Accelerator | None) -> Any:
    """Results on the device; one that was written in place is the tensor that was given."""
    if isinstance(out, torch.Tensor):
        for t in written:
            if isinstance(t, OnDevice) and t.held is out:
                return t
        return out if owner is None else OnDevice(out, owner)
    if isinstance(out, (list, tuple)):
        return type(out)([_wrapped(o, written, owner) for o in out])
    return out
