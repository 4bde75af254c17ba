"""How long runs of large models take on 1, 8 and 64 GPUs, and in what memory: a simulation of the
schedule from the counts of `lowbit plan`.

    python benchmarks/scale.py OUT.json [--recipes rtn,gptq,awq,fast,default] [--models 8B,1T]
    python benchmarks/scale.py OUT.json --measured RANKS.json

What is counted (products, bytes moved and sent, memory) comes from the plan; what a plan leaves out
(reading, copying to the device, launches of column loops, packing, hashing, writing, the closing
check) is counted here. Rates of the device, the link and the disk are ASSUMED (`RATES`, or
--rates NAME=VALUE,...). Ranks are simulated as two clocks, the first rank's, which writes, and that
of any other; where something is sent they meet. Prints Markdown, writes JSON.

The second form checks the counts against ranks that ran: seconds by part of one rank (from
`ranks.py`) give the rates, the counts of several ranks say what each of them should take.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from planned import of

from lowbit.grid.names import parse_scheme
from lowbit.methods.cost import Shapes
from lowbit.model.dealing import cut, owners, parts_of
from lowbit.model.outline import Outline
from lowbit.plan import Plan, Setting
from lowbit.plan.memory import PROCESS
from lowbit.plan.speed import Speed, block_work, seconds
from lowbit.recipe import load_recipe

GIB = 2.0**30
MACHINE = 8  # GPUs of one
DEVICE = 80e9 * 0.95  # bytes of a GPU that can be taken


def llama(hidden: int, ffn: int, layers: int, heads: int) -> Any:
    sizes = dict(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers)
    heads_ = dict(num_attention_heads=heads, num_key_value_heads=8, head_dim=128)
    return of("llama", **sizes, **heads_, vocab_size=128256, max_position_embeddings=131072)


MODELS = {
    "8B": llama(4096, 14336, 32, 32),
    "70B": llama(8192, 28672, 80, 64),
    "405B": llama(16384, 53248, 126, 128),
    # A mixture of a trillion weights, 384 experts of which 8 see a token.
    "1T": of(
        "deepseek_v3",
        hidden_size=7168,
        num_hidden_layers=61,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        n_routed_experts=384,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=1,
        topk_group=1,
        num_attention_heads=64,
        num_key_value_heads=64,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        first_k_dense_replace=1,
        vocab_size=163840,
        max_position_embeddings=131072,
    ),
}
RECIPES = ("rtn", "gptq", "awq", "fast", "default")


@dataclass(frozen=True)
class Rates:
    """Assumed, but for the one that says otherwise. Bytes/s, FLOP/s, seconds.

    Attributes:
        half, single, copies: as `Speed`, of an H100. near, far: sent by one GPU to others of its
            machine, and of other machines. disk, written: read from and written to a disk by one
            machine. bus: to the device. column: host time of one column of a column loop, whose
            dozen launches nothing hides. packed: weights a second, hashed: bytes a second, of one
            thread; both measured, on the processor that docs/scale.md names.
    """

    half: float = 650e12
    single: float = 50e12
    copies: float = 2.6e12
    near: float = 300e9
    far: float = 45e9
    disk: float = 5e9
    written: float = 2e9
    bus: float = 25e9
    column: float = 60e-6
    packed: float = 100e9
    hashed: float = 1.4e9

    @property
    def speed(self) -> Speed:
        """Of one process."""
        return Speed(self.half, self.single, self.copies, self.near, self.far)


@dataclass
class Event:
    """A part of the work on a block.

    Attributes:
        first, other: seconds of rank 0 and of another. sent: seconds in which all send; they have
            met then. meets: whether ranks wait for each other at its end.
    """

    part: str
    first: float
    other: float
    sent: float = 0.0
    meets: bool = False


def columns_of(shapes: Shapes) -> int:
    """Columns that the busiest rank codes one after the other, launched one by one."""
    total = 0
    for level in shapes.levels or [[names] for names in shapes.sites]:
        widths = [shapes.layer.linears[names[0]][1] for names in level]
        at_once = min(len(level), max(1, (2 << 30) // (8 * max(widths) ** 2)))
        share = -(-at_once // shapes.rows.ranks) / at_once  # sites of a pass, as `_sites` deals
        total += round(sum(widths) * share)
    return total


def unevenness(shapes: Shapes) -> float:
    """The busiest rank's share of rows that are dealt out linear by linear, over an equal one: as
    `by_rows` cuts and deals them.
    """
    sizes, ranks = list(shapes.layer.linears.values()), shapes.rows.ranks
    costs: list[float] = []
    parts = parts_of([a * b for a, b in sizes], ranks)
    for (rows, width), count in zip(sizes, parts, strict=True):
        costs += [float(width * len(range(rows)[s])) for s in cut(rows, count)]
    load = [0.0] * ranks
    for cost, owner in zip(costs, owners(costs, ranks), strict=True):
        load[owner] += cost
    return max(load) * ranks / sum(load)


def events(plan: Plan, shapes: Shapes, last: bool, rates: Rates) -> list[Event]:
    """One block, in order."""
    layer, ranks = shapes.layer, shapes.rows.ranks
    source = 2.0 * (layer.weights + layer.rest)
    packed = plan.packed / plan.quantized * layer.weights + 2.0 * layer.rest
    speed = rates.speed
    out = [
        Event("reading", source / rates.disk, source / rates.disk),
        Event("to the device", source / rates.bus, source / rates.bus),
    ]
    each, more = block_work(plan.recipe, shapes)
    for part, work in {**each, **(more if last else {})}.items():
        computed = seconds(work.alone, speed)
        if part == "awq: clip search":
            computed *= unevenness(shapes)
        sent = seconds(work, speed) - seconds(work.alone, speed)
        out.append(Event(part, computed, computed, sent, work.sent > 0))
        if part.endswith(": columns"):
            launched = columns_of(shapes) * rates.column
            out.append(Event(f"{part}, launches", launched, launched, meets=ranks > 1))
    packing = layer.weights / rates.packed
    out.append(Event("packing", packing, packing))
    if ranks > 1:
        hashing = packed / rates.hashed
        out.append(Event("hashes compared", hashing, hashing, meets=True))
    # Twice hashed from the file, and read back.
    out.append(Event("writing", packed / rates.written + 2 * packed / rates.hashed, 0.0))
    return out


def simulated(plan: Plan, rates: Rates) -> dict[str, Any]:
    """The run: seconds by part of the rank that writes, of waiting of another, and of all."""
    ranks, first, other = plan.setting.ranks, 0.0, 0.0
    spent: dict[str, float] = {}
    waited = 0.0
    kinds = plan.outline.of_layers
    last = len(kinds) - 1
    made = {
        (k, end): events(plan, plan.shapes_of[k], end, rates)
        for k, end in {(k, i == last) for i, k in enumerate(kinds)}
    }
    for i, kind in enumerate(kinds):
        for e in made[kind, i == last]:
            first, other = first + e.first, other + e.other
            spent[e.part] = spent.get(e.part, 0.0) + e.first + e.sent
            if ranks > 1 and (e.meets or e.sent):
                waited += max(0.0, first - other)
                first = other = max(first, other) + e.sent
    # The artifact is read, hashed, and its sample runs: by one process of the first machine.
    closing = plan.artifact / rates.disk + 2 * plan.artifact / rates.hashed
    spent["closing check"] = closing
    return {"parts": spent, "waited by others": waited + closing, "seconds": first + closing}


def memory(plan: Plan) -> dict[str, float]:
    """Bytes: of a device, with the streams on it or not, and of the first machine's host."""
    m = plan.memory
    on_device = m.block + m.outer + m.streams <= DEVICE
    here = plan.setting.here
    device = m.block + m.outer + (m.streams if on_device else 0)
    # A block as it is read, for each process; the check follows when the others have nothing left.
    largest = max(s.layer.weights + s.layer.rest for s in plan.shapes_of)
    running = here * (PROCESS + 2 * largest + (0 if on_device else m.streams))
    return {
        "device": device,
        "least": m.least,
        "host": max(running, plan.check_memory_by_block),
        "streams on device": on_device,
        "disk": plan.original + plan.artifact,
    }


