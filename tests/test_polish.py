"""Polish: what codes leave free, trained end to end. Gradients against finite differences, artifacts
against those of the same recipe without it.
"""

import json
import re
from dataclasses import replace

import pytest
import torch
from families import config_of
from helpers import TEXT, Kept, model_of, save_tiny
from typer.testing import CliRunner

import lowbit
from lowbit.artifact.files import read_shard
from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.export import export
from lowbit.grid.names import parse_scheme
from lowbit.methods import Polish
from lowbit.methods._divergence import divergence
from lowbit.model.beside import given
from lowbit.model.calibration import Calibration, draw_rows
from lowbit.model.stream import ModelStream
from lowbit.model.tokenizer import load_tokenizer
from lowbit.plan import make_plan, read_config
from lowbit.recipe import load_recipe
from lowbit.run.refining import refine
from lowbit.stages import Blocks, Entered
from lowbit.stages.polish import Polished, PolishRows, _Polishing
from lowbit.stages.polish.passes import Passes

SHORT = ("polish.tokens=1024", "polish.batch=4", "polish.lr=1e-2", "polish.checks=4")


def source(folder, family="llama", dtype=torch.float32, times=20):
    save_tiny(folder, family if isinstance(family, str) else family(), dtype)
    (folder / "text.txt").write_text(TEXT * times)
    return folder


def made(model, out, scheme, recipe, settings=SHORT, samples=8, **more):
    given = dict(calib=model / "text.txt", samples=samples, length=32, settings=list(settings))
    return lowbit.quantize(model, scheme, recipe, out=out, **given, **more)


# --- artifacts ------------------------------------------------------------------------------------

CELLS = {  # model, scheme, recipe
    "scales": ("llama", "W2A16g16", "rtn", torch.float32),
    "scales in bfloat16": ("qwen2", "W2A16g16", "gptq", torch.bfloat16),
    "biases": ("opt", "W2A16g16", "rtn", torch.float32),
    "levels": ("llama", "W3A16", "claq", torch.float32),
    "outliers": ("llama", "W2A16", "claq-ap", torch.float32),
    "powers of two": ("llama", "mxfp4", "rtn", torch.float32),
    "rotated": ("llama", "W2A16g16", "quarot", torch.float32),
    "inputs": ("llama", "W4A4KV4", "rtn", torch.float32),
    "experts": (
        *(lambda: config_of("mixtral", vocab_size=300, sliding_window=None), "W2A16g8", "rtn"),
        torch.float32,
    ),
    "shared keys": (
        *(lambda: config_of("gemma4 with shared keys", vocab_size=300), "W2A16g16", "rtn"),
        torch.float32,
    ),
}


@pytest.mark.parametrize("case", CELLS)
def test_codes_stay_and_the_divergence_falls(tmp_path, case):
    family, scheme, recipe, dtype = CELLS[case]
    model = source(tmp_path / "m", family, dtype)
    before = made(model, tmp_path / "a", scheme, recipe, ())
    after = made(model, tmp_path / "b", scheme, f"{recipe}+polish")
    said = after.report["polish"]
    assert said["kept_step"] > 0 and said["kl"] < 0.95 * said["kl_before"], said
    kl = [r.report["quality"]["quantized"]["kl"] for r in (before, after)]
    assert kl[1] < kl[0]
    assert after.verification.loader == "passed"
    assert after.report["size"]["after"] == before.report["size"]["after"]
    names = {e["name"] for e in before.report["linears"] if "skipped" not in e}
    held = [
        {k: t for s in r.report["shards"] for k, t in read_shard(r.folder / s).items()}
        for r in (before, after)
    ]
    if recipe not in ("claq", "claq-ap"):  # whose levels may change places
        codes = [k for k in held[0] if k.rpartition(".")[2] == "weight_packed"]
        assert len(codes) == len(names)
        assert all(torch.equal(held[0][k], held[1][k]) for k in codes)
    moved = [k for k in held[0] if not torch.equal(held[0][k], held[1][k])]
    inside = "layers"
    assert moved and all(inside in k for k in moved)  # nothing outside the blocks
    assert any("norm" in k for k in moved)
    assert not [p for p in (tmp_path / "b").rglob("*") if "polish" in p.name]


def test_k_quants(tmp_path, monkeypatch):
    import helpers

    monkeypatch.setitem(helpers.LLAMA, "hidden_size", 256)
    monkeypatch.setitem(helpers.LLAMA, "intermediate_size", 512)
    model = source(tmp_path / "m")
    before = made(model, tmp_path / "a", "gguf:q2_k", "rtn", ())
    after = made(model, tmp_path / "b", "gguf:q2_k", "rtn+polish")
    assert after.report["polish"]["kl"] < 0.95 * after.report["polish"]["kl_before"]
    kl = [r.report["quality"]["quantized"]["kl"] for r in (before, after)]
    assert kl[1] < kl[0] and after.verification.loader == "passed"


