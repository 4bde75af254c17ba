"""Accuracy on tasks: lm-eval's prompts from local files, scores equal to sums written out by hand,
and errors that say what to do.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EVALUATED, save_tiny, tiny_tokenizer
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.evaluate import load_causal_lm
from lowbit.evaluate.tasks.data import FORMS, read_task

Row = dict[str, Any]


def choice(context: str, choices: list[str], gold: int, **more: object) -> Row:
    return {"contexts": [context] * len(choices), "choices": choices, "gold": gold, **more}


ROWS: dict[str, list[Row]] = {
    "piqa": [
        choice(
            f"Question: item {i} of {'list' * (i % 3)}\n",
            [f" {w}" for w in words.split(",")],
            i % 2,
        )
        for i, words in enumerate(
            [
                "add a,self.b",
                "return,append",
                "items,pushed,é é",
                "def add,class",
                "push it,Stack",
                "one,four,éa",
                "bb aa,aabbcc",
            ]
        )
    ],
    "winogrande": [
        {
            "contexts": [f"def {a}({i}) return {a}", f"def {a}({i}) return {b}"],
            "choices": [f" + {i} push  "] * 2,
            "gold": i % 2,
        }
        for i, (a, b) in enumerate(
            [("self", "item"), ("a", "b"), ("Stack", "items"), ("push", "add"), ("class", "def")]
        )
    ],
    "lambada_openai": [
        {"contexts": [f"class Stack {i}: def"], "choices": [w], "gold": 0}
        for i, w in enumerate([" push", " add", " self", " a"])
    ],
    "mmlu": [
        choice(
            f"{i} plus 1 is\nA. {i}\nB. {i + 1}\nC. {i + 2}\nD. {i + 3}\nAnswer:",
            [" A", " B", " C", " D"],
            i % 4,
            subject=s,
        )
        for s, n in (("zoo_logic", 5), ("art", 3))
        for i in range(n)
    ],
}


def write(folder: Path, name: str, rows: list[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tasks") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        write(path, f"{name}_small.jsonl" if name == "mmlu" else f"{name}.jsonl", rows)
    return path


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def scored(model: Path, folder: Path, tmp_path: Path, tasks: str, *args: object) -> Any:
    result = run(
        "eval", model, "--tasks", tasks, "--task-data", folder, "--json", tmp_path / "e.json", *args
    )
    assert result.exit_code == 0, result.output
    return json.loads((tmp_path / "e.json").read_text())["tasks"]


def refused(*args: object) -> str:
    result = run("eval", *args)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def need_lm_eval() -> None:
    pytest.importorskip("lm_eval.models.huggingface", reason="needs pip install 'lowbit[eval]'")


# --- scores, by hand ------------------------------------------------------------------------------


def log_likelihood(model: Any, context: str, continuation: str) -> tuple[float, bool]:
    """(sum of log-probabilities of the tokens after the context, whether each of them is the
    likeliest), one text at a time.
    """
    tokenizer = tiny_tokenizer()
    ids, start = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    at = range(start, len(ids))
    return sum(float(log_p[t - 1, ids[t]]) for t in at), all(
        int(log_p[t - 1].argmax()) == ids[t] for t in at
    )


def stderr(hits: list[float]) -> float:
    mean = sum(hits) / len(hits)
    return math.sqrt(sum((h - mean) ** 2 for h in hits) / (len(hits) - 1) / len(hits))


def best(scores: list[float]) -> int:
    return scores.index(max(scores))


def test_choices_are_scored_as_by_hand(model: Path, folder: Path, tmp_path: Path) -> None:
    need_lm_eval()
    loaded = load_causal_lm(str(model), "cpu")
    acc, norm = [], []
    for row in ROWS["piqa"]:
        sums = [
            log_likelihood(loaded, row["contexts"][0] + "Answer:", c)[0] for c in row["choices"]
        ]
        acc.append(float(best(sums) == row["gold"]))
        norm.append(
            float(
                best([s / len(c[1:]) for s, c in zip(sums, row["choices"], strict=True)])
                == row["gold"]
            )
        )
    assert acc != norm and 0 < sum(acc) < len(acc)  # or the two could be mixed up
    found = scored(model, folder, tmp_path, "piqa")
    digest = hashlib.sha256((folder / "piqa.jsonl").read_bytes()).hexdigest()
    assert found["each"]["piqa"] == {
        "acc": pytest.approx(sum(acc) / 7),
        "acc_stderr": pytest.approx(stderr(acc)),
        "acc_norm": pytest.approx(sum(norm) / 7),
        "acc_norm_stderr": pytest.approx(stderr(norm)),
        "examples": 7,
        "shots": 0,
        "cut": 0,
        "source": {"data": "piqa.jsonl", "sha256": digest},
    }


def test_endings_and_words_are_scored_as_by_hand(model: Path, folder: Path, tmp_path: Path) -> None:
    need_lm_eval()
    loaded = load_causal_lm(str(model), "cpu")
    hits = [
        float(
            best(
                [
                    log_likelihood(loaded, c, " " + row["choices"][0].strip())[0]
                    for c in row["contexts"]
                ]
            )
            == row["gold"]
        )
        for row in ROWS["winogrande"]
    ]
    words = [
        log_likelihood(loaded, row["contexts"][0], row["choices"][0])
        for row in ROWS["lambada_openai"]
    ]
    found = scored(model, folder, tmp_path, "winogrande,lambada_openai")
    assert found["each"]["winogrande"]["acc"] == pytest.approx(sum(hits) / 5)
    assert "acc_norm" not in found["each"]["winogrande"]
    last = found["each"]["lambada_openai"]
    assert last["acc"] == sum(g for _, g in words) / 4
    perplexity = math.exp(-sum(s for s, _ in words) / 4)
    assert last["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert last["perplexity_stderr"] == pytest.approx(
        perplexity * stderr([s for s, _ in words]), rel=1e-4
    )
    assert found["averaged"] == ["winogrande", "lambada_openai"]
    assert found["mean_acc"] == pytest.approx((sum(hits) / 5 + last["acc"]) / 2)


def test_a_word_is_counted_if_it_is_the_greedy_one(model: Path, tmp_path: Path) -> None:
    need_lm_eval()
    loaded, tokenizer = load_causal_lm(str(model), "cpu"), tiny_tokenizer()
    rows: list[Row] = []
    for i in range(40):
        context = f"item {i} of"
        with torch.no_grad():
            likeliest = tokenizer.decode(
                [int(loaded(torch.tensor([tokenizer.encode(context)])).logits[0, -1].argmax())]
            )
        if (
            likeliest.isascii()
            and likeliest.strip()
            and log_likelihood(loaded, context, likeliest)[1]
        ):
            rows.append({"contexts": [context], "choices": [likeliest], "gold": 0})
    assert rows
    rows.append({"contexts": ["item"], "choices": [" zzz"], "gold": 0})
    write(tmp_path, "lambada_standard.jsonl", rows)
    assert scored(model, tmp_path, tmp_path, "lambada_standard")["each"]["lambada_standard"][
        "acc"
    ] == pytest.approx((len(rows) - 1) / len(rows))


def test_subjects_are_averaged_by_size(model: Path, folder: Path, tmp_path: Path) -> None:
    need_lm_eval()
    loaded = load_causal_lm(str(model), "cpu")
    about = "The following are multiple choice questions (with answers) about {}.\n\n"
    hits: dict[str, list[float]] = {}
    for row in ROWS["mmlu"]:
        context = about.format(row["subject"].replace("_", " ")) + row["contexts"][0]
        sums = [log_likelihood(loaded, context, c)[0] for c in row["choices"]]
        hits.setdefault(row["subject"], []).append(float(best(sums) == row["gold"]))
    found = scored(model, folder, tmp_path, "mmlu")["each"]["mmlu"]
    assert {k: (p["acc"], p["examples"]) for k, p in found["parts"].items()} == {
        f"mmlu_{s}": (pytest.approx(sum(h) / len(h)), len(h)) for s, h in hits.items()
    }
    flat = [h for part in hits.values() for h in part]
    assert found["acc"] == pytest.approx(sum(flat) / 8) and found["examples"] == 8
    from lm_eval.api.metrics import pooled_sample_stderr

    assert found["acc_stderr"] == pytest.approx(
        float(
            pooled_sample_stderr(
                [stderr(h) for h in hits.values()], [len(h) for h in hits.values()]
            )
        )
    )
    assert found["source"]["data"] == "mmlu_small.jsonl"


def test_the_batch_changes_nothing(model: Path, folder: Path, tmp_path: Path) -> None:
    need_lm_eval()
    one, eight = (
        scored(model, folder, tmp_path, ",".join(ROWS), "--batch", n, "--shots", 1) for n in (1, 8)
    )
    for found in (one, eight):
        last = found["each"]["lambada_openai"]
        found["perplexity"] = [
            pytest.approx(last.pop(k), rel=1e-5) for k in ("perplexity", "perplexity_stderr")
        ]
    one["perplexity"] = [a.expected for a in one["perplexity"]]
    assert one == eight


def test_text_and_tasks_go_together_or_alone(model: Path, folder: Path, tmp_path: Path) -> None:
    need_lm_eval()
    alone = scored(model, folder, tmp_path, "piqa,piqa", "--limit", 3)
    assert list(json.loads((tmp_path / "e.json").read_text())) == ["tasks"]
    assert alone["each"]["piqa"]["examples"] == 3 and alone["limit"] == 3
    both = scored(
        model,
        folder,
        tmp_path,
        "piqa",
        "--limit",
        3,
        "--text",
        model / "text.txt",
        "--length",
        32,
        "--windows",
        4,
    )
    assert both == alone
    data = json.loads((tmp_path / "e.json").read_text())
    assert list(data) == [*EVALUATED, "dtype", "bytes", "tasks"]
    assert data["windows"] == 4


def test_the_table_says_what_was_measured(model: Path, folder: Path) -> None:
    need_lm_eval()
    said = run("eval", model, "--tasks", "piqa,mmlu", "--task-data", folder, "--limit", 2).output
    assert "piqa: piqa.jsonl, sha256" in said and "mmlu: mmlu_small.jsonl, sha256" in said
    assert "over piqa, mmlu" in said and "only the first 2 examples" in said
    assert "Running loglikelihood" not in said and "it/s" not in said


def test_an_artifact_is_asked_like_any_model(model: Path, folder: Path, tmp_path: Path) -> None:
    need_lm_eval()
    out = tmp_path / "w8"
    made = run(
        "quantize",
        model,
        "-o",
        out,
        "--scheme",
        "W8A16g32",
        "--recipe",
        "rtn",
        "--calib",
        model / "text.txt",
        "--samples",
        4,
        "--length",
        32,
    )
    assert made.exit_code == 0, made.output
    found, plain = (
        scored(m, folder, tmp_path, "lambada_openai")["each"]["lambada_openai"]
        for m in (out, model)
    )
    assert found["perplexity"] == pytest.approx(plain["perplexity"], rel=0.2)
    assert found["perplexity"] != plain["perplexity"]


# --- prompts --------------------------------------------------------------------------------------


def prompts(folder: Path, model: Path, name: str, shots: int) -> list[tuple[str, str]]:
    from lowbit.evaluate.tasks import evaluate_tasks, prepare

    prepared = prepare([name], shots=shots, folder=folder)
    evaluate_tasks(prepared, load_causal_lm(str(model), "cpu"), tiny_tokenizer())
    return [i.args for task in prepared[0].leaves for i in task.instances]


def test_shots_go_before_the_prompt_and_never_show_the_question_itself(
    model: Path, folder: Path
) -> None:
    need_lm_eval()
    none, two = (prompts(folder, model, "piqa", n) for n in (0, 2))
    assert len(none) == len(two) == sum(len(r["choices"]) for r in ROWS["piqa"])
    for (bare, answer), (shown, same) in zip(none, two, strict=True):
        assert shown.endswith("\n\n" + bare) and answer == same
        assert shown.count("Answer:") == 3 and shown.count(bare) == 1
    assert two == prompts(folder, model, "piqa", 2)


def test_shots_of_a_subject_are_its_first_examples(model: Path, folder: Path) -> None:
    need_lm_eval()
    shown = [context for context, _ in prompts(folder, model, "mmlu", 2)]
    assert all(s.count("Answer:") == 3 and s.count("The following are") == 1 for s in shown)
    assert all("about art." in s for s in shown[:12])
    assert "0 plus 1" not in shown[0].split("Answer: ")[0]
    assert "0 plus 1" in shown[-1] and "1 plus 1" in shown[-1]


def test_shots_can_have_a_file_of_their_own(model: Path, folder: Path, tmp_path: Path) -> None:
    need_lm_eval()
    write(tmp_path, "piqa.jsonl", ROWS["piqa"])
    write(tmp_path, "piqa.shots.jsonl", [choice("Question: shown\n", [" yes", " no"], 1)])
    assert all(
        c.startswith("Question: shown\nAnswer: no\n\nQuestion: item")
        for c, _ in prompts(tmp_path, model, "piqa", 1)
    )
    found = scored(model, tmp_path, tmp_path, "piqa", "--shots", 1)["each"]["piqa"]
    assert found["shots"] == 1 and found["source"]["shots"] == "piqa.shots.jsonl"
    assert (
        found["source"]["shots_sha256"]
        == hashlib.sha256((tmp_path / "piqa.shots.jsonl").read_bytes()).hexdigest()
    )
    assert "--shots 2: task 'piqa' has only 1 examples to show" in refused(
        model, "--tasks", "piqa", "--task-data", tmp_path, "--shots", 2
    )


# Each task: where lm-eval defines it, the splits of its own data, and the same examples in the
# simple form. The texts are invented.
_ARC = [
    {
        "id": str(i),
        "question": f"What do {w} eat?",
        "choices": {"text": [f"{w} bread", "stones"], "label": ["A", "B"]},
        "answerKey": "AB"[i % 2],
    }
    for i, w in enumerate(("ducks", "élan", "cats"))
]
_PIQA = [
    {"goal": f"open  a {w}", "sol1": f"turn the {w}", "sol2": "wait", "label": i % 2}
    for i, w in enumerate(("jar", "can", "door"))
]
_HELLASWAG = [
    {
        "activity_label": "Baking",
        "ctx_a": "[header] How to bake [title] Get flour.",
        "ctx_b": "you",
        "endings": ["mix  it [step] well", " rest"] * 2,
        "label": "2",
        "ctx": "",
        "ind": 1,
        "source_id": "",
        "split": "",
        "split_type": "",
    },
    {
        "activity_label": "Rowing",
        "ctx_a": "A boat lies there.",
        "ctx_b": "",
        "endings": ["It sinks.", "It floats.", "It sings.", "It is red."],
        "label": "1",
        "ctx": "",
        "ind": 2,
        "source_id": "",
        "split": "",
        "split_type": "",
    },
]
_WINOGRANDE = [
    {
        "sentence": "The cup did not fit the box because the _ was too big.",
        "option1": "cup",
        "option2": "box",
        "answer": "1",
    },
    {
        "sentence": "Ann thanked Eve since _  's help was good . ",
        "option1": "Ann",
        "option2": "Eve",
        "answer": "2",
    },
]
_COPA = [
    {
        "premise": "The lamp went out.",
        "choice1": "The bulb broke.",
        "choice2": "It was noon.",
        "question": q,
        "idx": i,
        "label": i % 2,
    }
    for i, q in enumerate(("cause", "effect"))
]
_BOOLQ = [
    {"passage": f"Rivers {w} to the sea.", "question": f"do rivers {w}", "idx": i, "label": i % 2}
    for i, w in enumerate(("run", "rush"))
]
_OPENBOOK = [
    {
        "id": str(i),
        "question_stem": f"A {w} is",
        "choices": {"text": ["alive", "a rock"], "label": ["A", "B"]},
        "answerKey": "AB"[i],
    }
    for i, w in enumerate(("bee", "pebble"))
]
_LAMBADA = [{"text": f'He said "{w} it," and she\n  did {w}'} for w in ("do", "drop")]
_MMLU = [
    {
        "question": f" What is {i}+1?\n",
        "subject": "abstract_algebra",
        "choices": [str(i + k) for k in range(4)],
        "answer": (i + 1) % 4,
    }
    for i in range(3)
]


def _cleaned(text: str) -> str:
    for old, new in ((" [title]", ". "), ("[header]", ""), (" [step]", " ")):
        text = text.strip().replace(old, new)
    return text.replace("  ", " ")


def simple(task: str, raw: Row) -> Row:
    if task in ("arc_easy", "arc_challenge"):
        return choice(
            f"Question: {raw['question']}",
            [f" {t}" for t in raw["choices"]["text"]],
            "AB".index(raw["answerKey"]),
        )
    if task == "piqa":
        return choice(
            f"Question: {raw['goal']}\n", [f" {raw['sol1']}", f" {raw['sol2']}"], raw["label"]
        )
    if task == "hellaswag":
        context = f"{raw['activity_label']}: {raw['ctx_a']} {raw['ctx_b'].capitalize()}"
        return choice(
            _cleaned(context), [" " + _cleaned(e) for e in raw["endings"]], int(raw["label"])
        )
    if task == "winogrande":
        before, after = raw["sentence"].split("_")
        return {
            "contexts": [before + raw["option1"], before + raw["option2"]],
            "choices": [" " + after] * 2,
            "gold": int(raw["answer"]) - 1,
        }
    if task == "copa":
        link = {"cause": " because", "effect": " therefore"}[raw["question"]]
        return choice(
            raw["premise"][:-1] + link,
            [" " + raw[c][0].lower() + raw[c][1:] for c in ("choice1", "choice2")],
            raw["label"],
        )
    if task == "boolq":
        return choice(
            f"{raw['passage']}\nQuestion: {raw['question']}?\nAnswer:",
            [" no", " yes"],
            raw["label"],
        )
    if task == "openbookqa":
        return choice(
            raw["question_stem"],
            [f" {t}" for t in raw["choices"]["text"]],
            "AB".index(raw["answerKey"]),
        )
    if task == "mmlu":
        lines = [
            raw["question"].strip(),
            *(f"{letter}. {c}" for letter, c in zip("ABCD", raw["choices"], strict=True)),
            "Answer:",
        ]
        return choice(
            "\n".join(lines), [" A", " B", " C", " D"], raw["answer"], subject=raw["subject"]
        )
    context, _, word = raw["text"].rpartition(" ")
    return {"contexts": [context], "choices": [" " + word], "gold": 0}


OWN = [
    ("arc_easy", "arc", "arc_easy", _ARC),
    ("arc_challenge", "arc", "arc_challenge", _ARC),
    ("piqa", "piqa", "piqa", _PIQA),
    ("hellaswag", "hellaswag", "hellaswag", _HELLASWAG),
    ("winogrande", "winogrande", "winogrande", _WINOGRANDE),
    ("copa", "super_glue/copa", "copa", _COPA),
    ("boolq", "super_glue/boolq", "boolq", _BOOLQ),
    ("openbookqa", "openbookqa", "openbookqa", _OPENBOOK),
    ("lambada_openai", "lambada", "lambada_openai", _LAMBADA),
    ("lambada_standard", "lambada", "lambada_standard", _LAMBADA),
    ("mmlu", "mmlu/default", "mmlu_abstract_algebra", _MMLU),
]


def test_all_forms_are_compared_with_lm_eval() -> None:
    assert {task for task, *_ in OWN} == set(FORMS)


def _requests(task: Any, shots: int) -> list[tuple[tuple[str, str], Any]]:
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=None if not shots else 1)
    return [i.args for i in task.instances]


@pytest.mark.parametrize("shots", [0, 1])
@pytest.mark.parametrize(("task", "where", "own", "raw"), OWN, ids=[task for task, *_ in OWN])
def test_prompts_and_scores_are_those_of_lm_eval(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    task: str,
    where: str,
    own: str,
    raw: list[Row],
    shots: int,
) -> None:
    """The installed definition over its own kind of data, and the local one over the simple form:
    equal requests, equal scores.
    """
    need_lm_eval()
    import datasets
    import lm_eval.tasks

    from lowbit.evaluate.tasks import prepare

    data = datasets.Dataset.from_list(raw)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *a, **k: {s: data for s in ("train", "validation", "test", "dev")},
    )
    manager = lm_eval.tasks.TaskManager(
        include_path=Path(lm_eval.tasks.__file__).parent / where, include_defaults=False
    )
    theirs = manager.load([own])["tasks"][own]
    write(tmp_path, f"{task}.jsonl", [simple(task, r) for r in raw])
    if theirs.fewshot_cfg.split is None and not theirs.has_training_docs():
        # Without it lm-eval may show the very question that it asks.
        theirs.fewshot_cfg.split = theirs.config.test_split
    else:
        write(tmp_path, f"{task}.shots.jsonl", [simple(task, r) for r in raw])
    (prepared,) = prepare([task], shots=shots, folder=tmp_path)
    (ours,) = prepared.leaves
    # Lm-eval then draws one more and leaves the asked one out, although it is of another split.
    if theirs.config.test_split is None:
        monkeypatch.setattr(
            type(theirs.sampler),
            "rm_eval_doc",
            staticmethod(lambda doc, docs, n=None: list(docs)[:n]),
        )
    assert _requests(ours, shots) == _requests(theirs, shots)
    assert set(ours.aggregation()) == set(theirs.aggregation())
    for mine, original in zip(ours.eval_docs, theirs.eval_docs, strict=True):
        one = ours.OUTPUT_TYPE == "loglikelihood"
        for sums in (
            ([-9.0], [-2.0]) if one else ([-9.0, -8.5, -30.0, -31.0], [-5.0, -60.0, -8.0, -4.9])
        ):
            answers = [(s, s > -8) for s in sums[: 1 if one else len(ours.doc_to_choice(mine))]]
            assert ours.process_results(mine, answers) == theirs.process_results(original, answers)


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval knows some tasks only, or every test would wait until it has read ten thousand
    definitions.
    """
    need_lm_eval()
    import lm_eval.tasks

    home = Path(lm_eval.tasks.__file__).parent
    paths = [home / p for p in ("piqa", "arc", "gsm8k", "mmlu/default")]
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        partial(lm_eval.tasks.TaskManager, include_path=paths, include_defaults=False),
    )


