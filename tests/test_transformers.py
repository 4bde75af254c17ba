"""Artifacts in the library's own format through what transformers does with a model: dtypes, devices, saving, pushing, generating."""

from functools import partial

import pytest
import torch
from helpers import save_tiny
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

import lowbit
import lowbit.job
from lowbit.linears import CodebookLinear, DecodedLinear
from lowbit.proof import verify

IDS = torch.randint(3, 280, (2, 16), generator=torch.Generator().manual_seed(1))
UNIFORM_WITH_OUTLIERS = 'scheme = "W3A16g32"\nmethods = ["claq"]\n[claq]\noutlier_bits = 0.3\n'
KINDS = {  # family, dtype of the source, scheme, recipe
    "rotated": ("llama", torch.bfloat16, "W4A4KV4", "quarot"),
    "rotated, float32": ("llama-mha", torch.float32, "W4A4KV4", "quarot"),
    "codebooks": ("llama", torch.bfloat16, "W2A16", "claq-fused"),
    "outliers": ("qwen2", torch.float16, None, UNIFORM_WITH_OUTLIERS),
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Kind -> folder, made when it is first asked for; that they load is what this file is about, so no process is started for it."""
    folder, made = tmp_path_factory.mktemp("kinds"), {}

    def get(kind):
        if kind not in made:
            family, dtype, scheme, recipe = KINDS[kind]
            model = save_tiny(folder / f"{kind}-model", family, dtype)
            if "=" in recipe:
                (folder / "mine.toml").write_text(recipe)
                recipe = str(folder / "mine.toml")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(lowbit.job, "verify", partial(verify, loader=False))
                lowbit.quantize(str(model), scheme, recipe, out=folder / kind, calib=str(model / "text.txt"), samples=8, length=32)
            made[kind] = folder / kind
        return made[kind]

    return get


@pytest.fixture(params=KINDS)
def artifact(request, artifacts):
    return artifacts(request.param)


def tensors(folder):
    """All tensors of all files."""
    out = {}
    for path in folder.glob("*.safetensors"):
        out |= load_file(path)
    return out


def packed(folder):
    return {k: t for k, t in tensors(folder).items() if ".weight_" in k}


def same(one, other):
    return one.keys() == other.keys() and all(t.dtype == other[k].dtype and torch.equal(t, other[k]) for k, t in one.items())


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids, use_cache=False).logits


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


@pytest.mark.parametrize("dtype", ["auto", None, torch.float32, torch.bfloat16, torch.float16])
def test_saved_and_loaded_again_it_is_the_same_in_every_dtype(artifact, tmp_path, dtype):
    model = load(artifact, dtype=dtype)
    model.save_pretrained(tmp_path / "copy", max_shard_size="40KB")
    again = load(tmp_path / "copy", dtype=dtype)
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    assert again.dtype == model.dtype == (dtype if isinstance(dtype, torch.dtype) else load(artifact, dtype="auto").dtype)
    assert torch.equal(logits(model), logits(again))
    assert same(packed(artifact), packed(tmp_path / "copy"))
    if dtype == "auto":
        assert same(tensors(artifact), tensors(tmp_path / "copy"))


def test_a_cast_model_keeps_its_packed_tensors_and_computes_as_if_loaded_so(artifact, tmp_path):
    model = load(artifact)
    logits(model)  # decoded by now
    model.to(torch.bfloat16)
    loaded = load(artifact, dtype=torch.bfloat16)
    for kind in ("inv_freq", "original_inv_freq"):  # transformers casts these, which loading in bfloat16 does not
        setattr(model.model.rotary_emb, kind, getattr(loaded.model.rotary_emb, kind))
    assert torch.equal(logits(model), logits(loaded))
    model.to(torch.float16).save_pretrained(tmp_path / "copy")
    assert same(packed(artifact), packed(tmp_path / "copy"))


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}])
def test_device_maps(artifact, options):
    if "device_map" in options:
        pytest.importorskip("accelerate")
    assert torch.equal(logits(load(artifact, **options)), logits(load(artifact)))


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_blocks_that_wait_on_disk(artifact, tmp_path, offload_buffers):
    pytest.importorskip("accelerate")
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = load(artifact, device_map=where, offload_folder=tmp_path, offload_buffers=offload_buffers)
    assert torch.equal(logits(model), logits(load(artifact)))


def test_tied_heads_stay_tied(artifacts, tmp_path):
    for kind, tied in (("codebooks", True), ("rotated", False)):
        load(artifacts(kind)).save_pretrained(tmp_path / kind)
        model = load(tmp_path / kind)
        assert model.config.tie_word_embeddings == tied == (model.lm_head.weight is model.model.embed_tokens.weight)
        assert ("lm_head.weight" in tensors(tmp_path / kind)) != tied


def test_a_model_without_head(artifact):
    headless = AutoModel.from_pretrained(artifact, dtype=torch.float32)
    linears = [m for m in headless.modules() if isinstance(m, (DecodedLinear, CodebookLinear))]
    assert len(linears) == 14
    with torch.no_grad():
        assert torch.equal(headless(IDS, use_cache=False).last_hidden_state, load(artifact).model(IDS, use_cache=False).last_hidden_state)


def test_generation(artifact, tmp_path):
    model = load(artifact)
    model.save_pretrained(tmp_path / "copy")
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        made = [m.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, **options) for m in (model, load(tmp_path / "copy"))]
        assert torch.equal(*made) and made[0].shape == (2, 22)


def test_padding_on_the_left_changes_nothing(artifacts):
    model, short = load(artifacts("codebooks")), IDS[:1, 6:]
    batch = torch.cat([torch.cat([torch.zeros(1, 6, dtype=torch.int64), short], 1), IDS[1:]])
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    padded = model.generate(batch, attention_mask=(batch != 0).long(), **options)
    assert torch.equal(padded[0, 16:], model.generate(short, **options)[0, 10:])


def test_the_pipeline(artifact):
    options = dict(max_new_tokens=6, do_sample=False)
    by_name = pipeline("text-generation", model=str(artifact))("def add(a", **options)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(artifact), AutoTokenizer.from_pretrained(artifact)
    assert by_name == pipeline("text-generation", model=model, tokenizer=tokenizer)("def add(a", **options)
    assert by_name[0]["generated_text"].startswith("def add(a")


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of huggingface_hub's own client
def test_pushed_by_transformers_it_is_the_same(server, artifact, tmp_path):
    model = load(artifact, dtype="auto")
    model.push_to_hub("some/tiny")
    copy = server.rebuilt("some/tiny", tmp_path / "copy")
    assert same(tensors(artifact), tensors(copy))
    assert torch.equal(logits(model), logits(load(copy, dtype="auto")))