def test_nothing_is_kept_where_nothing_is_gained(tmp_path):
    model = source(tmp_path / "m")
    plain = made(model, tmp_path / "a", "W8A16g16", "rtn", ())
    worse = ("polish.tokens=256", "polish.batch=4", "polish.lr=0.4", "polish.patience=1")
    kept = made(model, tmp_path / "b", "W8A16g16", "rtn+polish", worse)
    assert kept.report["polish"]["kept_step"] == 0 and len(kept.report["polish"]["looks"]) == 2
    assert kept.report["hash"] == plain.report["hash"]
    assert kept.report["quality"] == plain.report["quality"]


def test_a_polished_artifact_says_so(tmp_path):
    model, out = source(tmp_path / "m"), tmp_path / "out"
    words = ["quantize", model, "--recipe", "rtn+polish", "--scheme", "W2A16g16", "--samples", 8]
    words += ["--length", 32, "--calib", model / "text.txt", "-o", out]
    for setting in SHORT:
        words += ["--set", setting]
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    said = report["polish"]
    line = f"polished on {said['tokens']:,} tokens: KL {said['kl_before']:.4g} -> {said['kl']:.4g}"
    assert line in " ".join(done.output.split())
    assert line in (out / "README.md").read_text()
    shown = CliRunner().invoke(app, ["plan", *map(str, words[1:10]), "--set", SHORT[0]])
    assert shown.exit_code == 0 and "polish" in shown.output, shown.output


# --- interrupted ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at", ["polish: step 3 of", "polish: step 6 of", "polish: storing block 2", "again"]
)
def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, monkeypatch, at):
    model = source(tmp_path / "m", times=10)
    whole = made(model, tmp_path / "a", "W2A16g16", "rtn+polish")
    seen = []

    def stopped(step):
        seen.append(step.what)
        if re.match(at, step.what):
            raise KeyboardInterrupt

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if at == "again":  # polished, and not yet closed
            patched.setattr("lowbit.run.quantize.quality", killed)
        made(model, tmp_path / "b", "W2A16g16", "rtn+polish", watch=stopped)
    again = []
    done = made(model, tmp_path / "b", "W2A16g16", "rtn+polish", watch=lambda s: again.append(s))
    assert done.report["hash"] == whole.report["hash"]
    a, b = ({**r.report["polish"], "seconds": 0, "peak_memory": 0} for r in (done, whole))
    assert a == b
    for kind in ("float", "quantized"):  # as many tokens, maybe not in the same batches
        a, b = ({**r.report["quality"][kind], "batch": 0} for r in (done, whole))
        assert a == b
    told = [s.what for s in again if s.what.startswith("polish: step")]
    first = int(re.search(r"\d+", told[0])[0]) if told else None
    # From the last look, which is at every second step.
    assert first == {"polish: step 3 of": 3, "polish: step 6 of": 5}.get(at)


# --- gradients ------------------------------------------------------------------------------------


class InMemory:
    """A `PolishStore` of blocks that were just quantized."""

    polished = None

    def __init__(self, folder, blocks):
        self._folder, self.blocks = folder, blocks

    def scratch(self, rank):
        return self._folder / str(rank)

    def held(self, i, block, *, anew):
        own = self.blocks[i]
        weights = {n: w for n, w in own.weights.items()}
        return replace(block, coded=own.coded, weights=weights)


GRADIENTS = {
    "llama": ("llama", "W2A16g16", "rtn"),
    "opt": ("opt", "W3A16g16", "rtn"),
    "codebook": ("llama", "W2A16:column", "claq"),
    "outliers": ("llama", "W2A16", "claq-ap"),
    "rotated": ("llama", "W2A16g16", "quarot"),
    "experts": (
        lambda: config_of("mixtral", vocab_size=300, sliding_window=None),
        "W2A16g8",
        "rtn",
    ),
    "shared keys": (
        *(lambda: config_of("gemma4 with shared keys", vocab_size=300), "W2A16g16", "rtn"),
    ),
}


