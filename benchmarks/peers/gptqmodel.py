"""GPTQModel's GPTQ on given rows of tokens; run with the interpreter of an environment that has
gptqmodel (measured: 7.6.0).

    GPTQMODEL_CPU_WORKERS=2 python gptqmodel.py MODEL ROWS.json BITS GROUP ACT_ORDER(0|1) SYM(0|1)
    OUT.json

ROWS.json holds {"calibration": [[ids]], "evaluation": [[ids]]}. The settings are those of the
paper, damping 0.01 and no group-aware order, with static groups where ACT_ORDER is 1. The
checkpoint it saves is decoded here, into the float32 model, so that no kernel rounds on the way;
perplexity and KL to the float model are those of the evaluation rows. Writes {"perplexity", "kl",
"seconds", "processor_seconds", "float"}. Both are of tuning alone, imports and evaluation apart.
OMP_NUM_THREADS threads, two without it. With fewer than three cores the package needs
GPTQMODEL_CPU_WORKERS=2.
"""

import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

# This file is named like the package it runs, and its folder comes first on the path.
sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
from gptqmodel import GPTQModel  # noqa: E402
from gptqmodel.quantization import FORMAT, QuantizeConfig  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


@torch.no_grad()
def log_probs(model, rows):
    return torch.cat(
        [
            model(rows[i : i + 8]).logits[:, :-1].float().log_softmax(-1)
            for i in range(0, len(rows), 8)
        ]
    )


def unpack(words, bits):
    """(rows, words) int32 -> (rows, codes): a row is one string of bits, the lowest of a word and
    of a code first.
    """
    flags = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
    return (flags.reshape(len(words), -1, bits) << torch.arange(bits, dtype=torch.int32)).sum(-1)


def decoded(folder, bits):
    """The float32 weight of every quantized linear, by name."""
    tensors = {k: v for f in Path(folder).glob("*.safetensors") for k, v in load_file(f).items()}
    out = {}
    for key in tensors:
        name, _, kind = key.rpartition(".")
        if kind == "qweight":
            group = tensors[f"{name}.g_idx"].long()
            scale, zero = (
                tensors[f"{name}.scales"].float()[group],
                unpack(tensors[f"{name}.qzeros"], bits)[group],
            )
            out[name] = (unpack(tensors[key].T, bits) - zero.T) * scale.T
    return out


def main() -> None:
    model_dir, rows_file, bits, group, act_order, sym, out = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    rows = json.load(open(rows_file))
    evaluation = torch.tensor(rows["evaluation"])
    gold = evaluation[:, 1:, None]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    expected = log_probs(model, evaluation)
    data = [{"input_ids": r, "attention_mask": [1] * len(r)} for r in rows["calibration"]]
    ordered = act_order == "1"
    config = QuantizeConfig(
        bits=int(bits),
        group_size=int(group),
        sym=sym == "1",
        desc_act=ordered,
        static_groups=ordered,
        act_group_aware=False,
        damp_percent=0.01,
        format=FORMAT.GPTQ_V2,
    )
    job = GPTQModel.load(model_dir, config, device="cpu", dtype=torch.float32)
    out = Path(out).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the package leaves logs where it runs
        start, spent = time.time(), time.process_time()
        job.quantize(data, batch_size=8)
        seconds, spent = time.time() - start, time.process_time() - spent
        job.save("saved")
        weights = decoded("saved", int(bits))
        os.chdir(out.parent)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data.copy_(weight)
    found = log_probs(model, evaluation)
    result = {
        "perplexity": math.exp(-found.gather(-1, gold).mean().item()),
        "kl": (expected.exp() * (expected - found)).sum(-1).mean().item(),
        "float": math.exp(-expected.gather(-1, gold).mean().item()),
        "seconds": seconds,
        "processor_seconds": spent,
        "linears": len(weights),
    }
    json.dump(result, open(out, "w"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
