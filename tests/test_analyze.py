"""`lowbit analyze`: shares against counting by hand, the spec's synthetic outliers, the removals,
and bad input.
"""

import json
import math

import pytest
import torch
from helpers import FAMILIES, save_tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.evaluate.analyze.kernels import Site, grids_of, measure
from lowbit.evaluate.analyze.removal import Removal, knee, removals, run
from lowbit.model.tracing import described


def analyze(*args):
    result = CliRunner().invoke(app, ["analyze", *map(str, args)])
    return result.exit_code, " ".join(result.output.split())


def test_shares_against_counting_by_hand():
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 0.01, 0.3, 0.0, 5.0, 1.0]
    )
    x[0, 0] = 0
    grids = grids_of([8, 4], [0.15], "call")
    site = Site(("a",))
    site.add(x, grids)
    found = site.as_dict()
    flat, top = x.flatten(0, 1).double(), {8: 127, 4: 7}
    t, c = flat.abs().amax(1, keepdim=True), flat.abs().amax(0)
    nonzero = flat != 0
    assert found["zeros"] == pytest.approx(1 - float(nonzero.double().mean()))
    for b in (8, 4):
        for name, a in (
            (f"A{b} per token", 1.0),
            (f"A{b} per column", 0.0),
            (f"A{b} CrossQuant 0.15", 0.15),
        ):
            bound = t.pow(a) * c.pow(1 - a) / top[b] / 2
            assert found["kernel"][name] == pytest.approx(
                float(((flat.abs() < bound) & nonzero).sum() / nonzero.sum())
            )
    assert found["smaller_channel"] == pytest.approx(float((c < t).double().mean()))
    assert found["largest"] == float(x.abs().max())
    assert found["outlier_channels"] == int((c >= 6).sum())
    assert found["channel_spread"] == pytest.approx(float(c.max() / c.sort().values[2]))


