"""The files of a model besides its weights: which of them an artifact takes over, and why the
others stay behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath

from .checkpoint import Checkpoint
from .repository import TEMPLATES

_OWN = {"README.md", "report.json", "recipe.toml", "proof/", "model.safetensors.index.json"}
_OF_QUANTIZERS = {
    "quantize_config.json",
    "quantization_config.json",
    "quant_config.json",
    "hf_quant_config.json",
}
_OF_RUNS = ("run.json", "lowbit.lock", "moving.json", "shard-*.json", "*.tmp")
_WEIGHTS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".gguf",
    ".ggml",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".msgpack",
    ".npz",
    ".npy",
    ".ot",
    ".tflite",
    ".mlmodel",
    ".index",
    ".tar",
    ".zip",
    ".7z",
    ".gz",
    ".xz",
    ".bz2",
    ".zst",
}
_DECIDING = (  # of the carried ones: what loaders and tokenizers read
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    TEMPLATES + "*",
    "generation_config.json",
    "*processor_config.json",
    "*.py",
)


@dataclass(frozen=True)
class SourceFiles:
    """What becomes of the files beside the weights.

    Attributes:
        carried: names of those that an artifact takes over byte for byte.
        left_out: name -> why it stays behind. A folder's name ends in "/".
    """

    carried: tuple[str, ...]
    left_out: Mapping[str, str]

    @property
    def deciding(self) -> tuple[str, ...]:
        """Those of the carried that decide what a loader makes of the model, or a tokenizer of a
        text; a log beside them does not.
        """
        return tuple(n for n in self.carried if any(fnmatch(n, p) for p in _DECIDING))


def source_files(checkpoint: Checkpoint) -> SourceFiles:
    """Sort the files of a model into those that an artifact takes over and those that stay.

    Tokenizers, templates, generation settings, processors, licenses and code that comes with the
    model are taken over: everything that is neither weights, nor written anew, nor in a folder of
    its own.

    Raises:
        LowbitError: the hub cannot be reached.
    """
    carried, left = [], {}
    for name in checkpoint.files():
        if name in checkpoint.shards or name == "config.json":
            continue
        why = _reason(name) or (None if checkpoint.is_regular(name) else "not a regular file")
        if why is None:
            carried.append(name)
        else:
            left[name] = why
    return SourceFiles(tuple(carried), left)


def _reason(name: str) -> str | None:
    """Why a file stays behind; None if it does not."""
    if name in _OWN:
        return "the artifact has its own"
    if any(fnmatch(name, p) for p in _OF_RUNS):
        return "a name that runs of lowbit use"
    if name.startswith("."):
        return "hidden"
    if name in _OF_QUANTIZERS:
        return "describes another quantization"
    if name.endswith("/"):
        return "a folder, from which nothing is loaded"
    if any(suffix in _WEIGHTS for suffix in PurePosixPath(name.lower()).suffixes):
        return (
            "weights that transformers does not read here, an archive, or a format that can run "
            "code"
        )
    if "/" in name and not name.startswith(TEMPLATES):
        return "in a folder, from which nothing is loaded"
    return None
