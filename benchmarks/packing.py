"""Packing a 4096 x 11008 matrix of codes against writing the same codes unpacked, and against
compressed-tensors' own packer.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

from lowbit.grid.bits import pack, unpack


def timed(action, runs: int = 7) -> float:
    action()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for bits in (2, 3, 4, 8):
            codes = torch.randint(0, 2**bits, (4096, 11008), dtype=torch.uint8)
            packed, signed = pack(codes, bits), (codes.int() - 2 ** (bits - 1)).to(torch.int8)
            write = timed(lambda c=codes: save_file({"c": c}, Path(folder) / "c.safetensors"))
            row = {
                "bits": bits,
                "pack_over_write": timed(lambda c=codes, b=bits: pack(c, b)) / write,
                "unpack_over_write": timed(lambda p=packed, b=bits: unpack(p, b, 11008)) / write,
                "peer_over_write": timed(lambda s=signed, b=bits: pack_to_int32(s, b), 2) / write,
            }
            rows.append(row)
            print(
                "  ".join(
                    f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
                )
            )
    Path("bench-out").mkdir(exist_ok=True)
    Path("bench-out/packing.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