def test_channels_of_an_outlier_model_leave_the_kernel():
    """Six of 2048 channels sixty times as large, as in OPT: most elements are in the 8-bit kernel
    per token, few under a cross scale.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 2048, generator=g) * (0.5 * torch.randn(2048, generator=g)).exp()
    x[:, torch.randperm(2048, generator=g)[:6]] *= 60
    site = Site(("a",))
    site.add(x, grids_of([8], [0.15], "call"))
    shares = site.as_dict()["kernel"]
    assert shares["A8 per token"] > 0.3
    assert shares["A8 CrossQuant 0.15"] < 0.1 * shares["A8 per token"]


def test_calls_add_up_and_every_family_is_read(tmp_path):
    for family in FAMILIES:
        model = AutoModelForCausalLM.from_pretrained(
            save_tiny(tmp_path / family, family), dtype=torch.float32
        )
        ids = torch.randint(3, 280, (3, 16), generator=torch.Generator().manual_seed(0))
        told = []
        sites = measure(
            model,
            described(model.config),
            ids,
            grids_of([8], [], "sequence"),
            batch=2,
            progress=lambda *a, told=told: told.append(a),
        )
        assert told == [(2, 3), (3, 3)]
        assert sum(len(s.linears) for s in sites) == len(described(model.config).linears)
        for s in sites:
            assert s.elements == 3 * 16 * model.get_submodule(s.linears[0]).in_features
            assert len(torch.cat(s.tokens)) == 48
        assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["bound", "smallest", "random"])
def test_as_many_are_removed_as_asked_for(kind):
    x = torch.randn(2, 30, 40, generator=torch.Generator().manual_seed(0))
    x[:, :, 3] = 0
    x[0, 5] *= 100
    y = Removal(kind, 0.25)(x, torch.Generator().manual_seed(1))
    gone = (y == 0) & (x != 0)
    assert int(gone.sum()) == round(0.25 * int((x != 0).sum())) and torch.equal(y[~gone], x[~gone])
    size = x.abs() / (x.abs().amax(-1, keepdim=True) if kind == "bound" else 1)
    ordered = bool(size[gone].max() <= size[~gone & (x != 0)].min())
    assert ordered == (kind != "random")


def test_restored_differs_from_quantized_by_the_kernel_alone():
    x = torch.randn(1, 30, 40, generator=torch.Generator().manual_seed(0))
    (grid,) = grids_of([3], [], "call")[:1]
    plain = Removal("quantized", on=grid)(x, torch.Generator())
    restored = Removal("restored", on=grid)(x, torch.Generator())
    kernel = plain == 0
    assert kernel.any()
    assert torch.equal(restored[kernel], x[kernel])
    assert torch.equal(restored[~kernel], plain[~kernel])


def test_the_model_is_left_as_it_was(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path), dtype=torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.randint(3, 280, (2, 16), generator=torch.Generator().manual_seed(0))
    found = dict(
        run(
            model, described(model.config), ids, removals([0.9, 0.1], grids_of([2], [0.15], "call"))
        )
    )
    assert [r.label for r in found] == [
        "none",
        "bound",
        "bound",
        "smallest",
        "smallest",
        "random",
        "random",
        "A2 per token, quantized",
        "A2 per token, restored",
        "A2 per column, quantized",
        "A2 CrossQuant 0.15, quantized",
    ]
    assert len(set(found.values())) == len(found) and all(math.isfinite(p) for p in found.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_knee():
    assert knee([(0.1, 10.0), (0.2, 10.2)], 10.0) == pytest.approx(0.15)
    assert knee([(0.1, 10.0), (0.2, 10.05)], 10.0) is None
    assert knee([(0.1, 20.0)], 10.0) == pytest.approx(0.001)
    assert knee([(0.1, math.inf)], 10.0) == 0.0 and knee([(0.1, math.nan)], 10.0) is not None


def test_from_the_command_line(tmp_path):
    model = save_tiny(tmp_path / "m")
    args = [
        model,
        "--text",
        model / "text.txt",
        "--length",
        32,
        "--windows",
        4,
        "-o",
        tmp_path / "out",
        "--shares",
        "0.1,0.5",
        "--bits",
        "8,3",
    ]
    code, text = analyze(*args)
    assert code == 0, text
    data = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert len(data["sites"]) == 8
    assert len(data["grids"]) == 8
    assert len(data["removals"]) == 1 + 6 + 8 + 2
    assert data["mean"]["A8 per token"] < data["mean"]["A3 per token"]
    page = (tmp_path / "out" / "analysis.html").read_text()
    assert page.count("<img") == 2 and "A3 CrossQuant 0.15" in page
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert "mean kernel share" in text and "1 % worse at" in text
    code, text = analyze(*args[:-4], "--no-remove")
    assert code == 0
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["removals"] == []


def test_bad_input(tmp_path):
    model = save_tiny(tmp_path / "m")
    args = [
        model,
        "--text",
        model / "text.txt",
        "--length",
        32,
        "--windows",
        2,
        "-o",
        tmp_path / "out",
    ]
    for more, words in (
        (["--bits", "9"], "activation bits must be 2 to 8"),
        (["--bits", "x"], "--bits takes numbers with commas"),
        (["--bits", ","], "--bits is empty"),
        (["--exponents", "1.5"], "row_exponent must be in [0, 1]"),
        (["--columns", "row"], "columns must be one of call, sequence"),
        (["--shares", "1.5"], "must be in (0, 1)"),
        (["--batch", "0"], "--batch 0: give a whole number from 1"),
        (["--length", "999"], "beyond the model's context"),
    ):
        code, text = analyze(*args, *more)
        assert code == 2 and words in text, text
    assert not (tmp_path / "out").exists()
    broken = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0] = float("inf")
    with pytest.raises(
        LowbitError, match=r"'model.layers.1.mlp.down_proj' gets activations that are not finite"
    ):
        measure(broken, described(broken.config), torch.full((1, 8), 5), grids_of([8], [], "call"))
    import lowbit

    lowbit.quantize(
        str(model),
        "W4A16",
        "rtn",
        out=tmp_path / "a",
        calib=str(model / "text.txt"),
        samples=4,
        length=32,
    )
    code, text = analyze(
        tmp_path / "a",
        "--text",
        model / "text.txt",
        "--length",
        32,
        "--windows",
        2,
        "-o",
        tmp_path / "out",
    )
    assert code == 2 and "--no-remove" in text
