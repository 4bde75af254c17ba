"""Experts with linears of their own: the same model as with fused parameters."""

import copy
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from families import MIXTURES, SIZES, config_of, model_of
from torch import nn

from lowbit.errors import LowbitError
from lowbit.model.experts import form_of, is_fused_experts, proved, replace_fused, unfused
from lowbit.model.tracing import described

# Their fused forward sums in float32 whatever the model's dtype is: float64 does not make it exact.
SUMS_IN_FLOAT32 = {"nemotron_h": 1e-6}


# Classes whose experts stay as they are, and why.
LEFT = {
    "DbrxExperts": "one matrix holds all experts' rows",
    "InklingSharedExperts": "weighted before the down projection, by no router's choice",
    "JetMoeParallelExperts": "one projection of all experts, called by another module",
}


def classes():
    """Every experts class of transformers by name."""
    found = {}
    for file in sorted(Path(T.__file__).parent.glob("models/*/modeling_*.py")):
        names = re.findall(r"^class (\w*Experts)\(nn.Module\)", file.read_text("utf-8"), re.M)
        found.update({n: f"transformers.models.{file.parent.name}.{file.stem}" for n in names})
    return found


def fused_of(family):
    """The first fused module of a tiny model."""
    return next(m for m in model_of(config_of(family)).modules() if is_fused_experts(m))


def chosen(experts, tokens=9, numbers=(0, 2)):
    """Rows, numbers of experts and weights for a module."""
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, experts.form.hidden, generator=rng, dtype=torch.float64)
    weights = torch.rand(tokens, len(numbers), generator=rng, dtype=torch.float64)
    return x, torch.tensor(numbers).expand(tokens, -1), weights


@pytest.mark.parametrize("family", MIXTURES)
def test_logits_stay(family):
    model = model_of(config_of(family))
    ids = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        fused = {n for n, m in model.named_modules() if is_fused_experts(m)}
        assert set(replace_fused(model)) == fused and fused
        after = model(input_ids=ids, use_cache=False).logits
    assert before.std() > 0
    assert (before - after).abs().max() <= SUMS_IN_FLOAT32.get(family, 1e-10)
    assert not any(is_fused_experts(m) for m in model.modules())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "nemotron_h", "aria_text"])
def test_numbers_are_those_of_the_fused_parameters(family):
    fused = fused_of(family)
    made = unfused(fused)
    own = dict(fused.named_parameters(recurse=False))
    for linear, part in made.form.parts.items():
        for kind, view in {"weight": part.weight, "bias": part.bias}.items():
            whole = own.get(part.parameter + ("_bias" if kind == "bias" else ""))
            if whole is None:
                continue
            assert whole.shape == made.form.shape(part.parameter + "_bias" * (kind == "bias"))
            mine = [made.get_parameter(f"{i}.{linear}.{kind}") for i in range(made.form.count)]
            assert torch.equal(torch.stack(list(mine)), view(whole))
            assert all(m.is_contiguous() for m in mine)
            assert mine[0].data_ptr() != whole.data_ptr()


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "qwen3_moe"])
def test_meta_skeleton(family):
    config = config_of(family)
    with torch.device("meta"):
        model = T.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    names = replace_fused(model)
    assert len(names) == 4
    experts = model.get_submodule(names[0])
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in experts.parameters())
    linears = {n for n, m in experts.named_modules() if isinstance(m, nn.Linear)}
    assert linears == {f"{i}.{n}" for i in range(5) for n in ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_hooks_see_routed_rows_only(family):
    made = unfused(fused_of(family))
    seen = {}
    for name, module in made.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda m, x, y, name=name: seen.update({name: tuple(x[0].shape)})
            )
    made(*chosen(made))
    assert {n.split(".")[0] for n in seen} == {"0", "2"}
    assert seen["0.up_proj"] == (9, made.form.hidden)
    assert seen["2.down_proj"] == (9, made.form.inner)


def test_rows_of_zeros_are_left_out_of_sorted_experts():
    made = unfused(fused_of("llama4_text"))
    seen = {}
    made.get_submodule("1.up_proj").register_forward_hook(lambda m, x, y: seen.update(one=x[0]))
    made.get_submodule("3.up_proj").register_forward_hook(lambda m, x, y: seen.update(three=x[0]))
    x = torch.zeros(5, 4, made.form.hidden, dtype=torch.float64)
    x[1, 2:] = 1
    made(x.reshape(20, -1))
    assert seen["one"].shape == (2, made.form.hidden) and "three" not in seen


