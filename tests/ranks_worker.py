"""What tests/test_ranks.py starts under torchrun; not a test itself.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/ranks_worker.py JOB.json

JOB holds "do": "tune" (cells -> what came out, saved by rank 0; and "differ", arguments of each
rank that must be refused) or "quantize" (one rank may be told to end or to raise after its first
block).
"""

import json
import os
import sys
from pathlib import Path

import torch
from helpers import run, staged

import lowbit
from lowbit.evaluate import Tally
from lowbit.grid.names import parse_scheme
from lowbit.model.calibration import Calibration, draw_rows
from lowbit.model.ranks import ALONE, Ranks
from lowbit.model.stream import ModelStream
from lowbit.model.tokenizer import load_tokenizer
from lowbit.recipe.presets import load_recipe
from lowbit.run.launch import joined


def tuned(
    model: str,
    scheme: str,
    recipe: str,
    settings: list[str],
    wide: bool = False,
    ranks: Ranks = ALONE,
) -> dict:
    """Codes of every linear and the quality on held-out rows, as one of several ranks has them;
    nothing is written.

    Args:
        wide: compute in float64.
    """
    chosen = load_recipe(recipe, scheme=parse_scheme(scheme), settings=settings)
    source = ModelStream(model, compute=torch.float64 if wide else None)
    rows = draw_rows(
        Calibration(f"{model}/text.txt", 13, 32, "no"), load_tokenizer(source.checkpoint), 0, 5
    )
    seen = staged(source, chosen, rows.calibration, ranks=ranks)
    stream, mine = seen.source, slice(ranks.rank, None, ranks.size)
    streams = seen.entered(torch.cat([rows.calibration[mine], rows.held_out[mine]]))
    codes, notes = {}, []

    def told(block):
        codes.update({f"{block.name}.{n}": q.codes for n, q in block.coded.items()})
        notes.append(dict(block.notes))

    for after in run(seen, streams, told):
        streams = after
    floating, quantized = Tally(), Tally()
    for at, i in enumerate(ranks.mine(len(rows.held_out)), ranks.count(len(rows.calibration))):
        expected = stream.head(streams.x[at : at + 1])
        floating.add(expected, rows.held_out[i : i + 1])
        quantized.add(stream.head(streams.xq[at : at + 1]), rows.held_out[i : i + 1], expected)
    for tally in (floating, quantized):
        tally.merge(ranks)
    return {
        "codes": codes,
        "notes": notes,
        "float": floating.result(),
        "quantized": quantized.result() if not ranks.rank else None,
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    with joined("cpu", lambda what: print(f"error: {what}", file=sys.stderr, flush=True)) as ranks:
        if job["do"] == "tune":
            found = [tuned(*cell, ranks=ranks) for cell in job["cells"]]
            if ranks.first:
                torch.save(found, job["out"])
            try:
                lowbit.quantize(**job["differ"][ranks.rank], ranks=ranks)
            except lowbit.LowbitError as e:  # of all alike: they could go on
                Path(f"{job['out']}.{ranks.rank}").write_text(str(e))
            return

        def after_block(done: object) -> None:
            if ranks.rank == job.get("dies"):
                os._exit(1)
            if ranks.rank == job.get("raises"):
                raise lowbit.LowbitError("there is something wrong here.")

        lowbit.quantize(**job["arguments"], ranks=ranks, progress=after_block)


if __name__ == "__main__":
    try:
        main()
    except lowbit.LowbitError as e:
        print(f"{type(e).__name__}: {e}", flush=True)
        sys.exit(2)
