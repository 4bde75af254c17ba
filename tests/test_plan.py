"""Plans from config.json alone: published sizes, parameter counts, bytes."""

import json

import pytest
import torch
import transformers as T
from helpers import FAMILIES, needs_of
from typer.testing import CliRunner

import lowbit.cli.display.plan
from lowbit import machine
from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.grid.names import parse_scheme
from lowbit.grid.triton_kernels import tried
from lowbit.model.outline import Outline
from lowbit.plan import Plan, Setting, make_plan, memory, read_config
from lowbit.plan import speed as estimate
from lowbit.plan.speed import Speed, measure_speed
from lowbit.recipe.presets import load_recipe


def recipe(scheme):
    return load_recipe("tesseraq", scheme=parse_scheme(scheme))


def llama(hidden, inner, layers, heads, vocab):
    return T.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=vocab,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
    )


def test_sizes_of_the_large_llamas():
    big = make_plan(llama(8192, 28672, 80, 64, 128256), recipe("W2A16g128"))
    assert big.original / 2**30 == pytest.approx(131.4, abs=0.1)
    assert big.artifact / 2**30 == pytest.approx(21, abs=0.5)
    huge = make_plan(llama(16384, 53248, 126, 128, 128256), recipe("W2A16g128"))
    assert huge.original / 2**30 == pytest.approx(756, abs=1)
    # 114 is published with 16-bit zero points (2.25 bits per weight); packed ones take 2.14.
    assert huge.bits_per_weight == pytest.approx(2 + 18 / 128, abs=1e-3)
    assert (
        huge.artifact + huge.quantized * (2.25 - huge.bits_per_weight) / 8
    ) / 2**30 == pytest.approx(113.3, abs=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_counts_are_the_models(family):
    config = FAMILIES[family]()
    model = T.AutoModelForCausalLM.from_config(config)
    assert make_plan(config, recipe("W2A16g16")).parameters == sum(
        p.numel() for p in model.parameters()
    )


def test_bad_input(tmp_path):
    with pytest.raises(LowbitError, match=r"no config\.json"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llamma"}))
    with pytest.raises(LowbitError, match="cannot be read"):
        read_config(str(tmp_path))
    with pytest.raises(LowbitError, match="does not divide"):
        make_plan(FAMILIES["llama"](), recipe("W2A16g24"))


def test_every_expert_is_counted():
    config = T.MixtralConfig(num_hidden_layers=2, num_local_experts=6)
    with torch.device("meta"):
        model = T.AutoModelForCausalLM.from_config(config)
    made = make_plan(config, recipe("W2A16g128"))
    assert made.parameters == sum(p.numel() for p in model.parameters())
    hidden, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads
    attention = 2 * hidden * hidden + 2 * hidden * kv * hidden // config.num_attention_heads
    assert made.quantized == 2 * (attention + 6 * 3 * hidden * inner)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "falcon", "head_dim": 8},
        {"num_attention_heads": "eight"},
        {"model_type": "nonsense"},
    ],
)
def test_configs_that_transformers_cannot_read(tmp_path, change):
    config = {**llama(64, 128, 2, 8, 300).to_dict(), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LowbitError, match="config.json cannot be read as a model config"):
        read_config(str(tmp_path))


# --- memory ---------------------------------------------------------------------------------------

L8B, L70B, L405B = (
    (4096, 14336, 32, 32, 128256),
    (8192, 28672, 80, 64, 128256),
    (16384, 53248, 126, 128, 128256),
)
GPU = torch.device("cuda")


