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
from pathlib import Path
from typing import Any

from ...errors import LowbitError
from .data import LocalTask, read_task
from .local import lm_eval_item

_FEWSHOT_SEED = 1234  # lm-eval's own
_SCORED = ("multiple_choice", "loglikelihood")


@dataclass(frozen=True)
class Source:
    """Where a task's data came from.

    Attributes:
        data: of a hub dataset, or of a file.
        sha256: of the file; None for a hub dataset.
        shots, shots_sha256: of the few-shot examples, if they lie in a file apart.
    """

    data: str
    sha256: str | None = None
    shots: str | None = None
    shots_sha256: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A task that is ready to be asked.

    Attributes:
        item: lm-eval's Task, or its Group of them (mmlu).
        source: where its data came from.
    """

    name: str
    item: Any
    source: Source

    @property
    def leaves(self) -> list[Any]:
        """The tasks themselves, without groups."""
        from lm_eval.api.group import Group

        return list(self.item.get_all_tasks()) if isinstance(self.item, Group) else [self.item]


def prepare(
    names: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    folder: Path | None = None,
) -> tuple[Prepared, ...]:
    """Find tasks and their data. What is wrong with them is found before a model is loaded.

    Args:
        names: lm-eval's names of tasks, groups or tags; with ``folder`` those of
            `lowbit.evaluate.tasks.data.FORMS`.
        shots: worked examples in each prompt; None is what the task defines, which is none for all
            the usual ones.
        limit: as for `evaluate_tasks`.
        folder: local files in place of the hub.

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
    """Keep lm-eval's advice out of our output, and its bar over prompts: they take milliseconds."""
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
    """Return a task over local files."""
    data, shots = local.data, local.shots
    source = Source(data.name, data.sha256)
    if shots is not None:
        source = replace(source, shots=shots.name, shots_sha256=shots.sha256)
    return Prepared(local.name, lm_eval_item(local), source)


def _hub(names: list[str]) -> Iterator[Prepared]:
    """Yield tasks on hub data; a tag, and a group without a score of its own, yield theirs."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    _check_known(names, set(manager.all_tasks))
    for name in names:
        try:
            built = manager.load([name])
        except Exception as e:  # hub, datasets and lm-eval let errors of a dozen kinds through
            reason = (next(iter(str(e).splitlines()), "") or type(e).__name__).rstrip(".")
            raise LowbitError(
                f"the data of task '{name}' cannot be loaded from the Hugging Face hub: {reason}. "
                "Without the hub, give local files with --task-data DIR."
            ) from e
        group = built.get("groups", {}).get(name)
        if group is not None and group.has_aggregation:
            yield _scored(name, group)
        else:
            for task in built["tasks"].values():
                yield _scored(str(task.task_name), task)


def _check_known(names: list[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)
            hint = "'lm_eval ls tasks' lists them."
            if near:
                hint = f"did you mean {' or '.join(repr(n) for n in near)}?"
            raise LowbitError(f"unknown task '{name}': {hint}")


def _scored(name: str, item: Any) -> Prepared:
    """Return a task on hub data. Raises LowbitError if it generates text instead of scoring it."""
    found = Prepared(name, item, Source("hub: "))
    for task in found.leaves:
        if task.OUTPUT_TYPE not in _SCORED:
            raise LowbitError(
                f"task '{task.task_name}' is of kind {task.OUTPUT_TYPE}; only choices and "
                "continuations are scored here. Use lm_eval."
            )
    datasets = sorted({str(task.DATASET_PATH) for task in found.leaves})
    return replace(found, source=Source("hub: " + ", ".join(datasets)))


def _set_shots(task: Any, shots: int | None) -> None:
    """Set the worked examples in each prompt; None keeps what the task defines.

    Raises:
        LowbitError: the task has too few examples.
    """
    own = task.get_config("num_fewshot")
    # As lm-eval has it: a task that is defined with no shots keeps none.
    count = (own or 0) if shots is None or own == 0 else shots
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
