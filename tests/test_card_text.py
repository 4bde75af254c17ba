"""The text of a model card from reports that are written out here: each fact once, in the words and
numbers of the report.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
from typing import Any

import pytest

from lowbit.artifact.card import model_card

REPORT: dict[str, Any] = {
    "lowbit": "9.9",
    "versions": {"python": "3.11", "torch": "2.1", "transformers": "5.1", "compressed-tensors": "0.18"},
    "model": "/home/me/tiny_model",
    "source": {"hub": None, "license": {}},
    "command": ["lowbit", "quantize", "/home/me/tiny_model", "--recipe", "awq", "-o", "OUT"],
    "recipe": {"name": "awq", "scheme": "W4A16g32", "methods": ["awq", "rtn"]},
    "format": "compressed-tensors",
    "calibration": {"source": "/data/my text.txt", "samples": 8, "length": 64, "sha256": "c" * 64},
    "seed": 7,
    "device": "cuda:0",
    "compute": "torch.bfloat16",
    "hash": "f" * 64,
    "size": {"before": 2.5e9, "after": 7.5e8, "bits_per_weight": 4.625, "model_bits_per_weight": 5.5},
    "quality": {
        "text": "/data/my text.txt (held out)",
        "float": {"perplexity": 10.123456},
        "quantized": {"perplexity": 11.5, "kl": 0.0123456, "top1": 0.9123, "windows": 16, "length": 64},
    },
    "linears": [
        {"name": "a.q_proj", "scheme": "W4A16g32"},
        {"name": "a.o_proj", "scheme": "W4A16g32"},
        {"name": "a.lm_head", "skipped": "the head"},
    ],
}  # fmt: skip


def card(**more: Any) -> str:
    """The card of the report with some of its keys replaced; "a__b" is key b of the table a."""
    report = copy.deepcopy(REPORT)
    for key, value in more.items():
        *tables, last = key.split("__")
        held = report
        for name in tables:
            held = held[name]
        held[last] = value
    return model_card(report)


LINEARS = [{"name": "a", "scheme": "W4A16g32"}]


def linears(*schemes: str, **more: Any) -> list[dict[str, Any]]:
    return [{"name": f"l{i}", "scheme": s, **more} for i, s in enumerate(schemes)]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({}, "# tiny_model W4A16g32"),
        ({"format": "gptq"}, "# tiny_model W4A16g32, gptq"),
        ({"model": "."}, "# model W4A16g32"),
        ({"model": "a/_x_*y*"}, r"# \_x\_\*y\* W4A16g32"),
        ({"source__hub": "o/n"}, "# n W4A16g32"),
        ({}, "| size | 2.50 GB -> 750.00 MB |"),
        ({"size__before": 1e9}, "| size | 1.00 GB -> 750.00 MB |"),
        ({"size__before": 999_999_999}, "| size | 1000.00 MB -> 750.00 MB |"),
        ({}, "| bits per parameter | 5.500, over the whole model |"),
        ({}, "| my text.txt (held out), 16 windows of 64 tokens | float | quantized |"),
        ({}, "| perplexity | 10.12 | 11.5 |"),
        ({}, "| mean KL to the float model, nats a token |  | 0.01235 |"),
        ({}, "| same most likely next token as the float model |  | 91.2% |"),
        ({}, "| recipe | `awq` (methods: awq, rtn); all settings in `recipe.toml` |"),
        ({"recipe__methods": []}, "| recipe | `awq` (methods: none); all settings in `recipe.toml` |"),
        ({"recipe__name": "a`b|c"}, "| recipe | ``a`b\\|c`` (methods: awq, rtn); all settings in `recipe.toml` |"),
        ({}, "| calibration | my text.txt, 8 rows of 64 tokens, sha256 `cccccccccccccccc` |"),
        ({"calibration__source": "c4"}, "| calibration | c4, 8 rows of 64 tokens, sha256 `cccccccccccccccc` |"),
        (
            {"calibration__conversations": 3},
            "| calibration | my text.txt, 8 rows of 64 tokens, sha256 `cccccccccccccccc`, 3 conversations "
            "written by the model's chat template |",
        ),
        ({}, "| seed | 7 |"),
        ({}, "| computed | on cuda:0, in bfloat16 |"),
        ({}, "| versions | lowbit 9.9, python 3.11, torch 2.1, transformers 5.1, compressed-tensors 0.18 |"),
        ({}, "| linears | 2 in `W4A16g32`; kept in floating point: `a.lm_head` (the head) |"),
        ({"linears": linears("W4A16", "W2A16", "W4A16")}, "| linears | 2 in `W4A16`, 1 in `W2A16` |"),
        (
            {"linears": linears("W2A16", "W2A16", outliers=5)},
            "| linears | 2 in `W2A16`, 10 weights kept in 16 bits |",
        ),
        (
            {"linears": linears("W2A16", "W2A16", columns={"2": 6, "4": 2})},
            "| linears | 2 in `W2A16`, columns by their bits: 12 of 2, 4 of 4 |",
        ),
        ({"linears": linears("W2A16", columns={"2": 6})}, "| linears | 1 in `W2A16` |"),
        ({}, "lowbit quantize tiny_model --recipe awq -o OUT"),
        ({"source__hub": "o/n"}, "lowbit quantize o/n --recipe awq -o OUT"),
        ({}, "Of paths only the last part is shown: `tiny_model`."),
        ({"format": "gptq", "exported_from": "abc"}, "lowbit export OUT -o DIR --to gptq"),
        (
            {},
            "`tiny_model` with the weights of its linear layers in 4 bits, as integers: quantized with lowbit "
            "9.9, format `compressed-tensors`.",
        ),
        (
            {"source__hub": "o/n", "recipe__scheme": "W4A8KV4", "linears": linears("W4A16", "W2A16")},
            "[o/n](https://huggingface.co/o/n) with the weights of its linear layers in 2, 4 bits, as integers, "
            "activations in 8 bits, keys and values in 4 bits: quantized with lowbit 9.9, format "
            "`compressed-tensors`.",
        ),
        (
            {"recipe__codebook": "column", "format": "lowbit"},
            "`tiny_model` with the weights of its linear layers in 4 bits, on a codebook per column: quantized "
            "with lowbit 9.9, format `lowbit`.",
        ),
    ],
)  # fmt: skip
def test_a_card_says(more: dict[str, Any], line: str) -> None:
    assert line in card(**more).splitlines()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"quality": None}, ["perplexity", "KL"]),
        ({"source__hub": "o/n"}, ["/home/me", "Of paths only"]),
        ({}, ["/home/me", "/data", "base_model", "Verified after writing", "Exported from"]),
        ({"format": "gguf", "gguf": {"file": "m.gguf"}}, ["### transformers", "### vLLM"]),
        ({"linears": linears("W4A16", "W8A16")}, ["### vLLM"]),
        ({"linears": linears("W1A16")}, ["### vLLM"]),
        ({"linears": linears("W4A16g48")}, ["### vLLM"]),
        ({"linears": linears("W8A16sym"), "recipe__scheme": "W8A4sym"}, ["### vLLM"]),
        ({"format": "mlx"}, ["### transformers", "### vLLM", "### GPTQModel"]),
        ({"format": "lowbit"}, ["### vLLM", "### llama.cpp"]),
        ({"format": "awq", "linears": linears("W4A16g16")}, ["### vLLM", "### GPTQModel"]),
        ({"format": "gptq", "linears": linears("W3A16g32")}, ["### vLLM"]),
        ({"format": "gptq_v2"}, ["### vLLM"]),
    ],
)
def test_a_card_does_not_say(more: dict[str, Any], words: list[str]) -> None:
    assert [w for w in words if w in card(**more)] == []


@pytest.mark.parametrize(
    ("schemes", "said"),
    [
        (["W4A16g32"], "By its sources, any recent version; not run."),
        (["W8A16sym"], "By its sources, any recent version; not run."),
        (["W2A16g64sym"], "0.25 or newer for symmetric weights of 2 bits, on NVIDIA GPUs"),
        (["W2A16g64"], "0.33 or newer for asymmetric weights of 2 bits, on NVIDIA GPUs"),
        (["W3A16g8sym"], "0.33 or newer for symmetric weights of 3 bits, on NVIDIA GPUs"),
    ],
)
def test_what_vllm_needs(schemes: list[str], said: str) -> None:
    assert said in card(linears=linears(*schemes))


@pytest.mark.parametrize(
    ("bits", "oldest"), [(2, "0.15"), (3, "0.17"), (4, "0.15"), (5, "0.17"), (6, "0.17"), (7, "0.17"), (8, "0.15")]
)  # fmt: skip
def test_what_transformers_needs(bits: int, oldest: str) -> None:
    """Codes that cross words were packed otherwise before compressed-tensors 0.17."""
    text = card(linears=linears(f"W{bits}A16g32"))
    assert f"by compressed-tensors {oldest} or newer. Tried with transformers 5.1" in text


@pytest.mark.parametrize(
    ("more", "end"),
    [
        ({}, "on which perplexity and KL were measured."),
        ({"extra": [0.0, 0.0]}, " Its codes and decoded weights are equal to that one's."),
        (
            {"extra": [0.1, 0.3]},
            " The format's rounding adds a mean square error of 0.2 (worst linear: 0.3) times scale^2 / 12, "
            "which rounding to the grid costs.",
        ),
        (
            {"extra": [0.0, None], "gguf": {"file": "m", "moved": 0.0123, "remarks": ["the head is Q8_0"]}},
            " The head is Q8_0. The format's rounding adds a mean square error of 0 (worst linear: 0) times "
            "scale^2 / 12, which rounding to the grid costs. It moves the logits by 0.012 of their spread.",
        ),
    ],
)  # fmt: skip
def test_what_an_export_adds(more: dict[str, Any], end: str) -> None:
    extra = more.pop("extra", [])
    own = [{**e, "extra_error": x} for e, x in zip(LINEARS * len(extra), extra, strict=True)]
    text = card(exported_from="abcd", format="gptq", linears=own or LINEARS, **more)
    (line,) = (x for x in text.splitlines() if x.startswith("Exported from the artifact"))
    assert "hash `abcd`" in line and line.endswith(end)


@pytest.mark.parametrize(
    ("more", "front"),
    [
        ({}, ["library_name: transformers", "- quantized", "- lowbit", "- 4-bit", "- compressed-tensors", "- awq", "- rtn"]),
        ({"recipe__methods": []}, ["- rtn"]),
        ({"format": "lowbit"}, ["library_name: lowbit"]),
        ({"format": "mlx"}, ["library_name: mlx"]),
        ({"format": "gguf", "gguf": {"file": "m.gguf"}}, ["library_name: gguf"]),
        ({"exported_from": "a"}, ["library_name: vllm"]),
        ({"linears": linears("W4A16", "W2A16")}, ["- 2-bit", "- 4-bit"]),
        ({"source__hub": "o/n"}, ["base_model: o/n", "base_model_relation: quantized"]),
        ({"source__license": {"license": "mit"}}, ["license: mit"]),
        ({"source__license": {"license": ["a", "b: c"]}}, ["license:", "- a", '- "b: c"']),
        (
            {"source": {"hub": "o/n", "license": {"license_link": "./LICENSE"}}},
            ['license_link: "https://huggingface.co/o/n/blob/main/LICENSE"'],
        ),
        (
            {"source": {"hub": "o/n", "license": {"license_link": "https://x.org/l"}}},
            ['license_link: "https://x.org/l"'],
        ),
    ],
)  # fmt: skip
def test_the_front_matter(more: dict[str, Any], front: list[str]) -> None:
    lines = card(**more).split("---\n")[1].splitlines()
    assert [x for x in front if x not in lines] == []
    assert len([x for x in lines if x.startswith("- ")]) == len(
        {x for x in lines if x.startswith("- ")}
    )


def test_a_link_into_a_repository_that_nobody_knows_is_left_out() -> None:
    text = card(source={"hub": None, "license": {"license": "other", "license_link": "LICENSE"}})
    assert "license_link" not in text and "license: other" in text


@pytest.mark.parametrize("file", ["m.gguf", "a b's.gguf", 'q".gguf', "$x.gguf"])
def test_the_name_of_a_file_survives_shell_and_python(file: str) -> None:
    text = card(format="gguf", gguf={"file": file, "moved": None})
    (line,) = re.findall(r"^llama-cli .*$", text, re.M)
    assert shlex.split(line) == ["llama-cli", "-m", file, "-p", "Once"]
    (call,) = re.findall(r"^model = Llama\((.*)\)$", text, re.M)
    assert json.loads(call) == file


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({}, "Verified after writing: 3 tensors and 2 linears as tuned; loader check passed."),
        (
            {"proof": "activations not quantized"},
            "Verified after writing, without quantizing activations: 3 tensors and 2 linears as tuned; loader "
            "check passed.",
        ),
    ],
)  # fmt: skip
def test_the_proof_is_said(more: dict[str, Any], line: str) -> None:
    found = {"tensors": 3, "linears": 2, "loader": "passed"}
    assert line in card(verification=found, **more).splitlines()


def test_a_table_keeps_its_columns_whatever_is_in_it() -> None:
    text = card(
        recipe__name="a|b\nc",
        calibration__source="x|y\nz",
        linears=[{"name": "p|q", "skipped": "r|s"}, *LINEARS],
    )
    rows = [x for x in text.splitlines() if x.startswith("| ")]
    assert rows and all(len(re.findall(r"(?<!\\)\|", r)) in (3, 4) for r in rows)
