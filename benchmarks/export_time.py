"""Seconds of an export against copying the artifact: a synthetic one of about 1 GB, its blocks
shaped like those of a 7B Llama.

    python benchmarks/export_time.py OUT.json WORK [BLOCKS]

Writes the artifact (random codes) into WORK, copies it there, and exports it to every format that
takes it. The copy is flushed to disk, as the exports are. The exports read, hash and compare
everything that they wrote, without the closing run of the model in its runtime, whose time is that
of a forward pass. Seconds are by the clock and of processors ("busy"). Prints a table and writes
JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

import lowbit
import lowbit.export.place
from lowbit.artifact.files import PROOF, file_hash, read_shard, save_shard, tensor_hash
from lowbit.artifact.proof import verify
from lowbit.demo import demo_model
from lowbit.export import export
from lowbit.formats import affine
from lowbit.formats import compressed_tensors as ct
from lowbit.grid import Affine, AffineParams, QTensor

HIDDEN, INNER = 4096, 11008


def shapes() -> dict[str, tuple[int, int]]:
    attention = {f"self_attn.{n}_proj": (HIDDEN, HIDDEN) for n in "qkvo"}
    return {
        **attention,
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }


def synthetic(folder: Path, grid: Affine, blocks: int) -> int:
    """Write an artifact; its bytes."""
    g = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    config = AutoConfig.from_pretrained(demo_model()).to_dict() | {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": blocks,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": HIDDEN // 32,
        "dtype": "float16",
    }
    linears, shards, grids = [], {}, {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_shard(folder / name, tensors)
        path = folder / name
        shards[name] = {
            "sha256": file_hash(path),
            "bytes": path.stat().st_size,
            "tensors": {k: tensor_hash(t) for k, t in read_shard(path).items()},
        }

    write(
        "model-00000.safetensors",
        {
            "model.embed_tokens.weight": torch.randn(
                config["vocab_size"], HIDDEN, generator=g
            ).half(),
            "model.norm.weight": torch.ones(HIDDEN).half(),
        },
    )
    for i in range(blocks):
        tensors = {
            f"model.layers.{i}.{n}_layernorm.weight": torch.ones(HIDDEN).half()
            for n in ("input", "post_attention")
        }
        for local, (rows, columns) in shapes().items():
            name = f"model.layers.{i}.{local}"
            groups = columns // grid.group(columns)
            scale = torch.rand(rows, groups, generator=g).half().float() * 0.01 + 0.001
            zero = (
                torch.full((rows, groups), float(1 << (grid.bits - 1)))
                if grid.symmetric
                else torch.randint(0, grid.top + 1, (rows, groups), generator=g).float()
            )
            codes = torch.randint(0, grid.top + 1, (rows, columns), generator=g, dtype=torch.uint8)
            q = QTensor(grid, codes, grid.stored(AffineParams(scale, zero), torch.float16))
            packed = affine.pack(q, torch.float16)
            tensors |= {f"{name}.{k}": t for k, t in packed.items()}
            size = sum(t.nbytes for t in packed.values())
            linears.append(
                {
                    "name": name,
                    "scheme": str(grid),
                    "shape": [rows, columns],
                    "bytes": size,
                    "bits_per_weight": 8 * size / codes.numel(),
                }
            )
            grids[name] = grid
        write(f"model-{i + 1:05d}.safetensors", tensors)
    config["quantization_config"] = ct.describe(grids, ["lm_head"])
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "recipe.toml").write_text("")
    AutoTokenizer.from_pretrained(demo_model()).save_pretrained(folder)
    save_shard(
        folder / PROOF,
        {
            "ids": torch.zeros(1, 8, dtype=torch.int64),
            "logits": torch.zeros(1, 8, config["vocab_size"]),
        },
    )
    index = {"metadata": {}, "weight_map": {t: n for n, s in shards.items() for t in s["tensors"]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    total = sum(s["bytes"] for s in shards.values())
    files = {
        n: file_hash(folder / n)
        for n in ("config.json", "recipe.toml", PROOF.as_posix(), "model.safetensors.index.json")
    }
    report = {
        "lowbit": lowbit.__version__,
        "versions": {"transformers": "", "compressed-tensors": ""},
        "model": "synthetic",
        "format": ct.NAME,
        "seed": 0,
        "device": "cpu",
        "compute": "torch.float32",
        "recipe": {
            "name": "none",
            "scheme": f"W{grid.bits}A16"
            + (f"g{grid.group_size}" if grid.group_size else "")
            + ("sym" if grid.symmetric else ""),
            "methods": [],
        },
        "calibration": {"source": "none", "samples": 0, "length": 0, "sha256": ""},
        "quality": None,
        "blocks": [],
        "hash": hashlib.sha256(b"").hexdigest(),
        "size": {
            "before": 2 * total,
            "after": total,
            "bits_per_weight": 0.0,
            "model_bits_per_weight": 1.0,
        },
        "files": files,
        "linears": [*linears, {"name": "lm_head", "skipped": "head"}],
        "shards": shards,
    }
    (folder / "report.json").write_text(json.dumps(report))
    return total


Times = tuple[float, float]


def clocks() -> Times:
    """Seconds by the clock, and of all processors for this process."""
    return time.perf_counter(), time.process_time()


def since(start: Times) -> Times:
    wall, busy = clocks()
    return wall - start[0], busy - start[1]


def copied(folder: Path, to: Path) -> Times:
    start = clocks()
    shutil.copytree(folder, to)
    for path in to.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
    times = since(start)
    shutil.rmtree(to)
    return times


def exported(folder: Path, to: Path, target: str) -> Times:
    shutil.rmtree(to, ignore_errors=True)
    start = clocks()
    export(folder, to, target)
    return since(start)


def least(times: Iterable[Times]) -> Times:
    """The least of each clock."""
    wall, busy = zip(*times, strict=True)
    return min(wall), min(busy)


def main() -> None:
    out, work, *count = sys.argv[1:]
    blocks, at, results = int(count[0]) if count else 9, Path(work), []
    lowbit.export.place.verify = partial(verify, loader=False)
    print(
        f"{'artifact':12} {'to':10} {'GB':>6} {'seconds':>8} {'copying':>8} {'ratio':>6} "
        f"{'busy':>6} {'copying':>8} {'ratio':>6}"
    )
    for grid, targets in (
        (Affine(4, 128, True), ("gptq", "mlx", "gguf:q4_0")),
        (Affine(4, 128), ("gptq_v2", "awq", "mlx")),
    ):
        folder = at / f"artifact-{grid}"
        shutil.rmtree(folder, ignore_errors=True)
        size = synthetic(folder, grid, blocks)
        for target in targets:
            # Beside each other, the better of two: other work on the machine comes and goes.
            copying = least(copied(folder, at / "copy") for _ in range(2))
            seconds = least(exported(folder, at / "export", target) for _ in range(2))
            results.append(
                {
                    "artifact": str(grid),
                    "to": target,
                    "bytes": size,
                    "seconds": seconds[0],
                    "copying": copying[0],
                    "busy": seconds[1],
                    "copying_busy": copying[1],
                }
            )
            ratios = [a / b for a, b in zip(seconds, copying, strict=True)]
            print(
                f"{grid!s:12} {target:10} {size / 1e9:6.2f} {seconds[0]:8.2f} {copying[0]:8.2f} "
                f"{ratios[0]:6.1f} {seconds[1]:6.2f} {copying[1]:8.2f} {ratios[1]:6.1f}",
                flush=True,
            )
        shutil.rmtree(at / "export", ignore_errors=True)
        shutil.rmtree(folder)
    Path(out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
