"""Products with a packed 4096 x 11008 weight against the memory's own speed and torch.matmul with
the float weight, side by side.

    python benchmarks/codebook_kernels.py bench-out/codebook_kernels.json [--device cuda] [--runs
    15]

Every time is the best of several rounds, and every round runs all of them. Weights are taken in
turn from copies that no cache holds together, as the layers of a model are.
"""

import argparse
import itertools
import json
import platform
import time
from pathlib import Path

import torch

from lowbit import kernels
from lowbit.grid.bits import packed_words
from lowbit.grid.packed import PackedColumns, Segment, Sparse

OUT, IN = 4096, 11008
BITS = {
    "2 bits": {2: IN},
    "4 bits": {4: IN},
    "2.1 bits, 0.5 % outliers": {2: IN - IN // 20, 4: IN // 20},
}
OUTLIERS = {"2.1 bits, 0.5 % outliers": IN // 200}  # in every row
TOKENS = (1, 4, 16)
BEYOND_CACHE = 1 << 28  # bytes


def weight(columns: dict[int, int], outliers: int, device: str) -> PackedColumns:
    """Any bits are codes, so random words will do."""
    segments, channels = [], torch.randperm(IN, device=device).int()
    for bits, n in columns.items():
        mine, channels = channels[:n].sort().values, channels[n:]
        codes = torch.randint(
            -(2**31), 2**31, (packed_words(n, bits), OUT), device=device, dtype=torch.int64
        ).int()
        segments.append(
            Segment(bits, mine, codes, torch.randn(n, 2**bits, device=device).sort(1).values.half())
        )
    sparse = None
    if outliers:
        chosen = (
            torch.rand(OUT, IN, device=device)
            .argsort(1)[:, :outliers]
            .sort(1)
            .values.int()
            .flatten()
        )
        starts = torch.arange(0, OUT * outliers + 1, outliers, device=device, dtype=torch.int32)
        sparse = Sparse(starts, chosen, torch.randn(len(chosen), device=device).half())
    packed = PackedColumns((OUT, IN), tuple(segments), sparse, torch.float16)
    kernels.check(packed)
    return packed


def tensors(packed: PackedColumns) -> list[torch.Tensor]:
    parts = [t for s in packed.segments for t in (s.columns, s.codes, s.levels)]
    return (
        parts
        if packed.sparse is None
        else [*parts, packed.sparse.starts, packed.sparse.columns, packed.sparse.values]
    )


def size(packed: PackedColumns) -> int:
    return sum(t.nbytes for t in tensors(packed))


def copies(packed: PackedColumns) -> list[PackedColumns]:
    def again() -> PackedColumns:
        segments = tuple(
            Segment(s.bits, s.columns.clone(), s.codes.clone(), s.levels.clone())
            for s in packed.segments
        )
        sparse = packed.sparse and Sparse(
            packed.sparse.starts.clone(),
            packed.sparse.columns.clone(),
            packed.sparse.values.clone(),
        )
        return PackedColumns(packed.shape, segments, sparse, packed.dtype)

    return [packed, *(again() for _ in range(BEYOND_CACHE // size(packed)))]


def timed(action, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def best(actions: dict, device: str, runs: int) -> dict:
    """The shortest time of each action, all of them run once a round; a first round does not
    count.
    """
    rounds = [
        {name: timed(action, device) for name, action in actions.items()} for _ in range(runs + 1)
    ]
    return {name: min(r[name] for r in rounds[1:]) for name in actions}


def in_turn(action, weights: list):
    """Calls action with the next weight each time."""
    endless = itertools.cycle(weights)
    return lambda: action(next(endless))


def measured(device: str, runs: int) -> dict:
    own = torch.float16 if device == "cuda" else torch.float32  # dtype of x for the packed weight
    packed = {
        name: copies(weight(columns, OUTLIERS.get(name, 0), device))
        for name, columns in BITS.items()
    }
    floats = {
        dtype: torch.randn(OUT, IN, device=device).to(dtype) for dtype in {torch.float32, own}
    }
    memory = torch.ones(BEYOND_CACHE, dtype=torch.uint8, device=device)
    room = torch.empty_like(memory)
    rows, copy = [], 0.0
    for tokens in TOKENS:
        x = torch.randn(tokens, IN, device=device)
        actions = {"copy": lambda: room.copy_(memory)}
        for dtype, w in floats.items():
            actions[str(dtype).removeprefix("torch.")] = lambda w=w, x=x.to(dtype): x @ w.T
        for name, weights in packed.items():
            actions[name] = in_turn(
                lambda w, x=x.to(own): kernels.linear(
                    x, w, "triton" if device == "cuda" else "cpu"
                ),
                weights,
            )
        times = best(actions, device, runs)
        copy = max(copy, 2 * BEYOND_CACHE / times["copy"])
        for name in packed:
            took, length = times[name], size(packed[name][0])
            row = {
                "weight": name,
                "tokens": tokens,
                "seconds": took,
                "bytes": length,
                "bytes_per_s": length / took,
            }
            rows.append(
                row
                | {
                    f"{dtype}_over_this": times[dtype] / took
                    for dtype in ("float32", "float16")
                    if dtype in times
                }
            )
    return {
        "copy_bytes_per_s": copy,
        "rows": [row | {"share_of_copy": row["bytes_per_s"] / copy} for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--runs", type=int, default=15)
    given = parser.parse_args()
    torch.manual_seed(0)
    made_on = (
        torch.cuda.get_device_name()
        if given.device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} thread(s)"
    )
    result = {
        "device": made_on,
        "torch": torch.__version__,
        "runs": given.runs,
        **measured(given.device, given.runs),
    }
    print(
        f"{made_on}; copying moves {result['copy_bytes_per_s'] / 1e9:.1f} GB/s (read and written)"
    )
    for row in result["rows"]:
        ratios = "  ".join(
            f"{k.split('_')[0]} takes {v:.2f} times as long"
            for k, v in row.items()
            if k.endswith("_over_this")
        )
        print(
            f"{row['weight']:26} {row['tokens']:3} tokens  {1e3 * row['seconds']:7.2f} ms  "
            f"{row['bytes_per_s'] / 1e9:6.1f} GB/s, {row['share_of_copy']:.0%} of copying  {ratios}"
        )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
