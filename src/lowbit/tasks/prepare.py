"""From names to tasks that lm-eval can ask: its own definitions on hub data, or the same prompts
over local files.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import LowbitError
from .data import DataFile, Doc, LocalTask, read_task

_FEWSHOT_SEED = 1234  # lm-eval's own
_SCORED = ("multiple_choice", "loglikelihood")


@dataclass(frozen=True)
class Source:
    """Where a task's data came from: a hub dataset with neither hash, or files with one each;
    ``shots`` only if it is a file apart.
    """

    data: str
    sha256: str | None = None
    shots: str | None = None
    shots_sha256: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A task that is ready to be asked: lm-eval's Task, or its Group of them (mmlu)."""

    name: str
    item: Any
    source: Source

    @property
    def leaves(self) -> list[Any]:
        """The tasks themselves, without groups."""
        return (
            list(self.item.get_all_tasks()) if hasattr(self.item, "get_all_tasks") else [self.item]
        )


def prepare(
    names: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    folder: Path | None = None,
) -> tuple[Prepared, ...]:
    """Find tasks and their data, so that everything that can be wrong with them is said before a
    model is loaded.

    Args:
        names: lm-eval's names of tasks, groups or tags; with ``folder`` those of
            `lowbit.tasks.data.FORMS`.
        shots: worked examples in each prompt; None is what the task defines, which is none for all
            the usual ones.
        limit: as for `evaluate_tasks`. folder: local files in place of the hub.

    Raises:
        LowbitError: lm-eval is not installed, a task or its data cannot be found or read, the task
            generates text instead of scoring it, it has too few examples for ``shots``, or a number
            is out of range.
    """
    wanted = list(dict.fromkeys(n.strip() for n in names if n.strip()))
    if not wanted:
        raise LowbitError("--tasks names no task. Give some, such as --tasks piqa,arc_easy.")
    if limit is not None and limit < 1:
        raise LowbitError(
            f"--limit {limit}: give at least 1 example a task, or leave it out for all of them."
        )
    if shots is not None and shots < 0:
        raise LowbitError(f"--shots {shots}: give 0 or more worked examples.")
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as e:
        raise LowbitError(f"--tasks needs lm-eval ({e}): pip install 'lowbit[eval]'.") from e
    with quietly():
        made = [_local(read_task(n, folder)) for n in wanted] if folder else _hub(wanted)
        # A tag may hold what is also named by itself.
        found = tuple({p.name: p for p in made}.values())
        for task in (leaf for p in found for leaf in p.leaves):
            _set_shots(task, shots)
    return found


@contextmanager
def quietly() -> Iterator[None]:
    """Keep lm-eval's advice and its bar over prompts, which only pass a few milliseconds each, out
    of our output.
    """
    import lm_eval.api.task as home

    log, bar = logging.getLogger("lm_eval"), home.tqdm
    level = log.level
    log.setLevel(logging.ERROR)
    home.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        log.setLevel(level)
        home.tqdm = bar


def _local(local: LocalTask) -> Prepared:
    source = Source(local.data.name, local.data.sha256)
    if local.shots:
        source = Source(source.data, source.sha256, local.shots.name, local.shots.sha256)
    if not local.form.subjects:
        return Prepared(
            local.name,
            _local_task(
                local, local.name, local.data.docs, local.shots.docs if local.shots else None
            ),
            source,
        )
    from lm_eval.api.group import AggMetricConfig, Group

    group = Group(local.name, aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=True)])
    shots = _by_subject(local.shots) if local.shots else None
    for subject, docs in _by_subject(local.data).items():
        about = (
            "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n"
        )
        apart = shots.get(subject, ()) if shots is not None else None
        group.add(
            _local_task(
                local,
                f"{local.name}_{subject}",
                docs,
                apart,
                description=about,
                fewshot_config={"sampler": "first_n"},
            )
        )
    return Prepared(local.name, group, source)


