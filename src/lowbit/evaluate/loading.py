"""Models for an evaluation, loaded through plain transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..arithmetic import DTYPES
from ..errors import LowbitError, unknown
from ..model.checkpoint import Checkpoint
from ..model.config import load_config
from ..model.intake import check_read_as_floats, is_leftover
from ..model.skeleton import build_skeleton, reason_of
from ..model.source import open_files, open_source
from ..model.wrapper import class_for


def load_causal_lm(model: str, device: str, dtype: str = "auto") -> Any:
    """Load a model through plain transformers.

    Args:
        model: local folder or hub id, of floats or of codes that transformers can read, or a GGUF
            file, which is dequantized. No code that comes with it is run.
        device: such as "cpu" or "cuda:0".
        dtype: auto, float32, bfloat16 or float16. "auto" is float32 on a CPU and the checkpoint's
            own dtype elsewhere.

    Raises:
        LowbitError: missing, unreadable, unsupported, or without some of its tensors.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    checkpoint = _opened(model)
    stored = checkpoint.stored()  # finds missing and truncated shards before transformers does
    config = load_config(checkpoint)
    leftover = is_leftover(checkpoint, stored)
    if leftover and "quantization_config" in config:
        del config.quantization_config
    if dtype == "auto" and torch.device(device).type == "cpu":
        dtype = "float32"
    loaded, found = _from_pretrained(checkpoint, config, dtype)
    _check_keys(model, found)
    # Of a checkpoint of codes its loader knows what the numbers mean.
    if leftover or not checkpoint.config_json.get("quantization_config"):
        check_read_as_floats(checkpoint, stored, _unused(loaded, found, stored))
    return loaded.to(device).eval()


def _opened(model: str) -> Checkpoint:
    """The model's files, or what a run reads of them: transformers loads FP8 and MXFP4 in other
    ways on other devices, some of which leave weights in another dtype than their inputs.
    """
    files = open_files(model)
    said = files.config_json.get("quantization_config")
    # The loader of these computes what servers do, inputs quantized.
    if isinstance(said, Mapping) and said.get("quant_method") == "compressed-tensors":
        return files
    read = open_source(model)
    return files if read.loadable else read


def _from_pretrained(
    checkpoint: Checkpoint, config: Any, dtype: str
) -> tuple[Any, Mapping[str, Any]]:
    """Return the model and what transformers says of the keys it found and missed."""
    path = checkpoint.file("config.json")
    assert path is not None  # Checkpoint() has checked
    kind: Any = class_for(config)
    given: dict[str, Any] = {"pretrained_model_name_or_path": path.parent}
    if not checkpoint.loadable:
        kind = type(build_skeleton(config, checkpoint.name))
        tensors = checkpoint.read(checkpoint.stored())
        given = {"pretrained_model_name_or_path": None, "state_dict": tensors}
    try:
        loaded, found = kind.from_pretrained(
            **given,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_keys` refuses them, by name
        )
    except Exception as e:  # each model class and each quantizer fails in ways of its own
        raise LowbitError(f"transformers cannot load '{checkpoint.name}': {reason_of(e)}") from e
    return loaded, found


def _check_keys(model: str, found: Mapping[str, Any]) -> None:
    """Refuse tensors of the wrong shape, and missing ones: transformers makes random ones up."""
    mismatched, missing = found["mismatched_keys"], found["missing_keys"]
    if mismatched:
        name, held, wanted = min(mismatched)
        raise LowbitError(
            f"tensor '{name}' of '{model}' is {tuple(held)}, its config.json wants {tuple(wanted)} "
            f"({len(mismatched)} such in all): the checkpoint does not fit its config.json."
        )
    if missing:
        raise LowbitError(
            f"tensor '{min(missing)}' is missing from '{model}' ({len(missing)} in all): "
            "the checkpoint does not fit its config.json."
        )


def _unused(loaded: Any, found: Mapping[str, Any], stored: Iterable[str]) -> set[str]:
    """Return the names of the tensors that the loader did not need."""
    # Those that a model class ignores by pattern are not among the unexpected ones.
    ignored = [re.compile(p) for p in loaded._keys_to_ignore_on_load_unexpected or ()]
    dropped = {name for name in stored if any(p.search(name) for p in ignored)}
    return dropped | set(found["unexpected_keys"])