@pytest.mark.parametrize("case", GRADIENTS)
@pytest.mark.parametrize("rows", [1, 4096], ids=["row by row", "together"])
def test_gradients(tmp_path, monkeypatch, case, rows):
    monkeypatch.setattr("lowbit.stages.polish.passes.TOKENS_PER_PASS", 16 * rows)
    family, scheme, recipe = GRADIENTS[case]
    stream = ModelStream(source(tmp_path / "m", family), compute=torch.float64)
    asked = load_recipe(recipe, scheme=parse_scheme(scheme))
    ids = torch.randint(3, 280, (4, 16), generator=torch.Generator().manual_seed(0))
    model, blocks = model_of(stream, asked, ids), []
    for stage in planned_stages(stream, asked):
        model = stage(model)
    model = Blocks(Entered(ids), Kept(blocks.append))(model)
    polish = Polish(tokens=32, batch=2)
    stage = Polished(polish, PolishRows(ids[:2], ids[2:]), Entered(ids), InMemory(tmp_path, blocks))
    work = _Polishing(stage, model)
    frames, expected = work._prepared(anew=True)
    generator = torch.Generator().manual_seed(1)
    variables = [
        {k: 0.05 * torch.randn(t.shape, generator=generator) for k, t in f.free().zeros().items()}
        for f in frames
    ]
    passes = Passes(model, frames, lambda i: {k: t.clone() for k, t in variables[i].items()})
    found = {}
    loss = passes.descend(
        ids[:2], expected[:2], 32, lambda i, _, grads: found.update({i: dict(grads)})
    )
    assert sorted(found) == list(range(len(frames)))
    # All blocks in one graph.
    (x, own), leaves = model.source.entering(ids[:2], stream.compute), []
    held = dict(own)
    for frame, v in zip(frames, variables, strict=True):
        free, place = frame.free(), frame.free().block.context.place
        leaves.append({k: t.clone().requires_grad_() for k, t in v.items()})
        x, left = free.block.passed(x, free.weights(leaves[-1]), given(place, held))
        held |= {place.left[path]: t for path, t in left.items()}
    readout = model.source.readout()
    total = divergence(readout(x), readout(expected[:2]).detach()) / 32
    assert loss == pytest.approx(float(total), rel=1e-6)
    every = [t for v in leaves for t in v.values()]
    # Some experts see no token.
    slopes = iter(torch.autograd.grad(total, every, materialize_grads=True, allow_unused=True))
    for i, v in enumerate(leaves):
        assert found[i].keys() == v.keys()
        for name in v:
            slope = next(slopes)
            assert bool(slope.any()) or "expert" in name, name
            torch.testing.assert_close(
                found[i][name], slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max())
            )


def planned_stages(stream, recipe):
    from helpers import planned

    return planned(stream, recipe).stages


# --- rows and bad input ---------------------------------------------------------------------------


def test_further_rows_change_no_others_and_are_none_of_them(tmp_path):
    model = source(tmp_path / "m")
    tokenizer = load_tokenizer(ModelStream(model).checkpoint)
    calibration = Calibration(str(model / "text.txt"), 8, 32)
    plain, more = (draw_rows(calibration, tokenizer, 0, 4, k) for k in (0, 10))
    assert torch.equal(plain.calibration, more.calibration)
    assert torch.equal(plain.held_out, more.held_out)
    assert len(plain.further) == 0 and more.further.shape == (10, 32)
    assert plain.sha256 != more.sha256


