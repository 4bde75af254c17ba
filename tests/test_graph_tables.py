"""`lowbit plan --graph`: what linears do, and what a person sees of the blocks."""

import io
import json

import pytest
from families import config_of
from hand_graphs import described
from test_tracing import CONFIGS
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.cli.display import graph_data, graph_tables
from lowbit.console import Console
from lowbit.model.graph import Described, Frame, Graph, Site, Source
from lowbit.model.roles import roles

SPLIT = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
GATED = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
ROLES = {
    "llama": [{**SPLIT, "o_proj": "output", **GATED}],
    "bitnet": [{**SPLIT, "o_proj": "output", **GATED}],
    "opt": [{**SPLIT, "out_proj": "output", "fc1": "up", "fc2": "down"}],
    "phi-2": [{**SPLIT, "dense": "output", "fc1": "up", "fc2": "down"}],
    "phi-4-mini": [
        {
            "qkv_proj": "query, key, value",
            "o_proj": "output",
            "gate_up_proj": "gate, up",
            "down_proj": "down",
        }
    ],
    "falcon-7b": [
        {
            "query_key_value": "query, key, value",
            "dense": "output",
            "dense_h_to_4h": "up",
            "dense_4h_to_h": "down",
        }
    ],
    "DeepSeek-V3": [
        {
            "q_a_proj": "latent",
            "kv_a_proj_with_mqa": "latent",
            "q_b_proj": "query",
            "kv_b_proj": "key, value",
            "o_proj": "output",
            **GATED,
        }
    ],
    "LFM2-1.2B": [
        {"in_proj": "state", "out_proj": "output", "w1": "gate", "w3": "up", "w2": "down"},
        {**SPLIT, "out_proj": "output", "w1": "gate", "w3": "up", "w2": "down"},
    ],
    "Qwen3-Next-80B": [
        {"in_proj_qkvz": "state", "out_proj": "output", **GATED},
        {**SPLIT, "o_proj": "output", **GATED},
    ],
    "Nemotron-H-8B": [
        {"in_proj": "state", "out_proj": "output"},
        {"up_proj": "up", "down_proj": "down"},
        {**SPLIT, "o_proj": "output"},
    ],
}


@pytest.mark.parametrize("name", ROLES)
def test_roles(name):
    found = [roles(graph) for graph in described(CONFIGS[name]()).kinds]
    assert [{n.rpartition(".")[2]: r for n, r in kind.items()} for kind in found] == ROLES[name]


def test_a_gate_of_attention():
    graph = Graph(
        (
            Site(tuple(f"a.{n}" for n in ("q", "k", "v", "g")), None, "a"),
            Site(("a.o",), None, "a.o"),
        ),
        unclipped=(("a.q", 8), ("a.k", 8)),
        attention="a",
        output="a.o",
    )
    assert list(roles(graph).values()) == ["query", "key", "value", "gate", "output"]


def shown(found):
    console = Console(record=True, file=io.StringIO())
    for table in graph_tables(found):
        console.print(table)
    return " ".join(console.export_text().split())


def of(graph, of_layers, kinds=1):
    return Described(Frame("model", "model.layers"), (graph,) * kinds, of_layers)


PLAIN = Graph((Site(("up",), Source("norm", "norm"), "up", residual=True),))


@pytest.mark.parametrize(
    "of_layers, words",
    [
        ((0,), "block 0: 1 of 1"),
        ((0, 0, 0), "blocks 0-2: 3 of 3"),
        ((0, 1, 1, 0, 0), "blocks 0, 3-4: 3 of 5"),
        ((0, 1, 0, 1, 0, 1), "blocks 0, 2, ... 4: 3 of 6"),
    ],
)
def test_blocks_of_a_kind_are_named_by_runs(of_layers, words):
    assert words in shown(of(PLAIN, of_layers, max(of_layers) + 1))


@pytest.mark.parametrize(
    "graph, words",
    [
        (PLAIN, "cannot be rotated: something else than outputs of linears is added to it"),
        (
            Graph(PLAIN.sites, dropped=(("the residual stream", "it moves"),)),
            "cannot be rotated: it moves",
        ),
        (Graph(PLAIN.sites, writers=("up",)), "can be rotated; written by up"),
        (
            Graph((Site(("up",), None, "up"),), writers=("up",)),
            "cannot be rotated: no linear reads it behind a norm",
        ),
        (
            Graph((Site(("up",), Source("n", "norm", offset=1.0), "up", beside=("gate.w",)),)),
            "n (gain 1 + w) │ gate.w (made up for)",
        ),
        (Graph((Site(("d",), Source("u", "linear", (4, 8)), "d"),)), "rows 4 to 7 of u"),
        (Graph(PLAIN.sites, kept=(("g", "it only chooses"),)), "kept as it is │ g: it only"),
    ],
)
def test_what_is_said_of_a_block(graph, words):
    assert words in shown(of(graph, (0,)))


def test_plan_prints_the_graph_even_where_the_plan_is_refused(tmp_path):
    config_of("gemma2").save_pretrained(tmp_path)
    asked = ["plan", str(tmp_path), "--graph", "--scheme", "W4A16g32", "--recipe"]
    out = tmp_path / "plan.json"
    done = CliRunner().invoke(app, [*asked, "rtn", "--json", str(out)])
    said = " ".join(done.output.split())
    assert done.exit_code == 0
    assert "pre_feedforward_layernorm (gain 1 + w)" in said and "blocks 0-3: 4 of 4" in said
    data = json.loads(out.read_text())["graph"]
    (kind,) = data["kinds"]
    assert kind["blocks"] == [0, 1, 2, 3] and kind["roles"]["mlp.up_proj"] == "up"
    assert data == json.loads(json.dumps(graph_data(described(config_of("gemma2")))))
    refused = CliRunner().invoke(app, [*asked[:-2], "W4A4", "--recipe", "quarot"])
    assert refused.exit_code == 2 and "cannot be rotated" in refused.output
    assert "pre_feedforward_layernorm" in refused.output
    plain = CliRunner().invoke(app, [*asked[:2], *asked[3:], "rtn", "--json", str(out)])
    assert plain.exit_code == 0 and "read by" not in plain.output
    assert "graph" not in json.loads(out.read_text())
