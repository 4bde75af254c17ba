"""What an odd source brings reaches every export or is named: tensors of its own, numbers of its
own width, named chat templates.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import gguf as package
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.artifact.proof import verify
from lowbit.demo import demo_model
from lowbit.export import export

EMBEDDING = "model.embed_tokens.weight"
EXTRA = "model.layers.4.eh_proj.weight"
TEMPLATES = {"default": "D {{ messages }}", "tool_use": "T {{ tools }}"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The embedded model with its embedding in float32 beyond 16 bits, a tensor that its class does
    not know, and named templates.
    """
    folder = tmp_path_factory.mktemp("odd") / "model"
    shutil.copytree(demo_model(), folder)
    held = load_file(folder / "model.safetensors")
    held[EMBEDDING] = held[EMBEDDING].float() * 1.0001
    held[EXTRA] = torch.ones(8, 8, dtype=torch.bfloat16)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "tokenizer_config.json").read_text())
    said["chat_template"] = [{"name": n, "template": t} for n, t in TEMPLATES.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def artifact(source, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowbit.run.closing.verify", partial(verify, loader=False))
        out = tmp_path_factory.mktemp("odd") / "artifact"
        return lowbit.quantize(
            str(source), "W4A16g32sym", "rtn", out=out, samples=8, length=64
        ).folder


def test_gguf_holds_the_numbers_and_the_templates(source, artifact, tmp_path):
    out = tmp_path / "out"
    done = export(artifact, out, "gguf")
    assert done.loader == "passed" or "not run" in done.loader
    (file,) = out.glob("*.gguf")
    reader = package.GGUFReader(file)
    stored = {t.name: t for t in reader.tensors}
    embedding = load_file(source / "model.safetensors")[EMBEDDING]
    assert not torch.equal(embedding, embedding.bfloat16().float())
    assert np.array_equal(
        np.asarray(stored["token_embd.weight"].data).reshape(embedding.shape), embedding.numpy()
    )
    read = {
        k: f.contents() for k, f in reader.fields.items() if k.startswith("tokenizer.chat_template")
    }
    assert read == {
        "tokenizer.chat_template": TEMPLATES["default"],
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": TEMPLATES["tool_use"],
    }
    report = json.loads((out / "report.json").read_text())
    assert (
        EXTRA in report["left_out"]
        and not report["copied"]
        and any("GGUF has no names" in r for r in report["gguf"]["remarks"])
    )
    assert all(
        "part of this format" in report["left_out"][n]
        for n in ("tokenizer.json", "tokenizer_config.json")
    )


@pytest.mark.parametrize("to, kept", [("gptq", True), ("mlx", False)])
def test_tensors_that_no_class_knows_go_where_loaders_take_them(
    source, artifact, tmp_path, to, kept
):
    out = tmp_path / "out"
    export(artifact, out, to)
    held = {k: v for p in out.glob("*.safetensors") for k, v in load_file(p).items()}
    report = json.loads((out / "report.json").read_text())
    assert (
        (EXTRA in held) is kept
        and (EXTRA in report["copied"]) is kept
        and (EXTRA in report["left_out"]) is not kept
    )
    counted = sum(
        t.numel() for n, t in load_file(source / "model.safetensors").items() if kept or n != EXTRA
    )
    assert report["size"]["model_bits_per_weight"] == pytest.approx(
        8 * report["size"]["after"] / counted, rel=1e-5
    )
    assert (
        json.loads((out / "tokenizer_config.json").read_text())["chat_template"][1]["name"]
        == "tool_use"
    )


def test_templates_in_a_folder_go_along(source, tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.run.closing.verify", partial(verify, loader=False))
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R {{ documents }}")
    made = lowbit.quantize(
        str(folder), "W4A16g32sym", "rtn", out=tmp_path / "made", samples=8, length=64
    ).folder
    export(made, tmp_path / "out", "gptq")
    for there in (made, tmp_path / "out"):
        assert (
            Path(there, "additional_chat_templates", "rag.jinja").read_text() == "R {{ documents }}"
        )
