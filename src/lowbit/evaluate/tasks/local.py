"""lm-eval's tasks over documents of local files, with its own prompts."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from .data import DataFile, Doc, Form, LocalTask


def lm_eval_item(local: LocalTask) -> Any:
    """Return lm-eval's task; with subjects, its group of one task for each."""
    if local.form.subjects:
        return _group(local)
    shots = None if local.shots is None else local.shots.docs
    return _task(local.form, local.name, local.data.docs, shots)


def _group(local: LocalTask) -> Any:
    """Return lm-eval's group over the subjects of local files."""
    from lm_eval.api.group import AggMetricConfig, Group

    group = Group(local.name, aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=True)])
    shots = None if local.shots is None else _by_subject(local.shots)
    for subject, docs in _by_subject(local.data).items():
        task = _task(
            local.form,
            f"{local.name}_{subject}",
            docs,
            None if shots is None else shots.get(subject, ()),
            description=(
                "The following are multiple choice questions (with answers) about "
                f"{subject.replace('_', ' ')}.\n\n"
            ),
            fewshot_config={"sampler": "first_n"},
        )
        group.add(task)
    return group


def _by_subject(data: DataFile) -> dict[str, tuple[Doc, ...]]:
    def subject(doc: Doc) -> str:
        return str(doc["subject"])

    return {s: tuple(docs) for s, docs in groupby(sorted(data.docs, key=subject), subject)}


# By the form's kind: how lm-eval scores the documents, and which fields make the prompt.
_PROMPTS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    },
    "ending": {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "contexts",
        "doc_to_target": "ending",
    },
    "word": {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "word",
    },
}


def _task(
    form: Form,
    name: str,
    docs: tuple[Doc, ...],
    shots: tuple[Doc, ...] | None,
    **options: Any,
) -> Any:
    """Return lm-eval's task over documents in memory.

    Args:
        shots: the few-shot examples; None takes them from ``docs``, without the one that is asked.
        options: of lm-eval besides those that the form decides.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    splits = {"test": Dataset.from_list(list(docs))}
    if shots:
        splits["shots"] = Dataset.from_list(list(shots))
    fewshot_split = None
    if shots is None:
        fewshot_split = "test"
    elif shots:
        fewshot_split = "shots"
    config = {
        "task": name,
        "custom_dataset": lambda: splits,
        "test_split": "test",
        "fewshot_split": fewshot_split,
        "metric_list": _metrics_of(form),
        **options,
        **_PROMPTS[form.kind],
    }
    return ConfigurableTask(config=config)


def _metrics_of(form: Form) -> list[dict[str, Any]]:
    """Return the metrics of a form as lm-eval's configuration has them."""
    mean = {"aggregation": "mean", "higher_is_better": True}
    metrics: list[dict[str, Any]] = [{"metric": "acc", **mean}]
    if form.normalized:
        metrics.append({"metric": "acc_norm", **mean})
    if form.kind == "word":
        metrics.append(
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
        )
    return metrics