def test_choices_beyond_the_experts_pass_rows_on():
    fused = fused_of("longcat_flash")
    made = unfused(fused)
    assert (made.form.count, made.form.identities) == (5, 2)
    x, picks, weights = chosen(made, numbers=(4, 6))
    torch.testing.assert_close(made(x, picks, weights), fused(x, picks, weights))
    x, picks, weights = chosen(made, numbers=(5, 6))
    torch.testing.assert_close(made(x, picks, weights), x * weights.sum(1, keepdim=True))


def test_gradients_and_functional_call():
    fused = fused_of("gpt_oss").requires_grad_(True)
    made = unfused(fused)
    x, picks, weights = chosen(made)
    fused.config._experts_implementation = "eager"
    fused(x, picks, weights).square().sum().backward()
    swapped = {n: (2 * p.detach()).requires_grad_() for n, p in made.named_parameters()}
    own = {n: p.detach() / 2 for n, p in swapped.items()}
    halved = {n: (p * 0.5) for n, p in swapped.items()}
    out = torch.func.functional_call(made, halved, (x, picks, weights))
    assert torch.equal(out, torch.func.functional_call(made, own, (x, picks, weights)))
    out.square().sum().backward()
    part = made.form.parts["gate_proj"]
    want = part.weight(fused.gate_up_proj.grad)[2]
    torch.testing.assert_close(swapped["2.gate_proj.weight"].grad * 2, want, rtol=1e-10, atol=0)
    assert swapped["1.gate_proj.weight"].grad is None


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_copies_are_independent(family):
    made = unfused(fused_of(family))
    other = copy.deepcopy(made)
    arguments = chosen(made)
    before = made(*arguments)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(made(*arguments), before)
    assert not torch.equal(other(*arguments), before)


def test_every_class_is_proved_or_listed():
    settings = SimpleNamespace(
        **SIZES,
        hidden_act="silu",
        hidden_activation="silu",
        mlp_hidden_act="relu2",
        mlp_gate_softcap=2.0,
        mlp_up_softcap=2.0,
        swiglu_limit=3.0,
        swiglu_alpha=1.7,
        moe_latent_size=None,
        moe_hidden_size=64,
        post_norm_eps=1e-6,
        ffn_act_fn={"name": "silu"},
    )
    left, proven = set(), []
    for name, module in classes().items():
        kind = getattr(importlib.import_module(module), name)
        if name == "JetMoeParallelExperts":
            made = kind(5, 64, 32)
        else:
            with torch.device("meta"):
                made = kind(settings)
        try:
            assert is_fused_experts(made)
            form_of(made)
            proven.append(name)
        except (AssertionError, LowbitError):
            left.add(name)
    assert left == set(LEFT)
    assert len(proven) >= 68


class Squared(nn.Module):
    """Fused experts that gate in a way of their own."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 6))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for i in range(4):
            at, k = torch.where(top_k_index == i)
            gate, up = (hidden_states[at] @ self.gate_up_proj[i].T).chunk(2, dim=-1)
            made = (self.act_fn(gate) * up * up) @ self.down_proj[i].T
            out.index_add_(0, at, made * top_k_weights[at, k, None])
        return out


class Alternating(Squared):
    """Undeclared: rows of gate and up alternate."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for i in range(4):
            at, k = torch.where(top_k_index == i)
            both = hidden_states[at] @ self.gate_up_proj[i].T
            made = (self.act_fn(both[:, ::2]) * both[:, 1::2]) @ self.down_proj[i].T
            out.index_add_(0, at, made * top_k_weights[at, k, None])
        return out


def test_layout_that_is_not_declared_is_proved():
    assert form_of(Alternating()).interleaved
    fused = Alternating().double()
    made = unfused(fused)
    assert proved(fused, made)
    with torch.no_grad():
        made.get_parameter("3.up_proj.weight")[0, 0] += 1e-6
    assert not proved(fused, made)


def test_unknown_form_is_refused():
    model = nn.ModuleDict({"experts": Squared()})
    with pytest.raises(LowbitError, match=r"'experts': the experts of Squared lie in a layout"):
        replace_fused(model)
    assert isinstance(model["experts"], Squared)


def test_a_router_of_several_linears_is_kept():
    found = described(config_of("zaya", num_hidden_layers=2))
    for graph in found.kinds:
        why = {n: said for n, said in graph.kept if n.startswith("mlp.gate.")}
        assert len(why) == 4 and set(why.values()) == {"it only sends tokens to experts"}
        assert graph.mixtures and not [n for n in graph.linears if n.startswith("mlp.gate.")]
