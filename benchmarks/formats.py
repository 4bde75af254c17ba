"""What every export format does to a weight: exact, or the extra error as a share of the
quantization error; bits on disk; who reads it.

    python benchmarks/formats.py OUT.json [ROWS COLUMNS]

Gaussian weights, rounded to nearest on ranges from minimum and maximum, scales in float16. The
extra error is relative to the error that rounding itself made on these weights. A cell says bits a
weight and that error. Prints a Markdown table and writes JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from lowbit.errors import LowbitError
from lowbit.export.gguf import types
from lowbit.formats import awq, gptq, mlx
from lowbit.formats import compressed_tensors as ct
from lowbit.formats.by_name import FORMATS
from lowbit.grid import Affine, AffineParams, KQuant, QTensor

READERS = {
    ct.NAME: "transformers",
    gptq.V1: "GPTQModel (torch)",
    gptq.V2: "GPTQModel (torch)",
    awq.NAME: "GPTQModel (torch)",
    mlx.NAME: "mlx-lm (CPU)",
    "gguf": "llama.cpp, gguf package",
}
CHECKS = {
    gptq.V1: lambda g, r, c: gptq.check(g, r, c, gptq.V1, "w"),
    gptq.V2: lambda g, r, c: gptq.check(g, r, c, gptq.V2, "w"),
    awq.NAME: lambda g, r, c: awq.check(g, r, "w"),
    mlx.NAME: lambda g, r, c: mlx.group_of(g, c, "w"),
}


def decoded(q: QTensor) -> torch.Tensor:
    if isinstance(q.grid, KQuant):
        return q.grid.decode(q.codes, q.params.double())
    return q.grid.decode(
        q.codes, AffineParams(q.params.scale.double(), q.params.zero_point.double())
    )


def in_format(name: str, q: QTensor, rows: int, columns: int) -> tuple[torch.Tensor, float, str]:
    """(weight as the format says it, bits a weight, name with the block type)."""
    if name == "gguf":
        kind = types.chosen(q.grid, columns, None, "w")
        found = types.held(q, kind, "w")
        return (
            decoded(found.rows, kind),
            8 * found.rows.numel() / q.codes.numel(),
            f"gguf {kind.name}",
        )
    if name in CHECKS:
        CHECKS[name](q.grid, rows, columns)
    layout = FORMATS[name]
    tensors = layout.pack(q, torch.float16, "w")
    grid = q.grid if name != mlx.NAME else Affine(q.grid.bits, mlx.group_of(q.grid, columns, "w"))
    if name == mlx.NAME:
        back = mlx.unpack(tensors, grid, "w")
    else:
        back = layout.unpack(tensors, q.grid, "w")
    assert torch.equal(back.codes, q.codes)
    return decoded(back), 8 * sum(t.nbytes for t in tensors.values()) / q.codes.numel(), name


def cases() -> Iterator[Affine | KQuant]:
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            for group in (16, 32, 64, 128, None):
                yield Affine(bits, group, symmetric)
    for kind in ("q2_k", "q3_k", "q4_k", "q6_k"):
        yield KQuant(kind)  # type: ignore[arg-type]


def main() -> None:
    out, *size = sys.argv[1:]
    rows, columns = map(int, size) if size else (256, 1024)
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    results = []
    print("| grid | " + " | ".join(READERS) + " |\n|---" + "|---" * len(READERS) + "|")
    for grid in cases():
        params = grid.stored(grid.fit(w), torch.float16)
        q = QTensor(grid, grid.encode(w, params), params)
        own = decoded(q)
        error = (own - w.double()).square().mean()
        cells = []
        for name in READERS:
            if isinstance(grid, KQuant) and name != "gguf":
                cells.append("")
                continue
            try:
                value, bits, label = in_format(name, q, rows, columns)
            except LowbitError as e:
                results.append({"grid": str(grid), "format": name, "refused": str(e)})
                cells.append("refused")
                continue
            extra = float((value - own).square().mean() / error)
            reader = "llama.cpp" if label == "gguf Q2_0" else READERS[name]
            results.append(
                {"grid": str(grid), "format": label, "extra": extra, "bits": bits, "reader": reader}
            )
            cells.append(
                f"{label.removeprefix(name).strip()} {bits:.3f}, {'exact' if extra == 0 else f'{extra:.1e}'}".strip()
            )
        print(f"| {grid} | " + " | ".join(cells) + " |", flush=True)
    Path(out).write_text(
        json.dumps({"rows": rows, "columns": columns, "results": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
