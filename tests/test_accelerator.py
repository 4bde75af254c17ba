"""Every method on an accelerator: no operator mixes devices, and no step of progressive rounding
waits for the device.
"""

from dataclasses import replace
from functools import partial

import accelerator
import pytest
import torch
from helpers import LLAMA, begin, save_tiny
from transformers import AutoModelForCausalLM, LlamaConfig

import lowbit
import lowbit.run.quantize
from lowbit.artifact.proof import verify
from lowbit.grid import Affine, Codebook, PerToken, QTensor
from lowbit.grid.codebook import CodebookParams
from lowbit.kernels.integer import IntegerWeight, linear
from lowbit.methods import METHODS
from lowbit.methods._rounding import hardening
from lowbit.methods.tesseraq import TesseraQ
from lowbit.model.model import Streams
from lowbit.model.storage import Storage
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe
from lowbit.recipe.presets import load_recipe

BLOCKS, PHASES = 2, 3
FEW_STEPS = (f"tesseraq.schedule=exponential-2-{PHASES}", "tesseraq.iters=2")
FEW_SEARCHED = ("awq.exponents=3", "awq.shrinks=2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    small = dict(
        LLAMA,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=BLOCKS,
    )
    folder = save_tiny(tmp_path_factory.mktemp("model"), LlamaConfig(**small))
    # What transformers keeps of its first load in a process must not be of this device: later tests
    # would compute with it.
    AutoModelForCausalLM.from_pretrained(folder)
    return folder


@pytest.fixture
def device(monkeypatch):
    # The loader is a process without this device.
    monkeypatch.setattr("lowbit.run.closing.verify", partial(verify, loader=False))
    yield from accelerator.entered(monkeypatch)


@pytest.fixture
def waits_of_phases(monkeypatch, device):
    """What each phase of TesseraQ's steps, from its first to its last, made the host wait for."""
    found, descend = [], TesseraQ._descend

    def watched(*args):
        before = device.waits.copy()
        total = descend(*args)
        found.append(device.waits - before)
        return total

    monkeypatch.setattr(TesseraQ, "_descend", watched)
    return found


CASES = [
    ("rtn", "W4A16g16", (), "device"),
    (
        "awq+gptq",
        "W3A16g16",
        (*FEW_SEARCHED, "gptq.act_order=true", "gptq.static_groups=true"),
        "device",
    ),
    ("tesseraq-fast", "W2A16g16", (*FEW_STEPS, *FEW_SEARCHED), "device"),
    ("tesseraq-fast", "W2A8KV8g16", (*FEW_STEPS, *FEW_SEARCHED), "host"),
    ("tesseraq-codebook", "W2A16", FEW_STEPS, "device"),
    ("omniquant", "W4A4", ("omniquant.epochs=1",), "device"),
    ("smoothquant+llm-int8", "W8A8sym", (), "device"),
    ("quarot", "W4A4KV4", (), "device"),
    ("claq-fused", "W2A16", (), "device"),
    ("crossquant-deploy", "W4A8g16sym", ("crossquant.fold=group",), "device"),
    ("rtn+polish", "W2A16g16", ("polish.tokens=96", "polish.batch=2"), "device"),
    ("rtn+polish", "W2A16", ("polish.tokens=96", "polish.batch=2", "polish.norms=false"), "host"),
]


@pytest.mark.parametrize(
    "recipe, scheme, settings, offload", CASES, ids=[f"{r}-{o}" for r, _, _, o in CASES]
)
def test_nothing_mixes_devices_and_no_step_waits(
    model, device, waits_of_phases, tmp_path, recipe, scheme, settings, offload
):
    where = dict(device=accelerator.NAME, offload=offload)
    calib = dict(calib=str(model / "text.txt"), samples=6, length=24)
    lowbit.quantize(
        str(model), scheme, recipe, out=tmp_path / "out", settings=settings, **calib, **where
    )
    assert device.operations > 1000  # it is where the work was done
    assert waits_of_phases == [{}] * (BLOCKS * PHASES if "tesseraq" in recipe else 0)


@pytest.mark.parametrize("q", [0.0, 0.05, 0.333, 0.5, 1.0])
def test_hardening_does_not_crowd_one_bin(device, q):
    values = torch.rand(40_000, generator=torch.Generator().manual_seed(0)) / 2
    values[10_000:] = 0.5
    there = values.to(accelerator.NAME)
    bins, counts = hardening._histogram(there)
    assert int(bins.held.bincount().max()) < 10
    assert torch.equal(counts.held, hardening._histogram(values)[1].int())
    device.waits.clear()
    found = hardening.quantile(there, q)
    assert torch.equal(found.held, hardening.quantile(values, q))
    assert device.waits.total() == (2 if q < 0.25 else 1)


