"""Logits by transformers: compressed-tensors, the format of lowbit, and GPTQ or AWQ through GPTQModel, GGUF through the gguf package."""

import importlib.util
import json
import sys
from pathlib import Path

folder, ids, out, method, proof = sys.argv[1:]
exact = proof == "exact"
needed = {"gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel", "optimum"), "gguf": ("gguf",)}.get(method, ())
missing = [p for p in (*needed, "transformers") if importlib.util.find_spec(p) is None]
if missing:
    print(", ".join(missing))
    sys.exit(3)

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

if method == "lowbit":
    import lowbit  # noqa: F401
rows = load_file(ids)["ids"]


def passed(model):
    return torch.cat([model(row[None], use_cache=False).logits.float() for row in rows]).contiguous()


def with_transforms(model, transforms):
    """transformers ignores them; vLLM applies the online ones, with matrices from the files."""
    from compressed_tensors.transform import TransformConfig, apply_transform_config

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


def in_float32(model):
    model(torch.zeros(1, 2, dtype=torch.int64), use_cache=False)  # some loaders decode their weights at the first pass
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.quantization_scheme.weights = None  # decoded by now; rounding them again would be in another dtype
            if exact:
                module.quantization_scheme.input_activations = None
        if exact and hasattr(module, "reading"):
            module.reading = module.reading.exact()
    torch.nn.Module.float(model)  # weights as users get them, arithmetic as in tuning
    transforms = json.loads(Path(folder, "config.json").read_text())["quantization_config"].get("transform_config")
    if transforms is not None:
        with_transforms(model, transforms)
    return model


def decoded(model):
    """The model with the weights that GPTQModel itself decodes, as plain linears in float32; None if a kernel has laid them out anew."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "dequantize_weight"):
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


def of_gguf():
    """The model as transformers makes it of the file alone, every weight decoded by the gguf package, in float32."""
    (file,) = sorted(Path(folder).glob("*.gguf"))
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()


with torch.no_grad():
    if method == "gguf":
        save_file({"logits": passed(of_gguf())}, out)
        sys.exit(0)
    # GPTQModel's CPU kernels take bfloat16, and not all of them float32.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if needed else "auto", trust_remote_code=False).eval()
    assert ("lowbit" in sys.modules) == (method == "lowbit")
    found = {"logits": passed(model if needed else in_float32(model))}
    if needed:
        plain = decoded(model)
        if plain is not None:
            found["decoded"] = passed(plain)
save_file(found, out)