def linears_of(hidden, inner, heads):
    """Weights in the linears of a Llama block with 8 heads of keys and values, counted by hand."""
    return 2 * hidden * hidden + 2 * hidden * (hidden // heads * 8) + 3 * hidden * inner


@pytest.mark.parametrize(
    "shape, device, least",
    [
        (L70B, "cpu", 28 * 855_638_016),
        (L70B, "cuda", 28 * 855_638_016),
        (L405B, "cpu", 28 * 3_187_671_040),
        (L405B, "cuda", 28 * 3_187_671_040),
    ],
)
def test_memory_of_the_large_llamas(shape, device, least):
    hidden, inner, _, heads, vocab = shape
    wide = 4 if device == "cpu" else 2
    found = make_plan(
        llama(*shape), recipe("W2A16g128"), 128, 2048, device=torch.device(device)
    ).memory
    # Weights, those before the clip, variables, soft ones and gradients.
    assert least == (4 + 2 + 18 + 2 * 2) * linears_of(hidden, inner, heads)
    assert found.least == least + 4 * 2 * hidden  # two norms
    assert found.stream == (128 + 16) * 2048 * hidden * 2 and found.copies == 3
    assert found.outer == (2 * vocab * hidden + hidden) * wide
    assert set(found.steps) == {"passes", "awq", "tesseraq", "quality"}
    # The variables of soft rounding: 12 bytes a weight, 4 for soft weights and gradients, and the
    # weight's own 4.
    assert found.least < found.block < 6 * found.least
    assert found.peak == found.process + found.block + found.outer + found.streams
    assert (found.process > 0) == (device == "cpu")


def test_hessians_count_in_float64():
    found = {
        n: make_plan(
            llama(*L405B), load_recipe(n, scheme=parse_scheme("W4A16g128")), device=GPU
        ).memory
        for n in ("rtn", "gptq", "gptq-paper")
    }
    square = 8 * 53248**2
    assert found["gptq"].least - 4 * (linears_of(16384, 53248, 128) + 2 * 16384) == 2 * square
    assert found["gptq"].block > found["rtn"].block + 2 * square
    # O_proj's is as wide as those of the two norms: counted once by width.
    together = sum(8 * w * w for w in (16384, 53248))
    assert found["gptq-paper"].steps["gptq"] - found["gptq"].steps["gptq"] >= together


@pytest.mark.parametrize("shape", [L70B])
def test_plan_says_where_activations_go_and_refuses_what_cannot_fit(tmp_path, monkeypatch, shape):
    (tmp_path / "config.json").write_text(json.dumps(llama(*shape).to_dict()))
    need = needs_of(
        llama(*shape), recipe("W2A16g128"), 128 + 16, 2048, torch.device("cpu"), torch.bfloat16
    )
    free = [need.peak]
    for where in (memory, lowbit.cli.display.plan):
        monkeypatch.setattr(where, "free_memory", lambda device: free[0])
    monkeypatch.setattr(memory, "disk_free", lambda folder: 1 << 60)

    def said():
        result = CliRunner().invoke(
            app,
            [
                "plan",
                str(tmp_path / "config.json"),
                "--scheme",
                "W2A16g128",
                "--samples",
                "128",
                "--length",
                "2048",
                "--json",
                str(tmp_path / "plan.json"),
                "--device",
                "cpu",
            ],
        )
        return result.exit_code, " ".join(result.output.replace("│", " ").split())

    code, text = said()
    assert code == 0 and "auto puts them here on the host" in text
    assert json.loads((tmp_path / "plan.json").read_text())["peak_memory"] == need.peak
    free[0] = need.least
    code, text = said()
    assert code == 0 and "auto puts them here on the disk" in text
    free[0] = need.least - 1
    code, text = said()
    assert code == 2 and "one block of this model does not fit this machine" in text
    assert (tmp_path / "plan.json").is_file()  # what it would take is said all the same
    monkeypatch.setattr(memory, "disk_free", lambda folder: need.streams - 1)
    assert "nowhere is room for the activations" in said()[1]


def test_a_machine_that_does_not_tell_refuses_nothing(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    need = needs_of(llama(*L405B), recipe("W2A16g128"), 144, 2048, GPU, torch.bfloat16)
    need.check(GPU)
    assert need.placed("auto", GPU, machine.Path(".")).used == "device"


@pytest.mark.parametrize("family", FAMILIES)
def test_needs_of_every_family(family):
    for name in ("rtn", "tesseraq", "gptq", "awq+gptq", "smoothquant", "quarot"):
        chosen = load_recipe(name, scheme=parse_scheme("W4A16g16"))
        if name == "quarot" and family in ("opt", "opt-post-norm", "qwen3", "gemma"):
            continue  # some of them cannot be rotated; not this test's business
        need = needs_of(FAMILIES[family](), chosen, 24, 32, torch.device("cpu"), torch.bfloat16)
        assert 0 < need.least <= need.block <= need.peak


def test_a_plan_for_a_gpu_that_is_not_here(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(llama(*L70B).to_dict()))

    def planned(gib):
        result = CliRunner().invoke(
            app,
            [
                "plan",
                str(tmp_path / "config.json"),
                "--scheme",
                "W2A16g128",
                "--samples",
                "128",
                "--length",
                "2048",
                "--gpu-memory",
                gib,
            ],
        )
        return result.exit_code, " ".join(result.output.replace("│", " ").split())

    code, text = planned("139")
    assert (
        code == 0
        and "139 are free there" in text
        and "--offload auto puts them here on the device" in text
        and "not said of a GPU that is not here" in text
    )
    code, text = planned("16")
    assert code == 2 and "one block of this model does not fit 'cuda'" in text


@pytest.mark.parametrize(
    "options, said",
    [
        (["--gpu-memory", "nan"], "--gpu-memory nan: give a number of GiB"),
        (["--gpu-memory", "-3"], "--gpu-memory -3: give a number of GiB"),
        (["--gpu-memory", "80", "--device", "cpu"], "give one of them"),
        (["--ranks", "0"], "--ranks 0: give a whole number from 1"),
        (["--offload", "dsk"], "unknown place for --offload 'dsk'"),
    ],
)
def test_plan_refuses_options_that_say_nothing(tmp_path, options, said):
    (tmp_path / "config.json").write_text(json.dumps(llama(*L8B).to_dict()))
    result = CliRunner().invoke(
        app, ["plan", str(tmp_path / "config.json"), "--scheme", "W2A16g128", *options]
    )
    assert result.exit_code == 2 and said in " ".join(result.output.split())


def test_plan_counts_the_processes_of_a_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(llama(*L8B).to_dict()))
    found = []
    for ranks in ("1", "4"):
        out = tmp_path / f"{ranks}.json"
        result = CliRunner().invoke(
            app,
            [
                "plan",
                str(tmp_path / "config.json"),
                "--scheme",
                "W2A16g128",
                "--gpu-memory",
                "139",
                "--ranks",
                ranks,
                "--json",
                str(out),
            ],
        )
        assert result.exit_code == 0 and ("each of 4" in result.output) == (ranks == "4")
        found.append(json.loads(out.read_text()))
    assert found[1]["activations"] == found[0]["activations"] // 4
    assert found[1]["block_memory"] < found[0]["block_memory"]


# --- time -----------------------------------------------------------------------------------------


class StandIn:
    """A device whose rates are known: every wait for it costs ``latency``, and small products do
    not fill it.
    """

    def __init__(self, half, single, copies, latency, full=1, free=None):
        self.rates, self.copies, self.latency, self.full, self.room = (
            {torch.bfloat16: half, torch.float32: single},
            copies,
            latency,
            full,
            free,
        )
        self.now, self.largest, self.made = 0.0, 0, []

    def clock(self):
        return self.now

    def free(self):
        return self.room

    def _taking(self, seconds):
        def run(times):
            self.now += self.latency + times * seconds

        return run

    def product(self, size, dtype):
        self.made.append((size, dtype))
        self.largest = max(self.largest, 3 * size**2 * dtype.itemsize)
        # As long as the smallest that fills it.
        return self._taking(2 * max(size, self.full) ** 3 / self.rates[dtype])

    def copy(self, numbers):
        self.largest = max(self.largest, 8 * numbers)
        return self._taking(12 * numbers / self.copies)


@pytest.mark.parametrize(
    ("device", "stand_in"),
    [
        ("cuda", StandIn(650e12, 50e12, 2.6e12, 60e-6, full=4096)),
        ("cuda", StandIn(120e12, 30e12, 0.9e12, 100e-6, full=2048)),
        ("cuda", StandIn(4e12, 4e12, 0.2e12, 1e-3)),
        ("cpu", StandIn(90e9, 60e9, 12e9, 1e-5, full=512)),
        ("cpu", StandIn(2e9, 1e9, 3e9, 1e-5)),
        ("cpu", StandIn(3e12, 1.5e12, 200e9, 2e-5, full=1024)),
    ],
)
def test_the_speed_of_a_device_is_not_its_latency(monkeypatch, device, stand_in):
    monkeypatch.setattr(estimate, "multiplies_bfloat16", lambda device: True)
    found = measure_speed(torch.device(device), stand_in)
    assert found.half == pytest.approx(stand_in.rates[torch.bfloat16], rel=0.05)
    assert found.single == pytest.approx(stand_in.rates[torch.float32], rel=0.05)
    assert found.copies == pytest.approx(stand_in.copies, rel=0.05)
    assert stand_in.now < 7


def test_measuring_stays_within_a_few_seconds_and_a_share_of_what_is_free(monkeypatch):
    for slow in (1e8, 1e10, 1e12, 1e14):
        bench = StandIn(slow, slow, slow, 1e-5)
        measure_speed(torch.device("cuda"), bench)
        # Of the smallest product and the sums even a slow device makes some.
        assert bench.now < 8 + 8 * 2 * 1024**3 / slow + 48 * 2**27 / slow
    tight = StandIn(650e12, 50e12, 2.6e12, 60e-6, free=200 << 20)
    measure_speed(torch.device("cuda"), tight)
    assert tight.largest <= tight.room / 4 + 1 and max(size for size, _ in tight.made) < 8192


def test_a_cpu_is_measured_as_it_is():
    found = measure_speed(torch.device("cpu"))
    assert 1e8 < found.single < 1e14 and 1e8 < found.half < 1e14 and 1e7 < found.copies < 1e13


H100 = Speed(650e12, 50e12, 2.6e12)


def seconds(name, scheme="W2A16g128", speed=H100, shape=L8B, device=GPU, settings=(), **given):
    chosen = load_recipe(name, scheme=parse_scheme(scheme), settings=settings)
    plan = make_plan(
        llama(*shape), chosen, chosen.calibration.samples, 2048, device=device, **given
    )
    return plan.seconds(speed)


def test_every_kind_of_work_counts_at_its_own_rate():
    """What each rate bounds takes longer by so much where that rate is a tenth."""
    slow = {
        k: Speed(**{**vars(H100), k: getattr(H100, k) / 10}) for k in ("half", "single", "copies")
    }
    parts = {
        n: {k: (seconds(n, speed=s) - seconds(n)) / 9 for k, s in slow.items()}
        for n in ("default", "awq", "gptq", "rtn")
    }
    for name, of in parts.items():
        assert sum(of.values()) == pytest.approx(seconds(name))
    assert parts["rtn"]["single"] == 0
    square = 14336**2 * 32 / 50e12
    # The Gram matrix of down_proj's inputs, which are 16 bits; the error by it is of float32.
    for name in ("awq", "gptq"):
        assert parts[name]["half"] > parts["rtn"]["half"] + 2 * 128 * 2048 * square * 50 / 650
    assert parts["awq"]["single"] > 2 * 4096 * square
    # A Hessian is inverted in float32.
    assert parts["gptq"]["single"] > 2 * 14336 * square
    passed = 24 if tried(GPU) else 80  # bytes of a weight
    hardened = seconds(
        "default", settings=["tesseraq.schedule=exponential-5-100", "tesseraq.iters=6"]
    ) - seconds("default")  # as many steps
    assert hardened == pytest.approx(50 * passed * linears_of(4096, 14336, 32) * 32 / 2.6e12)
    logits = seconds("default") - seconds("default", settings=["tesseraq.objective=block"])
    assert logits > 600 * 6 * 4 * 2048 * 4096 * 128256 / 650e12


def test_time_follows_the_steps_and_the_ranks():
    assert (
        2.5
        < seconds("default") / seconds("fast")
        < 5
        < seconds("tesseraq-paper") / seconds("default")
    )
    assert seconds("default", ranks=4) < 0.4 * seconds("default")


def planned_by(ranks, recipe, config, scheme="W4A16g128"):
    own = load_recipe(recipe, scheme=parse_scheme(scheme))
    return make_plan(config, own, 128, 2048, device=GPU, ranks=ranks)


EXPERTS = dict(hidden_size=2048, num_hidden_layers=2, num_attention_heads=16, head_dim=128)
EXPERTS |= dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768)


