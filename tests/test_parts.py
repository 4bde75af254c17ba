"""Work in parts that shrink when memory runs out."""

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.model.microbatches import MicroBatches, ran_out


def limited(limit, asked):
    """Adds numbers of rows up, and runs out of memory on more than ``limit`` rows."""

    def add(total, part):
        asked.append(part.stop - part.start)
        if asked[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return total + sum(range(part.start, part.stop))

    return add


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_every_row_counts_once_whatever_fits(limit):
    said, asked = [], []
    parts = MicroBatches("tuning", 8, said.append)
    assert parts.over(21, lambda: 0, limited(limit, asked)) == sum(range(21))
    assert len(said) == {1: 3, 2: 2, 3: 2, 7: 1, 100: 0}[limit]
    assert all("while tuning" in s for s in said)
    asked.clear()
    # What was found out is kept.
    assert parts.over(21, lambda: 0, limited(limit, asked)) == sum(range(21))
    assert max(asked) <= limit and len(said) == {1: 3, 2: 2, 3: 2, 7: 1, 100: 0}[limit]


def test_a_single_row_that_does_not_fit_is_an_error():
    with pytest.raises(
        LowbitError,
        match="ran out of memory while tuning, with a single row at a time: use a shorter --length",
    ):
        MicroBatches("tuning", 4, lambda _: None).over(4, lambda: 0, limited(0, []))


def test_a_cpu_that_cannot_allocate_is_out_of_memory_and_other_errors_are_not():
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60, dtype=torch.uint8)  # no machine has that much
    assert not isinstance(found.value, torch.OutOfMemoryError) and ran_out(found.value)

    def add(total, part):
        if part.stop - part.start > 2:
            torch.empty(1 << 60, dtype=torch.uint8)
        return total + part.stop - part.start

    said = []
    assert MicroBatches("tuning", 8, said.append).over(9, lambda: 0, add) == 9 and len(said) == 2
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        MicroBatches("tuning", 8, said.append).over(
            9, lambda: 0, lambda *_: torch.zeros(2, 3) @ torch.zeros(2, 3)
        )


@pytest.mark.parametrize(
    "said, memory",
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling ...", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling ...", False),
    ],
)
def test_workspaces_of_libraries_are_memory_too(said, memory):
    assert ran_out(RuntimeError(said)) == memory