BAD = {  # settings, times of the text, samples, words
    "no rows apart": (
        ("polish.tokens=64", "polish.batch=2"),
        1,
        None,
        "rows that nothing was learned",
    ),
    "batch": (("polish.batch=100000",), 20, 8, "steps on 100000 rows, and there are"),
    "lr": (("polish.lr=0",), 20, 8, "lr between 0 and 0.5"),
    "tokens": (("polish.tokens=0",), 20, 8, "of at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, case):
    settings, times, samples, words = BAD[case]
    model = source(tmp_path / "m", times=times)
    if samples is None:  # all that there are
        tokenizer = load_tokenizer(ModelStream(model).checkpoint)
        drawn = draw_rows(Calibration(str(model / "text.txt"), 1, 32), tokenizer, 0, 9999)
        samples = 1 + len(drawn.held_out)
    with pytest.raises(LowbitError, match=words):
        made(model, tmp_path / "out", "W2A16g16", "rtn+polish", settings, samples)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]


def test_it_follows_a_whole_recipe():
    scheme = parse_scheme("W2A16g64")
    fast, both = (load_recipe(n, scheme=scheme) for n in ("fast", "fast+polish"))
    assert both.methods == (*fast.methods, Polish())
    assert [n for n, _, _ in both.entries] == ["awq", "tesseraq", "polish"]
    several = load_recipe("smoothquant+gptq+polish", scheme=scheme)
    assert [n for n, _, _ in several.entries] == ["smoothquant", "gptq", "polish"]
    with pytest.raises(LowbitError, match="'polish' twice"):
        load_recipe("rtn+polish+polish", scheme=scheme)


def test_it_comes_last():
    with pytest.raises(LowbitError, match="'gptq' after 'polish'"):
        load_recipe("polish+gptq", scheme=parse_scheme("W4A16"))


def test_damaged_state_is_named(tmp_path):
    from lowbit.stages.polish.state import State

    state = State(tmp_path / "s", 1)
    state.begin()
    (tmp_path / "s" / "now" / "block-00000.safetensors").write_bytes(b"x")
    with pytest.raises(LowbitError, match="begins to polish anew"):
        state.read(0, torch.device("cpu"))


# --- refine ---------------------------------------------------------------------------------------


def refined(folder, out, *words):
    given = ["refine", str(folder), "-o", str(out), *map(str, words)]
    for setting in SHORT:
        given += ["--set", setting]
    done = CliRunner().invoke(app, given)
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize("scheme, recipe", [("W2A16g16", "rtn"), ("W3A16", "quarot+claq")])
def test_refined_is_what_the_whole_recipe_makes(tmp_path, scheme, recipe):
    """Bit for bit, also where a stage before the blocks rotates them."""
    model = source(tmp_path / "m", times=10)
    before = made(model, tmp_path / "a", scheme, recipe, ())
    whole = made(model, tmp_path / "b", scheme, f"{recipe}+polish")
    code, said = refined(tmp_path / "a", tmp_path / "c")
    assert code == 0, said
    report = json.loads((tmp_path / "c" / "report.json").read_text())
    assert report["hash"] == whole.report["hash"] != before.report["hash"]
    assert report["size"]["after"] == before.report["size"]["after"]
    assert report["polish"]["kl"] == whole.report["polish"]["kl"]
    assert [e["error"] for e in report["linears"] if "error" in e] == [
        e["error"] for e in whole.report["linears"] if "error" in e
    ]
    assert "verified:" in said and "polished on" in said


def test_an_interrupted_refinement_goes_on(tmp_path):
    model = source(tmp_path / "m", times=10)
    made(model, tmp_path / "a", "W2A16g16", "rtn", ())
    whole = refine(tmp_path / "a", out=tmp_path / "b", settings=SHORT)

    def stopped(step):
        if step.what.startswith("polish: step 5"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine(tmp_path / "a", out=tmp_path / "c", settings=SHORT, watch=stopped)
    assert (
        refine(tmp_path / "a", out=tmp_path / "c", settings=SHORT).report["hash"]
        == (whole.report["hash"])
    )


def test_what_cannot_be_refined(tmp_path):
    model = source(tmp_path / "m", times=10)
    made(model, tmp_path / "a", "W4A16g16sym", "rtn", ())
    other = source(tmp_path / "n", "llama-mha", times=10)
    (tmp_path / "t.txt").write_text(TEXT * 9 + "!")
    export(tmp_path / "a", tmp_path / "g", "gptq")
    made(model, tmp_path / "p", "W4A16g16sym", "rtn+polish")
    cases = [
        (("a", "--teacher", other), "was not made of .* as it is now: 'config.json' is another"),
        (("a", "--calib", tmp_path / "t.txt"), "gives other calibration rows than"),
        (("a", "--set", "rtn.x=1"), "only polish.OPTION can be set"),
        (("g",), "is no artifact as quantize writes it .gptq."),
        (("p",), "is polished already"),
        (("m",), "report.json"),
    ]
    for (folder, *words), said in cases:
        code, told = refined(tmp_path / folder, tmp_path / "out", *words)
        assert code == 2 and re.search(said, told), (folder, words, told)
        assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]
    shard = next((tmp_path / "a").glob("model-00002*"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    code, told = refined(tmp_path / "a", tmp_path / "out")
    assert code == 1 and "is not what was written" in told


@pytest.mark.parametrize("scheme", ["W2A16g16", "W3A16:column"])
def test_the_planned_scratch_is_enough(tmp_path, scheme):
    """What lies beside the shards while it works, its copies of them apart, which are links."""
    model, most = source(tmp_path / "m", times=10), 0
    config = json.loads((model / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    recipe = load_recipe("rtn+polish", scheme=parse_scheme(scheme))
    planned = make_plan(read_config(str(model)), recipe, 8, 32)

    def look(step):
        nonlocal most
        files = [p for p in (tmp_path / "o.partial" / "polish-0").rglob("*") if p.is_file()]
        most = max(most, sum(p.stat().st_size for p in files if p.parent.name != "blocks"))

    made(model, tmp_path / "o", scheme, "rtn+polish", (*SHORT, "polish.norms=false"), watch=look)
    # Headers of files count for more than numbers here.
    assert 0 < most <= planned.scratch + 4 * 2 * 4096
    assert make_plan(read_config(str(model)), replace(recipe, methods=()), 8, 32).scratch == 0