@pytest.mark.usefixtures("few_tasks")
def test_tasks_of_the_hub(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> None:
    import datasets

    held = {"baber/piqa": _PIQA, "allenai/ai2_arc": _ARC}
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, **_: {
            s: datasets.Dataset.from_list(held[path]) for s in ("train", "validation", "test")
        },
    )
    result = run("eval", model, "--tasks", "arc_easy,piqa, ai2_arc", "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "e.json").read_text())["tasks"]
    assert sorted(found["each"]) == ["arc_challenge", "arc_easy", "piqa"]
    assert found["each"]["piqa"]["source"] == {"data": "hub: baber/piqa"}
    assert found["each"]["arc_easy"]["examples"] == 3


@pytest.mark.usefixtures("few_tasks")
def test_groups_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, model: Path, folder: Path, tmp_path: Path
) -> None:
    import datasets

    data = datasets.Dataset.from_list(_MMLU)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: {"dev": data, "test": data})
    result = run("eval", model, "--tasks", "mmlu_stem", "--limit", 2, "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads((tmp_path / "e.json").read_text())["tasks"]["each"].values()
    assert found["source"] == {"data": "hub: cais/mmlu"}
    assert found["examples"] == 2 * len(found["parts"]) > 20
    assert found["acc"] == pytest.approx(
        sum(p["acc"] for p in found["parts"].values()) / len(found["parts"])
    )
    assert "Duplicate task" in refused(model, "--tasks", "mmlu_stem,mmlu_abstract_algebra")


@pytest.mark.usefixtures("few_tasks")
def test_without_a_network_local_files_are_named(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    import datasets

    def offline(path: str, **_: object) -> None:
        raise ConnectionError(
            f"Couldn't reach '{path}' on the Hub (OfflineModeIsEnabled)\nand more"
        )

    monkeypatch.setattr(datasets, "load_dataset", offline)
    said = refused(model, "--tasks", "piqa")
    assert "the data of task 'piqa' cannot be loaded" in said
    assert "Couldn't reach 'baber/piqa'" in said
    assert "--task-data DIR" in said


@pytest.mark.usefixtures("few_tasks")
def test_a_task_that_lm_eval_does_not_know(model: Path) -> None:
    assert "unknown task 'pica': did you mean 'piqa'" in refused(model, "--tasks", "pica")
    assert "'lm_eval ls tasks' lists them" in refused(model, "--tasks", "wwwwwwwwwwww")


@pytest.mark.usefixtures("few_tasks")
def test_a_task_that_generates_is_refused(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"question": "1+1?", "answer": "It is\n#### 2"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: {"train": rows, "test": rows})
    assert "task 'gsm8k' is of kind generate_until" in refused(model, "--tasks", "gsm8k")


# --- bad input ------------------------------------------------------------------------------------


def test_without_lm_eval_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, model: Path, folder: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = refused(model, "--tasks", "piqa", "--task-data", folder)
    assert "--tasks needs lm-eval" in said and "pip install 'lowbit[eval]'" in said


def test_the_command_line_does_not_import_lm_eval() -> None:
    code = (
        "import sys, lowbit.cli, lowbit.evaluate.tasks; sys.exit('lm_eval' in sys.modules or 'datasets' in "
        "sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--tasks", "piqa", "--limit", "0"), "--limit 0: give a whole number from 1"),
        (("--tasks", "piqa", "--limit", "-3"), "--limit -3: give a whole number from 1"),
        (("--tasks", "piqa", "--shots", "-1"), "--shots -1: give a whole number from 0"),
        (("--tasks", " , "), "--tasks names no task"),
        (("--shots", "1"), "--shots has no effect without --tasks"),
        (("--text", "stdlib", "--task-data", "x"), "--task-data has no effect without --tasks"),
        (("--tasks", "piqa", "--reference", "x"), "--reference has no effect without --text"),
    ],
)
def test_numbers_out_of_range_and_options_without_effect_are_refused(
    model: Path, args: tuple[str, ...], says: str
) -> None:
    assert says in refused(model, *args)


