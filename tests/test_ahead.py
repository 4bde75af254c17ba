"""Items made in a thread ahead of the work on them."""

import threading

import pytest

from lowbit.export.ahead import ahead


def test_items_come_in_their_order_and_one_ahead():
    begun, seen = [], []

    def items():
        for i in range(5):
            begun.append((i, threading.current_thread() is threading.main_thread()))
            yield i

    for i in ahead(items()):
        seen.append((i, len(begun)))
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    assert begun == [(i, False) for i in range(5)]
    assert all(count <= i + 2 for i, count in seen)


def test_what_is_raised_comes_after_what_was_made():
    def items():
        yield 1
        raise ValueError("the second")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="the second"):
        next(found)


def test_work_that_ends_early_ends_the_making():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    def work():
        for i in ahead(items()):
            if i == 2:
                raise KeyError("work")

    with pytest.raises(KeyError):
        work()
    assert len(made) <= 4 and threading.active_count() < 3
