"""The files of a model besides its weights: which of them an artifact takes over, and why the others stay behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .checkpoint import TEMPLATES, Checkpoint

_OWN = {"README.md", "report.json", "recipe.toml", "run.json", "proof/", "model.safetensors.index.json"}
_OF_QUANTIZERS = {"quantize_config.json", "quantization_config.json", "quant_config.json", "hf_quant_config.json"}
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz",
    ".npy", ".tflite", ".mlmodel", ".index.json",
)  # fmt: skip


@dataclass(frozen=True)
class SourceFiles:
    """What becomes of the files beside the weights.

    Attributes:
        carried: names of those that an artifact takes over byte for byte.
        left_out: name -> why it stays behind. A folder's name ends in "/".
    """

    carried: tuple[str, ...]
    left_out: Mapping[str, str]


def source_files(checkpoint: Checkpoint) -> SourceFiles:
    """Sort the files of a model into those that an artifact takes over and those that stay.

    Tokenizers, templates, generation settings, processors, licenses and code that comes with the model are taken over: everything
    that is neither weights, nor written anew, nor in a folder of its own.

    Raises:
        LowbitError: the hub cannot be reached.
    """
    carried, left = [], {}
    for name in checkpoint.files():
        if name in checkpoint.shards or name == "config.json":
            continue
        why = _reason(name)
        if why is None:
            carried.append(name)
        else:
            left[name] = why
    return SourceFiles(tuple(carried), left)


def _reason(name: str) -> str | None:
    """Why a file stays behind; None if it does not."""
    if name in _OWN:
        return "the artifact has its own"
    if name.startswith("."):
        return "hidden"
    if name in _OF_QUANTIZERS:
        return "describes another quantization"
    if name.lower().endswith(_WEIGHTS):
        return "weights that transformers does not read here, or a format that can run code"
    if name.endswith("/"):
        return "a folder, from which nothing is loaded"
    if "/" in name and not name.startswith(TEMPLATES):
        return "in a folder, from which nothing is loaded"
    return None