def test_a_batch_below_one_is_refused(model: Path, folder: Path) -> None:
    need_lm_eval()
    assert "--batch 0: give a whole number from 1" in refused(
        model, "--tasks", "piqa", "--task-data", folder, "--batch", 0
    )


def test_more_shots_than_examples_are_refused(model: Path, folder: Path) -> None:
    need_lm_eval()
    args = (model, "--task-data", folder, "--shots")
    assert "--shots 7: task 'piqa' has only 6 examples to show besides" in refused(
        *args, 7, "--tasks", "piqa"
    )
    assert "--shots 3: task 'mmlu_art' has only 2 examples" in refused(*args, 3, "--tasks", "mmlu")
    assert run("eval", *args, 6, "--tasks", "piqa", "--limit", 1).exit_code == 0


def test_prompts_beyond_the_context_are_counted_and_answers_beyond_it_refused(
    model: Path, tmp_path: Path
) -> None:
    need_lm_eval()
    rows = [choice("Question: " + "x y " * n, [" a", " b"], 0) for n in (2, 90)]
    write(tmp_path, "piqa.jsonl", rows)
    result = run("eval", model, "--tasks", "piqa", "--task-data", tmp_path)
    assert "piqa: 1 of 2 prompts lost their beginning" in result.output
    assert scored(model, tmp_path, tmp_path, "piqa")["each"]["piqa"]["cut"] == 1
    write(tmp_path, "piqa.jsonl", [*rows, choice("Question: a", [" a", " b" * 200], 0)])
    said = refused(model, "--tasks", "piqa", "--task-data", tmp_path)
    assert "task 'piqa', example 3: an answer takes" in said and "the model's context 128" in said


