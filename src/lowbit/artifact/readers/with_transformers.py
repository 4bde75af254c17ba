"""Logits by transformers: compressed-tensors, the format of lowbit, and GPTQ or AWQ through
GPTQModel, GGUF through the gguf package.
"""

import contextlib
import json
import sys
from pathlib import Path

from exchange import run

_NEEDED = {"gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel", "optimum"), "gguf": ("gguf",)}


def passed(model, rows, last):
    import torch

    return torch.cat(
        [
            model(row[None], use_cache=False, logits_to_keep=last).logits[:, -last:].float()
            for row in rows
        ]
    ).numpy()


def with_transforms(model, transforms, folder):
    """transformers ignores them; vLLM applies the online ones, with matrices from the files."""
    import torch
    from compressed_tensors.transform import TransformConfig, apply_transform_config
    from safetensors import safe_open

    online = TransformConfig.model_validate(transforms)
    for scheme in online.config_groups.values():
        scheme.apply, scheme.precision = [a for a in scheme.apply if a.is_online()], torch.float32
    apply_transform_config(model, online)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    files = json.loads(Path(folder, "model.safetensors.index.json").read_text())["weight_map"]
    stored = {k: f for k, f in files.items() if k.endswith("_input.weight")}
    assert len(stored) == len(online.config_groups)
    for key, file in stored.items():
        with safe_open(Path(folder, file), "pt") as f:
            parameters[key].copy_(f.get_tensor(key))


def class_for(folder):
    """The automatic class that loads a causal model, or a model around one with all its towers."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    inside = config.get_text_config() is not config
    if inside and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return transformers.AutoModelForMultimodalLM
    return transformers.AutoModelForCausalLM


def settled(module, exact):
    """Weights as users get them, arithmetic as in tuning. Called once they are decoded."""
    import torch

    for m in module.modules():
        if getattr(m, "quantization_scheme", None) is not None:
            # Modules share it. Rounding weights again would be in another dtype.
            m.quantization_scheme = m.quantization_scheme.model_copy()
            m.quantization_scheme.weights = None
            if exact:
                m.quantization_scheme.input_activations = None
        if exact and hasattr(m, "input_quantizer"):
            m.input_quantizer = m.input_quantizer.exact()
    torch.nn.Module.float(module)


def transforms_of(folder):
    said = json.loads(Path(folder, "config.json").read_text())["quantization_config"]
    return said.get("transform_config")


def whole(folder, exact):
    """The model in float32."""
    import torch

    model = class_for(folder).from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()
    # Some loaders decode their weights at the first pass.
    model(torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    settled(model, exact)
    transforms = transforms_of(folder)
    if transforms is not None:
        with_transforms(model, transforms, folder)
    return model


def decoded(model):
    """The model with the weights that GPTQModel itself decodes, as plain linears in float32; None
    if a kernel has laid them out anew.
    """
    import torch

    for name in [n for n, m in model.named_modules() if hasattr(m, "dequantize_weight")]:
        module = model.get_submodule(name)
        if getattr(module, "qweight", None) is None or module.qweight.dtype != torch.int32:
            return None
        weight = module.dequantize_weight().T.float()
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
        plain.weight.copy_(weight)
        if module.bias is not None:
            plain.bias.copy_(module.bias)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    return torch.nn.Module.float(model)


def config_of_gguf(folder, file):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, gguf_file=file.name)
    own = AutoConfig.from_pretrained(Path(folder, "proof"))
    # In the file too, but transformers (5.23) does not look for them in all families.
    for key in (
        "head_dim",
        "rope_parameters",
        "layer_types",
        "sliding_window",
        "query_pre_attn_scalar",
        "pad_token_id",
        "num_experts",
        "moe_intermediate_size",
    ):
        if getattr(own, key, None) is not None:
            setattr(config, key, getattr(own, key))
    return config


def of_gguf(folder, rows, last, by_block):
    """Logits of the model as transformers makes it of the file alone, every weight decoded by the
    gguf package, in float32; and of how many blocks one was in memory at a time.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM as Kind

    (file,) = sorted(Path(folder).glob("*.gguf"))
    how = {
        "gguf_file": file.name,
        "config": config_of_gguf(folder, file),
        "dtype": torch.float32,
    }
    if by_block:
        from by_block import CannotStream, streamed
        from by_part import Parts

        parts = Parts(file)
        with contextlib.suppress(CannotStream):
            with parts.nothing():
                model = streamed(Kind, folder, torch.nn.Module.float, parts.of, **how)
            return {"logits": model.logits(rows, last), "blocks": np.array([model.blocks])}
    return {"logits": passed(Kind.from_pretrained(folder, **how).eval(), rows, last)}


def in_narrow(folder, rows, last):
    """GPTQModel's CPU kernels take bfloat16, and not all of them float32."""
    import torch

    model = (
        class_for(folder)
        .from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=False)
        .eval()
    )
    found = {"logits": passed(model, rows, last)}
    plain = decoded(model)
    return found if plain is None else {**found, "decoded": passed(plain, rows, last)}


def in_float32(folder, rows, last, exact, by_block):
    """Logits of rows, and of how many blocks one was in memory at a time."""
    import numpy as np

    if by_block and transforms_of(folder) is None:
        from by_block import CannotStream, streamed

        with contextlib.suppress(CannotStream):
            model = streamed(class_for(folder), folder, lambda module: settled(module, exact))
            return {"logits": model.logits(rows, last), "blocks": np.array([model.blocks])}
    return {"logits": passed(whole(folder, exact), rows, last)}


def read(folder, given, arguments):
    import torch

    (method, proof), last, load = arguments[:2], int(arguments[2]), arguments[3]
    rows = torch.tensor(given["ids"])
    with torch.no_grad():
        if method == "gguf":
            return of_gguf(folder, rows, last, load == "blocks")
        if method in _NEEDED:
            return in_narrow(folder, rows, last)
        if method == "lowbit":
            import lowbit  # noqa: F401
        found = in_float32(folder, rows, last, proof == "exact", load == "blocks")
        assert ("lowbit" in sys.modules) == (method == "lowbit")
        return found


run((*_NEEDED.get(sys.argv[2], ()), "transformers"), read)
