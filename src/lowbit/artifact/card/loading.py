"""The section "Loading": a few lines for every runtime that reads the format."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from ...formats import LAYOUTS, awq, gptq, mlx, native
from ...formats.uniform import as_uniform
from ...grid.names import parse_scheme
from ...verbatim import code_block
from .facts import GGUF, for_vllm, grids_of


def loading(report: Mapping[str, Any]) -> str:
    """Return the section."""
    format_ = report["format"]
    if format_ == GGUF:
        return "\n\n".join(("## Loading", *_llama_cpp(report["gguf"]["file"])))
    if format_ == mlx.NAME:
        ways = _mlx()
    elif format_ in (gptq.V1, gptq.V2, awq.NAME):
        ways = _gptqmodel(report)
    elif format_ == native.NAME:
        ways = _lowbit(report)
    elif for_vllm(report):
        ways = [
            *_vllm(report),
            "transformers alone ignores what this export is for, and computes something else.",
        ]
    else:
        ways = [*_compressed_tensors(report), *_vllm(report)]
    where = "`MODEL` stands for this directory, or for its name on the Hub."
    return "\n\n".join(("## Loading", where, *ways))


def _way(name: str, *parts: str) -> str:
    return "\n\n".join((f"### {name}", *parts))


def _transformers(report: Mapping[str, Any], options: str = "") -> tuple[str, ...]:
    """Return the lines of Python that load MODEL and continue a text."""
    kind = report.get("class", "AutoModelForCausalLM")
    return (
        f"from transformers import {kind}, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("MODEL")',
        f'model = {kind}.from_pretrained("MODEL"{options})',
        'ids = tokenizer("Once", return_tensors="pt").input_ids',
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=32)[0]))",
    )


def _compressed_tensors(report: Mapping[str, Any]) -> list[str]:
    versions = report["versions"]
    oldest = "0.17" if any(g.bits in (3, 5, 6, 7) for g in grids_of(report)) else "0.15"
    tried = (
        f"Weights are decoded at load or at the first use, by compressed-tensors {oldest} or "
        f"newer. Tried with transformers {versions['transformers']} and compressed-tensors "
        f"{versions['compressed-tensors']}; lowbit is not needed."
    )
    install = code_block("sh", "pip install transformers compressed-tensors")
    return [_way("transformers", tried, install, code_block("python", *_transformers(report)))]


def _lowbit(report: Mapping[str, Any]) -> list[str]:
    why = report.get("beyond_compressed_tensors")
    needs = f"Needs lowbit, for {why}." if why else "Needs lowbit."
    text = (
        f"{needs} Tried with transformers {report['versions']['transformers']}; without the import "
        "it warns of missing weights and makes them up."
    )
    load = code_block(
        "python", "import lowbit  # before the model is loaded", *_transformers(report)
    )
    ways = [_way("transformers", text, load)]
    if any(LAYOUTS[type(g)].is_gguf for g in grids_of(report)):
        about = "The blocks are those of GGUF; a file for it:"
        export = code_block("sh", "lowbit export MODEL --to gguf -o DIR")
        ways.append(_way("llama.cpp", about, export))
    return ways


def _llama_cpp(file: str) -> list[str]:
    call = (
        "from llama_cpp import Llama",
        "",
        f"model = Llama({json.dumps(file)})",
        'print(model("Once", max_tokens=32)["choices"][0]["text"])',
    )
    shell = code_block("sh", shlex.join(["llama-cli", "-m", file, "-p", "Once"]))
    return [_way("llama.cpp", shell), _way("llama-cpp-python", code_block("python", *call))]


def _mlx() -> list[str]:
    generate = 'mlx_lm.generate --model MODEL --prompt "Once"'
    return [_way("mlx-lm", code_block("sh", "pip install mlx-lm", generate))]


def _gptqmodel(report: Mapping[str, Any]) -> list[str]:
    format_, grids = report["format"], grids_of(report)
    install = code_block("sh", "pip install transformers optimum gptqmodel")
    load = code_block("python", "import torch", *_transformers(report, ", dtype=torch.bfloat16"))
    ways = [_way("transformers", install, load)]
    if format_ != awq.NAME:
        own = ("from gptqmodel import GPTQModel", "", 'model = GPTQModel.load("MODEL")')
        ways.append(_way("GPTQModel", code_block("python", *own)))
    if format_ == gptq.V1 and all(g.bits in (4, 8) for g in grids):
        ways += _served("any recent version takes 4 and 8 bits in this format")
    if format_ == awq.NAME and all(g.group_size in (32, 64, 128) for g in grids):
        ways += _served("any recent version takes these groups in this format")
    return ways


def _vllm(report: Mapping[str, Any]) -> list[str]:
    """Return vLLM's way, by its rules for compressed-tensors, or nothing where it has none.

    Its fused linears must share a grid, so only a model with one grid for all is offered.
    """
    grids = grids_of(report)
    grid, size = as_uniform(grids[0]), grids[0].group_size
    activations = parse_scheme(report["recipe"]["scheme"]).activation_bits
    if grid is None:
        return []
    odd_groups = size is not None and (size < 8 or size & (size - 1))
    too_wide = activations == 4 and grid.bits > 4
    if len(grids) > 1 or grid.bits == 1 or odd_groups or too_wide:
        return []
    if for_vllm(report):
        alone = ", on one device, since it refuses online rotations under tensor parallelism"
        return _served(f"0.33 or newer{alone if report.get('online_rotations', True) else ''}")
    if activations:
        return _served(
            f"0.33 or newer, {activations}-bit activations on compute capability 8.0 or newer"
        )
    if grid.bits in (4, 8):
        return _served("any recent version")
    newest = "0.25" if grid.symmetric and grid.bits == 2 else "0.33"
    kind = "symmetric" if grid.symmetric else "asymmetric"
    return _served(f"{newest} or newer for {kind} weights of {grid.bits} bits, on NVIDIA GPUs")


def _served(versions: str) -> list[str]:
    serve = code_block("sh", "vllm serve MODEL")
    return [_way("vLLM", f"By its sources, {versions}; not run.", serve)]