def test_a_prompt_that_just_fits_is_not_cut(model: Path, tmp_path: Path) -> None:
    need_lm_eval()
    tokens = 129  # the last one is only predicted, so one more than the context
    for extra, cut in ((0, 0), (1, 1)):
        context = next(
            c
            for n in range(300)
            if len(tiny_tokenizer().encode((c := "Question: " + "\x7f" * n) + "\nAnswer: zz"))
            == tokens + extra
        )
        write(tmp_path, "piqa.jsonl", [choice(context, [" zz", " z"], 0)])
        assert scored(model, tmp_path, tmp_path, "piqa")["each"]["piqa"]["cut"] == cut


def broken(name: str, folder: Path) -> str:
    with pytest.raises(LowbitError) as e:
        read_task(name, folder)
    return str(e.value)


def test_a_task_without_a_form_is_refused_with_the_nearest(folder: Path) -> None:
    assert broken("arc_eazy", folder) == "unknown task 'arc_eazy': did you mean 'arc_easy'?"
    assert "known: arc_challenge, arc_easy" in broken("qqq", folder)


def test_a_file_is_found_by_its_name_or_the_only_longer_one(folder: Path, tmp_path: Path) -> None:
    assert read_task("mmlu", folder).data.name == "mmlu_small.jsonl"
    assert broken("hellaswag", folder) == (
        f"--task-data '{folder}' has neither 'hellaswag.jsonl' nor 'hellaswag_*.jsonl' for task "
        "'hellaswag'; "
        "it holds lambada_openai.jsonl, mmlu_small.jsonl, piqa.jsonl, winogrande.jsonl."
    )
    assert broken("piqa", tmp_path).endswith("it holds no .jsonl file.")
    assert "is not a folder" in broken("piqa", tmp_path / "nowhere")
    for name in ("piqa_b.jsonl", "piqa_a.jsonl"):
        write(tmp_path, name, ROWS["piqa"])
    assert (
        "several files for task 'piqa': piqa_a.jsonl, piqa_b.jsonl. Rename the one to use to "
        "'piqa.jsonl'" in broken("piqa", tmp_path)
    )
    write(tmp_path, "piqa.jsonl", ROWS["piqa"])
    found = read_task("piqa", tmp_path)
    assert found.data.name == "piqa.jsonl" and found.shots is None and len(found.data.docs) == 7


