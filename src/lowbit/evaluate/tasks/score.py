"""Asks a model the prepared tasks, and holds its scores."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from ...errors import LowbitError
from .prepare import Prepared, Source, quietly


@dataclass(frozen=True)
class TaskResult:
    """The scores of one task.

    Attributes:
        name: as asked for.
        examples: how many were scored.
        shots: worked examples in each prompt.
        metrics: by lm-eval's names: acc, acc_norm (log-likelihood over characters of the choice),
            perplexity of the last word.
        stderr: standard error of each metric where there is one.
        cut: examples whose prompts lost their beginning to fit into the model's context.
        source: where the data came from.
        parts: the tasks of a group; empty for a task.
    """

    name: str
    examples: int
    shots: int
    metrics: Mapping[str, float]
    stderr: Mapping[str, float]
    cut: int
    source: Source
    parts: tuple[TaskResult, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return metrics and their ``_stderr`` by name, then counts, then the source; parts by
        name.
        """
        found: dict[str, Any] = {}
        for metric, value in self.metrics.items():
            found[metric] = value
            found[f"{metric}_stderr"] = self.stderr.get(metric)
        found["examples"] = self.examples
        found["shots"] = self.shots
        found["cut"] = self.cut
        found["source"] = {k: v for k, v in vars(self.source).items() if v is not None}
        if self.parts:
            found["parts"] = {p.name: p.as_dict() for p in self.parts}
        return found


@dataclass(frozen=True)
class TaskResults:
    """The scores of all tasks of one evaluation.

    Attributes:
        each: in the order asked for.
        lm_eval: version of the library that scored.
        limit: the first so many examples of each task; None is all.
        averaged: names of the tasks that have an acc.
    """

    each: tuple[TaskResult, ...]
    lm_eval: str
    limit: int | None = None
    averaged: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "averaged", tuple(r.name for r in self.each if "acc" in r.metrics))

    @property
    def mean_acc(self) -> float | None:
        """The plain mean of acc (not acc_norm) over the tasks in ``averaged``; None without any."""
        found = [r.metrics["acc"] for r in self.each if "acc" in r.metrics]
        return statistics.fmean(found) if found else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: each, mean_acc, averaged, limit, lm_eval."""
        each = {r.name: r.as_dict() for r in self.each}
        return {
            "each": each,
            "mean_acc": self.mean_acc,
            "averaged": list(self.averaged),
            "limit": self.limit,
            "lm_eval": self.lm_eval,
        }


def evaluate_tasks(
    prepared: Sequence[Prepared],
    model: Any,
    tokenizer: Any,
    *,
    limit: int | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> TaskResults:
    """Ask a model the tasks and score its answers.

    Args:
        prepared: as from `prepare`; good for one evaluation.
        model, tokenizer: as from `lowbit.evaluate.load_causal_lm` and
            `lowbit.model.tokenizer.load_tokenizer`.
        limit: only the first so many examples of each task, of each subject in a group.
        batch: rows a forward pass.
        progress: called with rows done and rows in all after each pass.

    Raises:
        LowbitError: two names that hold the same task, a batch below 1, a tokenizer without a first
            or last token, or an answer that the model cannot be asked for.
    """
    if batch < 1:
        raise LowbitError(f"--batch {batch}: give at least 1 row a forward pass.")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise LowbitError(
            "the tokenizer has neither a beginning nor an end of text token, and lm-eval needs one "
            "of them."
        )
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    from .scorer import Scorer

    with quietly():
        try:
            loaded = TaskManager(include_defaults=False).load([p.item for p in prepared])
        except ValueError as e:
            raise LowbitError(f"--tasks: {e}. Leave one of the two out.") from e
        scorer = Scorer(model, tokenizer, batch, progress)
        # No bootstrap: it starts processes and prints, for perplexity alone; the samples give its
        # error as well.
        found = evaluate(
            lm=scorer, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True
        )
    results = tuple(_result(p, found, scorer.cut) for p in prepared)
    return TaskResults(results, version("lm_eval"), limit)


def _result(p: Prepared, found: Mapping[str, Any], cut: set[tuple[str, int]]) -> TaskResult:
    """Return the scores of a task, or of a group with its parts.

    Args:
        found: as lm-eval returns it.
        cut: (task, document number) of the examples that were cut.
    """
    parts = tuple(_leaf(t, p.source, found, cut) for t in p.leaves)
    if len(parts) == 1 and p.leaves[0] is p.item:
        return parts[0]
    metrics = _metrics(found["results"][p.name])
    equal = {m.metric for m in p.item.aggregate_metric_list if not m.weight_by_size}
    errors = {m: _of_parts(parts, m, m in equal) for m in metrics}
    return TaskResult(
        name=p.name,
        examples=sum(t.examples for t in parts),
        shots=max(t.shots for t in parts),
        metrics=metrics,
        stderr={m: e for m, e in errors.items() if e is not None},
        cut=sum(t.cut for t in parts),
        source=p.source,
        parts=parts,
    )


def _leaf(
    task: Any, source: Source, found: Mapping[str, Any], cut: set[tuple[str, int]]
) -> TaskResult:
    """Return the scores of a task of lm-eval; ``source`` is that of the whole group."""
    name = task.task_name
    samples = found["samples"][name]
    metrics = _metrics(found["results"][name])
    errors = {m: _stderr(m, [s.get(m) for s in samples]) for m in metrics}
    return TaskResult(
        name=name,
        examples=len(samples),
        shots=int(task.get_config("num_fewshot")),
        metrics=metrics,
        stderr={m: e for m, e in errors.items() if e is not None},
        cut=sum(t == name for t, _ in cut),
        source=Source(f"hub: {task.DATASET_PATH}") if source.sha256 is None else source,
    )


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a row of lm-eval by name.

    Its keys are 'metric,filter'. These kinds of task have one filter, which does nothing.
    """
    found = {}
    for key, value in row.items():
        metric, comma, _ = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            found[metric] = float(value)
    return found


def _stderr(metric: str, values: list[Any]) -> float | None:
    """Return the standard error of the mean over examples; None with fewer than two.

    Perplexity is the exponential of a mean of log-likelihoods: its error is to first order.
    """
    if len(values) < 2 or not all(isinstance(v, (int, float)) for v in values):
        return None
    of_mean: float = statistics.stdev(values) / math.sqrt(len(values))
    if metric == "perplexity":
        return of_mean * math.exp(-statistics.fmean(values))
    return of_mean


def _of_parts(parts: Sequence[TaskResult], metric: str, equal: bool) -> float | None:
    """Return the standard error of a group's mean as lm-eval computes it.

    Args:
        equal: the parts count alike; else the mean is by size, and its error from the variance
            pooled over the parts.
    """
    held = [(t.examples, t.stderr[metric]) for t in parts if metric in t.stderr]
    if len(held) != len(parts):
        return None
    if equal:
        return math.sqrt(sum(e * e for _, e in held)) / len(held)
    total = sum(t.examples for t in parts)
    pooled = sum((n - 1) * n * e * e for n, e in held) / (total - len(parts))
    return math.sqrt(pooled / total)