@pytest.mark.parametrize("bits", [2, 4])
def test_no_column_of_a_codebook_waits_while_it_is_refined(device, bits):
    grid, w = Codebook(bits), torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    widths = torch.full((2,), bits)
    table = grid.fit_columns(w, widths)
    there = CodebookParams(*(t.to(accelerator.NAME) for t in (table.levels, table.widths)))
    column = (w[:, :1] + 0.1).to(accelerator.NAME)
    device.waits.clear()
    found = grid.refined(there, 0, column, 3)
    assert not device.waits, device.waits
    expected = grid.refined(table, 0, w[:, :1] + 0.1, 3)
    torch.testing.assert_close(found.levels.held, expected.levels, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_integer_product_does_not_wait(device, bits, symmetric):
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    grid, of_inputs = Affine(bits, 8, symmetric=symmetric), PerToken(bits, symmetric=symmetric)
    params = grid.fit(w)
    weight = IntegerWeight.of(QTensor(grid, grid.encode(w, params), params))
    there = replace(
        weight,
        **{
            k: getattr(weight, k).to(accelerator.NAME)
            for k in ("codes", "sums", "zero_point", "scale")
        },
    )
    far = x.to(accelerator.NAME)
    device.waits.clear()
    found = linear(far, there, of_inputs)
    assert not device.waits, device.waits
    assert torch.equal(found.held, linear(x, weight, of_inputs))


@pytest.mark.parametrize("place, waits", [("device", 0), ("host", 1)])
def test_a_pass_into_host_memory_waits_once(device, model, monkeypatch, place, waits):
    monkeypatch.setattr("lowbit.model.block.TOKENS_PER_PASS", 24)  # a row at a time
    stream = ModelStream(model, accelerator.NAME)
    storage = Storage(place, stream.device)
    x = stream.embed(torch.randint(3, 200, (4, 24)), storage=storage)
    streams, kwargs = Streams(x, x, 4, storage=storage), stream.block_kwargs(24)[0]
    whole = begin(stream, 0, Recipe(Affine(4, 16)), streams, kwargs, 0)
    device.waits.clear()
    made = whole.run(x)
    assert device.waits.total() == waits, device.waits
    expected = torch.cat([whole.forward(row[None].to(stream.device)).cpu() for row in x])
    torch.testing.assert_close(made.cpu(), expected.to(made.dtype))


def test_every_method_is_tried():
    tried = {
        type(m)
        for recipe, scheme, *_ in CASES
        for m in load_recipe(recipe, scheme=lowbit.grid.names.parse_scheme(scheme)).methods
    }
    assert tried == {entry.kind for entry in METHODS.values()}


# --- the stand-in itself: what a GPU refuses or waits for, and what it does not -------------------


def hooked(x, hook):
    """x, whose gradient is shown to a function on autograd's own thread."""

    def shown(gradient):
        hook(gradient)

    x.register_hook(shown)
    return x


FORBIDDEN = {
    "add": lambda near, far: far + near,
    "matmul": lambda near, far: far @ near,
    "written in place": lambda near, far: near.add_(far),
    "a scalar written in place": lambda near, far: near[0, 0].add_(far[0, 0]),
    "cat with a scalar": lambda near, far: torch.stack([far.sum(), torch.tensor(1.0)]),
    "values put by index": lambda near, far: far.index_put_((torch.tensor([0]),), near[:1]),
    "index of the CPU's": lambda near, far: near[far[0].long()],
    "generator": lambda near, far: torch.rand(
        2, device=accelerator.NAME, generator=torch.Generator()
    ),
    "generator of the device": lambda near, far: torch.rand(
        2, generator=torch.Generator(accelerator.NAME)
    ),
    "pointer": lambda near, far: far.data_ptr(),
    "in a backward pass": lambda near, far: torch.autograd.grad(
        hooked(far.requires_grad_() * 1, lambda g: g + near).sum(), far
    ),
}
WAITS = {
    "item": lambda near, far: far[0, 0].item(),
    "truth": lambda near, far: bool((far > 0).all()),
    "tolist": lambda near, far: far.tolist(),
    "to the CPU": lambda near, far: far.cpu(),
    "into pageable memory": lambda near, far: near.copy_(far, non_blocking=True),
    "into the CPU's": lambda near, far: near.copy_(far),
    "to the device": lambda near, far: near.to(accelerator.NAME),
    "from pageable memory": lambda near, far: far.copy_(near, non_blocking=True),
    "made on the device": lambda near, far: torch.tensor([1.0], device=accelerator.NAME),
    "nonzero": lambda near, far: far.nonzero(),
    "equal": lambda near, far: torch.equal(far, far),
    "mask": lambda near, far: far[far > 0],
    "row numbers of the CPU's": lambda near, far: far[torch.tensor([1, 0])],
    "row numbers in a list": lambda near, far: far[[1, 0]],
    "in a backward pass": lambda near, far: torch.autograd.grad(
        hooked(far.requires_grad_() * 1, lambda g: g.sum().item()).sum(), far
    ),
}
GOES_ON = {
    "arithmetic": lambda near, far: (far @ far).softmax(-1).sum(),
    "a scalar of the CPU's": lambda near, far: far * torch.tensor(2.0),
    "made there": lambda near, far: torch.zeros(3, device=far.device),
    "rows by number": lambda near, far: far[1].copy_(far[0]),
    "mask filled": lambda near, far: far.masked_fill_(far > 0, 0.0),
    "from page-locked memory": lambda near, far: far.copy_(
        torch.empty(4, 4, pin_memory=True), non_blocking=True
    ),
    "into page-locked memory": lambda near, far: torch.empty(4, 4, pin_memory=True).copy_(
        far, non_blocking=True
    ),
    "generator": lambda near, far: torch.rand(
        2, device=far.device, generator=torch.Generator(far.device)
    ),
    "backward": lambda near, far: torch.autograd.grad((far.requires_grad_() ** 2).sum(), far),
}


def pair():
    return torch.ones(4, 4), torch.ones(4, 4, device=accelerator.NAME)


@pytest.mark.parametrize("action", FORBIDDEN)
def test_the_stand_in_refuses(device, action):
    with pytest.raises(RuntimeError):
        FORBIDDEN[action](*pair())


@pytest.mark.parametrize(
    "action, waits", [*((a, True) for a in WAITS), *((a, False) for a in GOES_ON)]
)
def test_the_stand_in_counts(device, action, waits):
    near, far = pair()
    assert not device.waits
    (WAITS if waits else GOES_ON)[action](near, far)
    assert bool(device.waits) == waits, device.waits