GOOD = choice("Question: a", [" b", " c"], 0)


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        ("piqa", "[1]", "expected an object"),
        (
            "piqa",
            json.dumps({**GOOD, "contexts": "Question: a"}),
            "field 'contexts' must be a list of texts",
        ),
        ("piqa", json.dumps({**GOOD, "choices": []}), "field 'choices' must be a list of texts"),
        (
            "piqa",
            json.dumps({**GOOD, "choices": [" a", " "]}),
            "field 'choices' must be a list of texts, none of them empty",
        ),
        ("piqa", json.dumps({**GOOD, "choices": [" a", " b", " c"]}), "2 contexts for 3 choices"),
        (
            "piqa",
            json.dumps({**GOOD, "gold": 2}),
            "field 'gold' must be the index of a choice, 0 to 1, not 2",
        ),
        ("piqa", json.dumps({**GOOD, "gold": True}), "not True"),
        ("piqa", json.dumps({k: v for k, v in GOOD.items() if k != "gold"}), "not None"),
        (
            "piqa",
            json.dumps({**GOOD, "contexts": ["a", "b"]}),
            "the contexts of this task must all be the same",
        ),
        ("winogrande", json.dumps(GOOD), "the choices of this task must all be the same"),
        ("lambada_openai", json.dumps(GOOD), "2 choices; this task has exactly one"),
        ("piqa", json.dumps(choice("a", [" b"], 0)), "1 choices; this task has at least two"),
        ("mmlu", json.dumps(GOOD), "field 'subject' must name the subject"),
    ],
)
def test_a_row_that_is_not_of_the_form_is_named(
    tmp_path: Path, task: str, row: str, says: str
) -> None:
    path = tmp_path / f"{task}.jsonl"
    path.write_text(f"\n{row}\n")
    assert broken(task, tmp_path).startswith(f"{path}, line 2: ") and says in broken(task, tmp_path)


def test_a_malformed_line_is_named(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "piqa.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + '{"contexts": ["a", \n')
    assert broken("piqa", tmp_path).startswith(f"{path}, line 2 is not valid JSON: ")
    path.write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text (byte 0)" in broken("piqa", tmp_path)


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "piqa.jsonl").write_text(text)
    assert broken("piqa", tmp_path) == f"'{tmp_path / 'piqa.jsonl'}' holds no examples."


def test_texts_keep_what_json_keeps(tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text(
        "\ufeff"
        + json.dumps(choice("Question: a\u2028b\n", [" c", "  d "], 1), ensure_ascii=False),
        encoding="utf-8",
    )
    assert read_task("piqa", tmp_path).data.docs == (
        {"line": 1, "gold": 1, "context": "Question: a\u2028b\nAnswer:", "choices": ["c", " d "]},
    )
