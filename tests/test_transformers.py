"""Artifacts in the library's own format through what transformers does with a model: dtypes,
devices, saving, pushing, generating.
"""

import copy
import io
import shutil
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
from helpers import save_tiny
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

import lowbit
import lowbit.run.quantize
from lowbit.artifact.proof import verify
from lowbit.errors import LowbitError
from lowbit.runtime.linears import CodebookLinear, DecodedLinear, PackedLinear

IDS = torch.randint(3, 280, (2, 16), generator=torch.Generator().manual_seed(1))
TWO_GRIDS = (
    'scheme = "W4A16g32sym"\nmethods = ["rtn"]\n[overrides]\n"*.down_proj" = "W8A16g32sym"\n'
)
PLAIN = {
    "symmetric, plain": ("llama", torch.bfloat16, "W4A16g32sym", "rtn"),
    "two grids, plain": ("llama", torch.bfloat16, None, TWO_GRIDS),
}
UNIFORM_WITH_OUTLIERS = 'scheme = "W3A16g32"\nmethods = ["claq"]\n[claq]\noutlier_bits = 0.3\n'
KINDS = {  # family, dtype of the source, scheme, recipe
    "rotated": ("llama", torch.bfloat16, "W4A4KV4", "quarot"),
    "rotated, float32": ("llama-mha", torch.float32, "W4A4KV4", "quarot"),
    "codebooks": ("llama", torch.bfloat16, "W2A16", "claq-fused"),
    "quantized activations": ("llama", torch.bfloat16, "W4A8g32", "rtn"),
    "outliers": ("qwen2", torch.float16, None, UNIFORM_WITH_OUTLIERS),
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Kind -> folder, made when it is first asked for; that they load is what this file is about,
    so no process is started for it.
    """
    folder, made = tmp_path_factory.mktemp("kinds"), {}

    def get(kind):
        if kind not in made:
            family, dtype, scheme, recipe = (KINDS | PLAIN)[kind]
            model = save_tiny(folder / f"{kind}-model", family, dtype)
            if "=" in recipe:
                (folder / "mine.toml").write_text(recipe)
                recipe = str(folder / "mine.toml")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("lowbit.run.closing.verify", partial(verify, loader=False))
                lowbit.quantize(
                    str(model),
                    scheme,
                    recipe,
                    out=folder / kind,
                    calib=str(model / "text.txt"),
                    samples=8,
                    length=32,
                )
            made[kind] = folder / kind
        return made[kind]

    return get


@pytest.fixture(params=KINDS)
def artifact(request, artifacts):
    return artifacts(request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_loading_decodes_no_weight(artifacts, kind, monkeypatch):
    """Which would take the memory of the whole model, and is not asked for by anybody yet."""
    folder, of_data, plain = artifacts(kind), [], PackedLinear.decoded

    def decoded(linear):
        if linear.weight_shape.device.type != "meta":
            of_data.append(linear.name)
        return plain(linear)

    monkeypatch.setattr(PackedLinear, "decoded", decoded)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert of_data == []
    assert (
        next(m for m in model.modules() if isinstance(m, PackedLinear)).weight.dim() == 2
        and len(of_data) == 1
    )


def tensors(folder):
    """All tensors of all files."""
    out = {}
    for path in folder.glob("*.safetensors"):
        out |= load_file(path)
    return out


def packed(folder):
    return {k: t for k, t in tensors(folder).items() if ".weight_" in k}


def same(one, other):
    return one.keys() == other.keys() and all(
        t.dtype == other[k].dtype and torch.equal(t, other[k]) for k, t in one.items()
    )


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
    assert (
        again.dtype
        == model.dtype
        == (dtype if isinstance(dtype, torch.dtype) else load(artifact, dtype="auto").dtype)
    )
    assert torch.equal(logits(model), logits(again))
    assert same(packed(artifact), packed(tmp_path / "copy"))
    if dtype == "auto":
        assert same(tensors(artifact), tensors(tmp_path / "copy"))


def test_a_cast_model_keeps_its_packed_tensors_and_computes_as_if_loaded_so(artifact, tmp_path):
    model = load(artifact)
    logits(model)  # decoded by now
    model.to(torch.bfloat16)
    loaded = load(artifact, dtype=torch.bfloat16)
    # Transformers casts these, which loading in bfloat16 does not.
    for kind in (
        "inv_freq",
        "original_inv_freq",
    ):
        setattr(model.model.rotary_emb, kind, getattr(loaded.model.rotary_emb, kind))
    assert torch.equal(logits(model), logits(loaded))
    model.to(torch.float16).save_pretrained(tmp_path / "copy")
    assert same(packed(artifact), packed(tmp_path / "copy"))


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
    ],
)
def test_device_maps(artifact, options):
    if "device_map" in options:
        pytest.importorskip("accelerate")
    assert torch.equal(logits(load(artifact, **options)), logits(load(artifact)))


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_blocks_that_wait_on_disk(artifact, tmp_path, offload_buffers):
    pytest.importorskip("accelerate")
    where = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    model = load(
        artifact, device_map=where, offload_folder=tmp_path, offload_buffers=offload_buffers
    )
    assert torch.equal(logits(model), logits(load(artifact)))


def test_tied_heads_stay_tied(artifacts, tmp_path):
    for kind, tied in (("codebooks", True), ("rotated", False)):
        load(artifacts(kind)).save_pretrained(tmp_path / kind)
        model = load(tmp_path / kind)
        assert (
            model.config.tie_word_embeddings
            == tied
            == (model.lm_head.weight is model.model.embed_tokens.weight)
        )
        assert ("lm_head.weight" in tensors(tmp_path / kind)) != tied


def test_a_model_without_head(artifact):
    headless = AutoModel.from_pretrained(artifact, dtype=torch.float32)
    linears = [m for m in headless.modules() if isinstance(m, (DecodedLinear, CodebookLinear))]
    assert len(linears) == 14
    with torch.no_grad():
        assert torch.equal(
            headless(IDS, use_cache=False).last_hidden_state,
            load(artifact).model(IDS, use_cache=False).last_hidden_state,
        )


@pytest.mark.parametrize(
    "head", [AutoModelForSequenceClassification, AutoModelForTokenClassification]
)
@pytest.mark.parametrize("kind", [*KINDS, *PLAIN])
def test_what_was_never_packed_is_not_treated_as_packed(artifacts, kind, head):
    model = load(artifacts(kind))
    logits(model)
    other = head.from_pretrained(artifacts(kind), dtype=torch.float32, pad_token_id=0)
    with torch.no_grad():
        small = other(IDS).logits
        assert (
            type(other.score) is torch.nn.Linear
            and bool(small.isfinite().all())
            and float(small.abs().max()) < 100
        )
        found, expected = (
            m(IDS, use_cache=False).last_hidden_state for m in (other.model, model.model)
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", PLAIN)
def test_compressed_tensors_without_a_head(artifacts, kind):
    model, headless = (
        load(artifacts(kind)),
        AutoModel.from_pretrained(artifacts(kind), dtype=torch.float32),
    )
    logits(model)
    with torch.no_grad():
        assert torch.equal(
            headless(IDS, use_cache=False).last_hidden_state,
            model.model(IDS, use_cache=False).last_hidden_state,
        )


def test_a_class_with_other_names_for_its_blocks_is_refused(artifacts):
    with pytest.raises(
        LowbitError, match="no linear of the artifact has a place in LlamaForQuestionAnswering"
    ):
        AutoModelForQuestionAnswering.from_pretrained(artifacts("codebooks"))


def test_a_missing_tensor_is_named(artifacts, tmp_path):
    shutil.copytree(artifacts("quantized activations"), tmp_path / "copy")
    (path,) = [
        p
        for p in (tmp_path / "copy").glob("*.safetensors")
        if any(k.endswith("1.mlp.up_proj.weight_scale") for k in load_file(p))
    ]
    save_file(
        {k: t for k, t in load_file(path).items() if not k.endswith("up_proj.weight_scale")},
        path,
        metadata={"format": "pt"},
    )
    with pytest.raises(
        LowbitError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight_scale'"
    ):
        load(tmp_path / "copy")


def test_copies_and_pickles_compute_the_same(artifact, tmp_path):
    model, raw = load(artifact), io.BytesIO()
    expected = logits(model)  # decoded by now, which is not pickled
    torch.save(model, raw)
    assert len(raw.getvalue()) < 2.5 * sum(t.nbytes for t in model.state_dict().values()) + 200_000
    raw.seek(0)
    assert torch.equal(logits(torch.load(raw, weights_only=False)), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)


def test_a_pickle_is_read_by_a_process_that_did_not_import_the_library(artifacts, tmp_path):
    torch.save(load(artifacts("rotated")), tmp_path / "m.pt")
    code = (
        f"import torch; m = torch.load({str(tmp_path / 'm.pt')!r}, weights_only=False); "
        "print(type(m.model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "DecodedLinear", done.stderr


def test_a_state_that_is_loaded_counts_also_after_a_forward_pass(artifact):
    one, other = load(artifact), load(artifact)
    changed = one.state_dict()
    for name, t in changed.items():
        if name.endswith(("weight_packed", "weight_codes_2", "weight_outlier_values")):
            changed[name] = t.flip(0)
    before = logits(other)
    other.load_state_dict(changed)
    one.load_state_dict(changed)
    assert torch.equal(logits(other), logits(one)) and not torch.equal(logits(other), before)


def test_dequantized_it_is_a_plain_model_with_the_same_weights(artifact, tmp_path):
    model = load(artifact)
    for module in model.modules():  # what is left when nothing but weights is quantized
        if isinstance(module, PackedLinear):
            module.input_quantizer = module.input_quantizer.exact()
    for block in model.model.layers:
        block.self_attn._forward_pre_hooks.clear()
    expected = logits(model)
    plain = load(artifact)
    plain.dequantize()
    assert not any(isinstance(m, PackedLinear) for m in plain.modules())
    assert torch.allclose(logits(plain), expected, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain")), logits(plain))


def test_linears_are_freed_while_others_are_dequantized(artifact, monkeypatch):
    model, seen, plain = load(artifact), [], PackedLinear.plain
    logits(model)  # decodes what is kept decoded

    def counted(linear, dtype):
        assert sum(ref() is not None for ref in seen) == 0
        seen.append(weakref.ref(linear))
        return plain(linear, dtype)

    monkeypatch.setattr(PackedLinear, "plain", counted)
    model.dequantize()
    assert len(seen) == 14 and not any(ref() for ref in seen)


@pytest.mark.parametrize("safe", [False, True])
def test_adapters_train_and_merge_only_into_a_dequantized_model(artifact, safe):
    peft = pytest.importorskip("peft")
    model = load(artifact)
    before = logits(model)
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    assert torch.equal(logits(tuned), before)
    tuned(IDS, labels=IDS).loss.backward()
    grads = {n: p.grad for n, p in tuned.named_parameters() if p.requires_grad}
    assert len(grads) == 28 and all(
        float(g.abs().sum()) > 0 for n, g in grads.items() if "lora_B" in n
    )
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p -= 0.5 * grads[name]
    adapted = logits(tuned)
    assert not torch.equal(adapted, before)
    with pytest.raises(
        LowbitError, match=r"nothing can be written to it or merged into it.*dequantize"
    ):
        tuned.merge_adapter(safe_merge=safe)
    assert torch.equal(logits(tuned), adapted)
    tuned.dequantize()
    plain = logits(tuned)
    assert torch.allclose(logits(tuned.merge_and_unload(safe_merge=safe)), plain, atol=1e-4)


WRITES = {
    "in place": lambda linear: linear.weight.mul_(2),
    "augmented": lambda linear: linear.weight.data.__iadd__(1),
    "an item": lambda linear: linear.weight.__setitem__(0, 0.0),
    "a view": lambda linear: linear.weight.T[1:].zero_(),
    "out": lambda linear: torch.add(torch.zeros(linear.weight.shape), 1, out=linear.weight),
    "data": lambda linear: setattr(linear.weight, "data", torch.zeros(1)),
    "an option": lambda linear: torch.nn.functional.relu(linear.weight, inplace=True),
    "one of many": lambda linear: torch._foreach_mul_([torch.zeros(1), linear.weight], 2),
    "a parameter": lambda linear: setattr(linear, "weight", torch.nn.Parameter(torch.zeros(1))),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_a_packed_weight_is_refused_not_lost(artifacts, write):
    linear = load(artifacts("rotated")).model.layers[0].mlp.up_proj
    with pytest.raises(LowbitError, match=r"'model\.layers\.0\.mlp\.up_proj' is packed"):
        WRITES[write](linear)
    product = linear.weight @ linear.weight.T  # reading is free, and what is computed is one's own
    assert type(product) is torch.Tensor and type(product.mul_(2)) is torch.Tensor


@pytest.mark.parametrize("kind", ["rotated", "outliers"])
def test_a_weight_that_is_kept_decoded_is_not_decoded_again_to_look_at(
    artifacts, kind, monkeypatch
):
    model, count, plain = load(artifacts(kind)), [], PackedLinear.decoded
    monkeypatch.setattr(
        PackedLinear, "decoded", lambda linear: count.append(linear.name) or plain(linear)
    )
    linear = model.model.layers[0].mlp.up_proj
    before = linear.weight.clone()
    assert len(count) == 1 and linear._made is None  # looking keeps nothing
    expected = logits(model)
    count.clear()
    assert torch.equal(linear.weight, before) and linear.weight.dtype == before.dtype and not count
    for write in WRITES.values():
        with pytest.raises(LowbitError, match="is packed"):
            write(linear)
    linear.weight.float().numpy()[:] = 0
    if linear.weight.dtype != torch.bfloat16:  # which numpy has not
        linear.weight.numpy()[:] = 0
    torch.from_dlpack(linear.weight)[:] = 0
    assert torch.equal(logits(model), expected) and not count


def compiled(model, **options):
    torch._dynamo.reset()
    return logits(torch.compile(model, backend="eager", **options))


def test_compiled_whole_after_a_pass_or_in_parts(artifacts):
    for kind in ("quantized activations", "codebooks"):
        assert torch.equal(compiled(load(artifacts(kind))), logits(load(artifacts(kind))))
    model = load(artifacts("quantized activations"))
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="let one pass before a full graph is compiled"
    ):
        compiled(model, fullgraph=True)
    expected = logits(model)
    assert torch.equal(compiled(model, fullgraph=True), expected)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"):
        compiled(load(artifacts("codebooks")), fullgraph=True)


def test_generation(artifact, tmp_path):
    model = load(artifact)
    model.save_pretrained(tmp_path / "copy")
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        made = [
            m.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)
            for m in (model, load(tmp_path / "copy"))
        ]
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
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(artifact),
        AutoTokenizer.from_pretrained(artifact),
    )
    assert by_name == pipeline("text-generation", model=model, tokenizer=tokenizer)(
        "def add(a", **options
    )
    assert by_name[0]["generated_text"].startswith("def add(a")


# Of huggingface_hub's own client.
@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
def test_pushed_by_transformers_it_is_the_same(server, artifact, tmp_path):
    model = load(artifact, dtype="auto")
    model.push_to_hub("some/tiny")
    copy = server.rebuilt("some/tiny", tmp_path / "copy")
    assert same(tensors(artifact), tensors(copy))
    assert torch.equal(logits(model), logits(load(copy, dtype="auto")))
