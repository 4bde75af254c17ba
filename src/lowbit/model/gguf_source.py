"""A GGUF file as a checkpoint: its tensors dequantized when they are read, in the names, the order
and the sizes that transformers has; config.json and the tokenizer as transformers saves them.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from .checkpoint import FLOATS, Stored
from .computed import At, Computed, spans_of
from .gguf_file import GGUFFile, package
from .gguf_names import Translated
from .repository import Repository
from .skeleton import reason_of

_ROTARY = "rope_freqs.weight"
_QUANTIZED = "BF16"  # what tensors of quantized types are rounded to


@dataclass(frozen=True)
class FromGGUF:
    """A parameter that is made of tensors of a GGUF file; see `lowbit.model.computed.View`.

    Attributes:
        name: of the parameter. tensors: of the gguf package, one or, of gate and up, two.
        shape, kind: as it is shown. translated: the file.
    """

    name: str
    tensors: tuple[Any, ...]
    shape: tuple[int, ...]
    kind: str
    translated: Translated

    @property
    def stored(self) -> Stored:
        return Stored(self.shape, self.kind)

    def read(self, at: At) -> Tensor:
        spans, pick = spans_of(at, self.shape)
        of_experts = len(self.shape) == 3 and all(t.data.ndim == 3 for t in self.tensors)
        first = spans[0] if of_experts else slice(None)
        made = self._made(first).to(FLOATS[self.kind])
        wanted = self.shape
        if of_experts:
            wanted, spans = (first.stop - first.start, *wanted[1:]), (slice(None), *spans[1:])
        if tuple(made.shape) != wanted:
            raise LowbitError(
                f"'{self.tensors[0].name}' of '{self.translated.file.path}' becomes a tensor of "
                f"shape {tuple(made.shape)}, where '{self.name}' has {wanted}."
            )
        return made[spans][pick].contiguous()

    def _made(self, experts: slice) -> Tensor:
        """The parameter, or that of some experts, in float32, by transformers' own steps."""
        gguf, view = package(), self.translated
        joined: dict[str, dict[str, Tensor]] = {"tensors": {}}
        for tensor in self.tensors:
            done = view.processor.process(
                weights=gguf.dequantize(tensor.data[experts], tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=view.names,
                parsed_parameters=joined,
            )
            if done.name is not None:
                return torch.from_numpy(done.weights.copy())
        return joined["tensors"][self.name]


class GGUFSource(Computed):
    """A GGUF file, or all parts of one.

    Its config.json and tokenizer lie in a temporary folder as long as this object lives.

    Args:
        path: the file, or any part of a split one.

    Raises:
        LowbitError: it cannot be read, is of an architecture or holds tensors of a type that is not
            read, or has no tokenizer.
    """

    def __init__(self, path: Path) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="lowbit-gguf-")
        self.repository = Repository(str(path), Path(self._place.name))
        self._translated = Translated.of(GGUFFile(path))
        self._files = {p.name: p for p in self._translated.file.parts}
        self.shards = tuple(self._files)
        self._held = {}  # all that is shown is computed
        self._check_types()
        self._save_config()
        self._save_tokenizer()
        self.config_json = self.repository.read_json("config.json")

    def _check_types(self) -> None:
        """Raise LowbitError if a tensor's type cannot be dequantized."""
        import numpy

        gguf = package()
        for tensor in self._used.values():
            kind = tensor.tensor_type
            block = numpy.zeros(gguf.GGML_QUANT_SIZES[kind][1], numpy.uint8)
            try:
                gguf.dequantize(block.view(tensor.data.dtype), kind)
            except NotImplementedError as e:
                raise LowbitError(
                    f"tensor '{tensor.name}' of '{self.name}' is of type {kind.name}, which the "
                    "gguf package cannot dequantize. Give a file of another type."
                ) from e

    def _save_config(self) -> None:
        config = self._translated.config
        config.architectures = [type(self._translated.skeleton).__name__]
        counted: Counter[str] = Counter()
        for view in self.views.values():
            counted[view.kind] += math.prod(view.shape)
        config.dtype = FLOATS[counted.most_common(1)[0][0]] if counted else None
        config.save_pretrained(self._place.name)

    def _save_tokenizer(self) -> None:
        from transformers import AutoTokenizer

        first = self._translated.file.first
        try:
            tokenizer = AutoTokenizer.from_pretrained(first.parent, gguf_file=first.name)
            tokenizer.save_pretrained(self._place.name)
        except Exception as e:  # each kind of tokenizer fails in ways of its own
            raise LowbitError(
                f"transformers cannot make a tokenizer of what '{self.name}' holds: {reason_of(e)}"
            ) from e

    @cached_property
    def _used(self) -> dict[str, Any]:
        """Tensors of the file that the model has a parameter for, by the name in the map."""
        known = self._translated.names
        out = {}
        for name, tensor in self._translated.file.tensors.items():
            key = name if name in known else name.removesuffix(".weight")  # of experts
            if key in known:
                out[key] = tensor
        return out

    @cached_property
    def views(self) -> Mapping[str, FromGGUF]:
        """See `Computed`."""
        made: dict[str, list[Any]] = {}
        for key, tensor in self._used.items():
            made.setdefault(self._translated.names[key], []).append(tensor)
        wanted = {n: tuple(t.shape) for n, t in self._translated.skeleton.state_dict().items()}
        out = {}
        for name, tensors in made.items():
            shape = wanted[name]
            if sum(int(t.n_elements) for t in tensors) != math.prod(shape):
                shape = tuple(int(n) for n in reversed(tensors[0].shape))
            kinds = {t.tensor_type.name for t in tensors}
            kind = next((k for k in FLOATS if kinds == {k}), _QUANTIZED)
            out[name] = FromGGUF(name, tuple(tensors), shape, kind, self._translated)
        return out

    @property
    def nbytes(self) -> int:
        """See `Checkpoint`."""
        return sum(int(t.n_bytes) for t in self._translated.file.tensors.values())

    @cached_property
    def left_out(self) -> Mapping[str, str]:
        """See `Checkpoint`: what no parameter of transformers is made of."""
        used = {t.name for t in self._used.values()}
        why = "not a tensor that transformers reads from GGUF files"
        return {n: why for n in self._translated.file.tensors if n not in used}

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """See `Checkpoint`: what the weights were, and what of the file is not read."""
        counted: Counter[str] = Counter()
        for tensor in self._used.values():
            counted[tensor.tensor_type.name] += int(tensor.n_elements)
        types = ", ".join(kind for kind, _ in counted.most_common())
        rounded = any(kind not in FLOATS for kind in counted)
        said = [
            f"weights were GGUF ({types}): figures are against their dequantized values"
            + (", rounded to bfloat16" if rounded else "")
        ]
        scaled = self._rotary_scaling()
        if scaled is not None:
            said.append(
                f"the file scales its rotary frequencies ('{scaled}'), which transformers does not "
                "read from GGUF files of this architecture: the model is computed without it"
            )
        others = [n for n in self.left_out if n != _ROTARY]
        if others:
            said.append(f"of the file {len(others)} tensors are not read ('{others[0]}')")
        unread = self._translated.unread
        if unread:
            said.append(f"of its header {len(unread)} entries are not read ('{unread[0]}')")
        return tuple(said)

    def _rotary_scaling(self) -> str | None:
        """What of the file scales rotary frequencies and is not read, None if nothing does."""
        if _ROTARY in self.left_out:
            return _ROTARY
        key = f"{self._translated.file.architecture}.rope.scaling.type"
        kind = self._translated.file.field(key)
        read = (self.config_json.get("rope_parameters") or {}).get("rope_type", "default")
        return key if kind not in (None, "none") and read == "default" else None

    def file(self, name: str) -> Path | None:
        """See `Checkpoint`."""
        return self._files.get(name) or super().file(name)