def _by_subject(data: DataFile) -> dict[str, tuple[Doc, ...]]:
    def subject(doc: Doc) -> str:
        return str(doc["subject"])

    return {s: tuple(docs) for s, docs in groupby(sorted(data.docs, key=subject), subject)}


def _local_task(
    local: LocalTask,
    name: str,
    docs: tuple[Doc, ...],
    apart: tuple[Doc, ...] | None,
    **options: Any,
) -> Any:
    """lm-eval's task over documents in memory. Without few-shot examples apart they come from the
    documents, the asked one left out.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    splits = {"test": Dataset.from_list(list(docs))} | (
        {"shots": Dataset.from_list(list(apart))} if apart else {}
    )
    if local.form.kind == "word":
        options |= {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": "word",
        }
    elif local.form.kind == "ending":
        options |= {
            "output_type": "multiple_choice",
            "doc_to_text": "gold",
            "doc_to_choice": "contexts",
            "doc_to_target": "ending",
        }
    else:
        options |= {
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
        }
    mean = {"aggregation": "mean", "higher_is_better": True}
    metrics: list[dict[str, Any]] = [{"metric": "acc", **mean}]
    if local.form.normalized:
        metrics.append({"metric": "acc_norm", **mean})
    if local.form.kind == "word":
        metrics.append(
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
        )
    few = "test" if apart is None else "shots" if apart else None
    config = {
        "task": name,
        "custom_dataset": lambda: splits,
        "test_split": "test",
        "fewshot_split": few,
        "metric_list": metrics,
        **options,
    }
    return ConfigurableTask(config=config)


def _hub(names: list[str]) -> Iterator[Prepared]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)
            hint = (
                f"did you mean {' or '.join(repr(n) for n in near)}?"
                if near
                else "'lm_eval ls tasks' lists them."
            )
            raise LowbitError(f"unknown task '{name}': {hint}")
    for name in names:
        try:
            built = manager.load([name])
        except Exception as e:  # hub, datasets and lm-eval let errors of a dozen kinds through
            reason = (next(iter(str(e).splitlines()), "") or type(e).__name__).rstrip(".")
            raise LowbitError(
                f"the data of task '{name}' cannot be loaded from the Hugging Face hub: {reason}. "
                "Without the hub, give local files "
                "with --task-data DIR."
            ) from e
        group = built.get("groups", {}).get(name)
        # A group without a score of its own and a tag both stand for their tasks.
        items = (
            [group]
            if group is not None and group.has_aggregation
            else list(built["tasks"].values())
        )
        for item in items:
            yield _scored(name if item is group else str(item.task_name), item)


def _scored(name: str, item: Any) -> Prepared:
    found = Prepared(name, item, Source("hub: "))
    for task in found.leaves:
        if task.OUTPUT_TYPE not in _SCORED:
            raise LowbitError(
                f"task '{task.task_name}' is of kind {task.OUTPUT_TYPE}; only choices and "
                "continuations are scored here. Use lm_eval."
            )
    return replace(
        found,
        source=Source("hub: " + ", ".join(sorted({str(t.DATASET_PATH) for t in found.leaves}))),
    )


def _set_shots(task: Any, shots: int | None) -> None:
    own = task.get_config("num_fewshot")
    # As lm-eval has it: a task that is defined with no shots keeps none.
    count = own or 0 if shots is None or own == 0 else shots
    task.set_config("num_fewshot", count)
    task.set_fewshot_seed(_FEWSHOT_SEED)
    if not count:
        return
    pool = len(task.sampler.df) if hasattr(task, "sampler") else 0
    # The example that is asked is in the pool too.
    if task.fewshot_cfg.split == task.config.test_split:
        pool -= 1
    if count > pool:
        raise LowbitError(
            f"--shots {count}: task '{task.task_name}' has only {max(0, pool)} examples to show "
            "besides the one that is asked."
        )