def planned(outline: Outline, recipe: str, scheme: str, ranks: int) -> Plan:
    own = load_recipe(recipe, scheme=parse_scheme(scheme))
    here = min(ranks, MACHINE)
    device = torch.device("cuda")
    setting = Setting(128, 2048, device, outline.dtype, ranks=ranks, here=here)
    return Plan.of(outline, own, setting)


def said(held: Mapping[str, float]) -> str:
    """Device memory in GiB, and what is wrong with it."""
    size = f"{held['device'] / GIB:.0f}"
    if held["least"] > DEVICE:
        return f"**{size}, at least {held['least'] / GIB:.0f}**"
    return size if held["device"] <= DEVICE else f"*{size}*"


def predicted(rates: Rates, names: list[str], recipes: list[str], counts: list[int]) -> list[Any]:
    """A line a recipe; device memory in italics where the estimate is more than a GPU has, in bold
    where what cannot be done without is.
    """
    found = []
    head = ", ".join(map(str, counts))
    print(f"| model | recipe | hours on {head} GPUs | device GiB | host GiB | disk GiB |")
    print("|---|---|---|---|---|---|")
    for name in names:
        outline = Outline.of(MODELS[name]())
        for recipe in recipes:
            lines = []
            for ranks in counts:
                plan = planned(outline, recipe, "W4A16g128", ranks)
                run = {**simulated(plan, rates), **memory(plan)}
                lines.append({"model": name, "recipe": recipe, "ranks": ranks, **run})
            hours = ", ".join(f"{line['seconds'] / 3600:.2g}" for line in lines)
            device = ", ".join(map(said, lines))
            host = ", ".join(f"{line['host'] / GIB:.0f}" for line in lines)
            disk = f"{lines[0]['disk'] / GIB:.0f}"
            print(f"| {name} | {recipe} | {hours} | {device} | {host} | {disk} |", flush=True)
            found += lines
    return found