@pytest.mark.parametrize(
    ("recipe", "part", "kind", "times"),
    [
        ("rtn", "passes", "half", 4),
        ("gptq", "gptq: Hessians", "single", 4),
        ("gptq", "gptq: columns", "single", 4),  # rows of every linear
        ("gptq", "gptq: factors", "single", 1),  # one site after the other
        ("claq", "claq: factors", "single", 1),
        ("awq", "awq: clip search", "moved", 4),
        ("awq", "awq: candidates rounded", "moved", 1),
        ("default", "tesseraq: steps", "half", 4),
        ("default", "tesseraq: soft weights", "moved", 4),
        ("default", "tesseraq: hardening", "moved", 4),
    ],
)
def test_what_processes_divide_and_what_each_repeats(recipe, part, kind, times):
    scheme = "W4A16:column" if recipe == "claq" else "W4A16g128"
    one, four = (planned_by(n, recipe, llama(*L8B), scheme).work for n in (1, 4))
    assert getattr(one[part], kind) == pytest.approx(times * getattr(four[part], kind), rel=0.04)
    assert not any(work.sent for work in one.values())


def test_experts_are_divided_whole():
    config = T.Qwen3MoeConfig(**EXPERTS)
    one, eight = (planned_by(n, "gptq", config).work for n in (1, 8))
    for part in ("gptq: factors", "gptq: columns"):
        assert one[part].single > 5 * eight[part].single, part


