"""What tests/test_ranks.py starts under torchrun; not a test itself.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/ranks_worker.py JOB.json
    python tests/ranks_worker.py JOB.json 4 [2]

The second form forks its processes itself: they import once; and say that so many are on a machine. JOB holds "do": "tune" (cells -> what came out, saved by rank 0; and "differ", arguments of each
rank that must be refused), "deal" (cells -> what came out, saved by every rank; and work that fails
on one of them) or "quantize" (one rank may be told to end or to raise after its first block).
"""

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from helpers import run, staged

import lowbit
from lowbit.evaluate import Tally
from lowbit.grid.names import parse_scheme
from lowbit.methods._slices import quantile_of_all
from lowbit.model.calibration import Calibration, draw_rows
from lowbit.model.dealing import divided
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
    announced: list[str] = []
    seen = staged(source, chosen, rows.calibration, ranks=ranks, announce=announced.append)
    stream, mine = seen.source, slice(ranks.rank, None, ranks.size)
    streams = seen.entered(torch.cat([rows.calibration[mine], rows.held_out[mine]]))
    codes, coded, notes = {}, {}, []

    def told(block):
        coded.update({f"{block.name}.{n}": q for n, q in block.coded.items()})
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
        "coded": coded,
        "announced": announced,
        "notes": notes,
        "float": floating.result(),
        "quantized": quantized.result() if not ranks.rank else None,
    }


def dealt(ranks: Ranks) -> dict:
    """What `divided` does with values of all kinds, and with work that fails on one rank."""
    value = {
        "pair": (torch.arange(6).view(2, 3).T, torch.tensor(2.5, dtype=torch.float64)),
        "wide": torch.arange(1 << 15, dtype=torch.float64),
        "none": [torch.empty(0, dtype=torch.uint8), None, torch.tensor([True, False])],
    }
    worked: list[int] = []

    def work(i: int) -> tuple[int, dict]:
        worked.append(i)
        return i, value if i == 3 else {}

    def failing(i: int) -> int:
        if i >= 2:
            raise lowbit.LowbitError(f"piece {i} cannot be done.")
        return i

    found = divided(ranks, [5.0, 1.0, 1.0, 4.0, 1.0, 1.0], work)
    try:
        divided(ranks, [1.0] * 5, failing)
    except lowbit.LowbitError as e:
        told = str(e)
    return {
        "found": found,
        "worked": worked,
        "failed": told,
        "value": value,
        "quantiles": list(quantiles(ranks)),
    }


def quantiles(ranks: Ranks) -> Iterator[tuple[torch.Tensor, float, torch.Tensor]]:
    """Values of all ranks, q, and what `quantile_of_all` gives: for one value, for many of which
    half are frozen, for values so near that all are in one bin.
    """
    generator = torch.Generator().manual_seed(0)
    many = torch.rand(5000, generator=generator) / 2
    crowded = torch.where(torch.rand(5000, generator=generator) < 0.5, many, 0.5)
    for values in (many[:1], many, crowded, 0.25 + 1e-7 * many[:99]):
        # The last rank has none.
        parts = torch.tensor_split(values, [len(values) // 9, len(values) // 2, len(values)])
        for q in (0.0, 0.005, 0.37, 0.5, 0.8, 1.0):
            yield values, q, quantile_of_all(ranks, parts[ranks.rank], len(values), q)


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

        if job["do"] == "deal":
            found = [tuned(*cell, ranks=ranks) for cell in job["cells"]]
            torch.save((found, dealt(ranks)), f"{job['out']}.{ranks.rank}")
            return

        def after_block(done: object) -> None:
            if ranks.rank == job.get("dies"):
                os._exit(1)
            if ranks.rank == job.get("raises"):
                raise lowbit.LowbitError("there is something wrong here.")

        def at_step(step: object) -> None:
            if step.what.startswith(job.get("stops", "\0")):  # on every rank
                raise lowbit.LowbitError("stopped.")

        lowbit.quantize(**job["arguments"], ranks=ranks, progress=after_block, watch=at_step)


def forked(size: int, here: int) -> int:
    """``main`` in so many processes, of which so many believe to be on one machine; the first exit
    status that is not 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % here)}
            os.environ["LOCAL_WORLD_SIZE"] = str(here)
            main()
            os._exit(0)
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return next((status for status in ended if status), 0)


if __name__ == "__main__":
    try:
        if len(sys.argv) > 2:
            sys.exit(forked(int(sys.argv[2]), int(sys.argv[-1])))
        main()
    except lowbit.LowbitError as e:
        print(f"{type(e).__name__}: {e}", flush=True)
        sys.exit(2)