def shown(found: list[Any], counts: list[int]) -> None:
    """Minutes by part, every recipe of every model, by GPUs; and by what a part is divided."""
    head = " | ".join(f"{n} GPUs" for n in counts)
    print(f"\n| model | recipe | part | minutes: {head} | divided by |")
    print("|---" * (4 + len(counts)) + "|")
    keyed = {(f["model"], f["recipe"], f["ranks"]): f["parts"] for f in found}
    for model, recipe in dict.fromkeys((f["model"], f["recipe"]) for f in found):
        of_ranks = [keyed[model, recipe, n] for n in counts]
        for part in dict.fromkeys(p for parts in of_ranks for p in parts):
            took = [parts.get(part, 0.0) for parts in of_ranks]
            if max(took) < 0.01 * max(sum(parts.values()) for parts in of_ranks):
                continue
            ratio = f"{took[0] / took[-1]:.1f}" if took[0] and took[-1] else "-"
            cells = " | ".join(f"{t / 60:.2g}" for t in took)
            print(f"| {model} | {recipe} | {part} | {cells} | {ratio} |")


# --- against ranks that ran -----------------------------------------------------------------------

# Part of a plan -> that of `parts.py`.
SAME = {
    "passes": "passes",
    "gptq: passes": "passes",
    "awq: passes": "passes",
    "gptq: Hessians": "Hessians",
    "gptq: factors": "factors",
    "gptq: columns": "columns",
    "claq: passes": "passes",
    "claq: Hessians": "Hessians",
    "claq: factors": "factors",
    "claq: columns": "columns",
    "awq: scale search": "scale search",
    "awq: candidates rounded": "scale search",
    "awq: clip search": "clip search",
    "tesseraq: steps": "steps",
    "tesseraq: last block": "steps",
    "tesseraq: soft weights": "soft weights",
    "tesseraq: hardening": "hardening",
    "tesseraq: judging": "judging",
}


def by_part(plan: Plan, speed: Speed) -> dict[str, float]:
    """Counted seconds of computing by the parts that are measured."""
    out: dict[str, float] = {}
    for part, work in plan.work.items():
        if part in SAME:
            took = seconds(work.alone, speed)
            out[SAME[part]] = out.get(SAME[part], 0.0) + took
    return out


def checked(measured: Mapping[str, Any], rates: Rates) -> list[Any]:
    """Every part of several ranks, as counts foretell from one rank's seconds, and as it was."""
    from lowbit.plan import read_config

    outline = Outline.of(read_config(measured["model"]))
    cpu = torch.device("cpu")
    speed = Speed(rates.single, rates.single, rates.copies)
    found = []
    print("| recipe | part | 1 rank, s | ranks | foretold | mean | most | mean / foretold |")
    print("|---|---|---|---|---|---|---|---|")
    alone = {r["recipe"]: r for r in measured["rows"] if r["ranks"] == 1}
    for row in measured["rows"]:
        if row["ranks"] == 1:
            continue
        name, *settings = row["recipe"].split(",")
        own = load_recipe(name, scheme=parse_scheme(measured["scheme"]), settings=settings)
        counts = []
        for ranks in (1, row["ranks"]):
            given = int(measured["samples"]), int(measured["length"])
            setting = Setting(*given, cpu, outline.dtype, ranks=ranks, here=ranks)
            counts.append(by_part(Plan.of(outline, own, setting), speed))
        for part, counted in counts[0].items():
            one = alone[row["recipe"]]["parts"][0][part][0]
            of_ranks = [p[part][0] for p in row["parts"]]
            if one < 0.05:  # too short to say anything
                continue
            told, mean = one * counts[1][part] / counted, sum(of_ranks) / len(of_ranks)
            line = {"recipe": row["recipe"], "part": part, "ranks": row["ranks"], "alone": one}
            line |= {"foretold": told, "mean": mean, "most": max(of_ranks)}
            found.append(line)
            print(
                f"| {row['recipe']} | {part} | {one:.2f} | {row['ranks']} | {told:.2f} | "
                f"{mean:.2f} | {max(of_ranks):.2f} | {mean / told:.2f} |"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", type=lambda v: v.split(","), default=list(MODELS))
    parser.add_argument("--recipes", type=lambda v: v.split(","), default=list(RECIPES))
    parser.add_argument("--gpus", type=lambda v: list(map(int, v.split(","))), default=[1, 8, 64])
    parser.add_argument("--rates", default="", help="NAME=VALUE,... in place of those assumed")
    parser.add_argument("--measured", type=Path, help="what ranks.py wrote")
    given = parser.parse_args()
    changed = dict(pair.split("=") for pair in given.rates.split(",") if pair)
    rates = replace(Rates(), **{name: float(value) for name, value in changed.items()})
    if given.measured:
        found = checked(json.loads(given.measured.read_text()), rates)
    else:
        found = predicted(rates, given.models, given.recipes, given.gpus)
        shown(found, given.gpus)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"rates": asdict(rates), "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