def test_what_is_sent_counts_where_the_link_is_known():
    plan = planned_by(4, "default", llama(*L8B))
    sent = sum(work.sent for work in plan.work.values())
    linked = Speed(**{**vars(H100), "near": 50e9})
    assert plan.seconds(linked) - plan.seconds(H100) == pytest.approx(sent / 50e9)
    # A step: gradients in float32 one way, weights in bfloat16 the other, three quarters of both.
    weights = linears_of(4096, 14336, 32)
    assert plan.work["tesseraq: exchange of steps"].sent > 600 * 32 * 6 * weights * 3 / 4
    assert not any(work.far for work in plan.work.values())
    held = [planned_by(n, "default", llama(*L8B)).memory.steps["tesseraq"] for n in (1, 4)]
    assert held[0] - held[1] > 1.1 * weights * (18 * 3 / 4 - 4)


def test_machines_repeat_steps_and_send_little_to_each_other():
    """As much of a step on two machines of four as on one; rows that are drawn go far."""
    recipe = load_recipe("default", scheme=parse_scheme("W4A16g128"))
    outline = Outline.of(llama(*L8B))
    one, two = (
        Plan.of(outline, recipe, Setting(128, 2048, GPU, torch.bfloat16, ranks=n, here=4)).work
        for n in (4, 8)
    )
    for part in ("tesseraq: steps", "tesseraq: soft weights"):
        assert two[part] == one[part], part
    exchanged = two["tesseraq: exchange of steps"]
    assert exchanged.near and 0 < exchanged.far < 0.3 * exchanged.near
    assert two["awq: clip search"].far and not two["awq: clip search"].near
    assert two["passes"].half == pytest.approx(one["passes"].half / 2, rel=0.01)


@pytest.mark.parametrize(("dtype", "slower"), [(torch.float16, True), (torch.bfloat16, False)])
def test_steps_in_float32_on_a_checkpoint_in_float16_are_seen(dtype, slower):
    config, found = llama(*L8B), []
    config.dtype = dtype
    for settings in ([], ["tesseraq.precision=float32"]):
        found.append(
            make_plan(
                config,
                load_recipe("tesseraq-paper", settings=settings),
                512,
                2048,
                device=GPU,
            ).seconds(H100)
        )
    assert (found[1] > 5 * found[0]) == slower
