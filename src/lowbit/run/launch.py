"""Several processes for one run, as torchrun starts them: how they find each other, and what the
user hears when one of them ends.

torchrun's key-value store outlives every rank. A rank that fails leaves word there; one that
notices that another has ended looks there, and only one of all tells the user.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..errors import LowbitError, ToldElsewhere
from ..machine import device_of_rank
from ..model.microbatches import ran_out
from ..model.ranks import ALONE, RankGone, Ranks

Say = Callable[[str], None]

_JOIN = timedelta(minutes=5)  # until all have started
_ANSWER = timedelta(
    minutes=30
    # For sums: a rank that ends is noticed at once, this is for one that hangs or a cut network.
)
_PATIENCE = timedelta(days=7)  # while rank 0 writes and verifies
_GRACE = 2.0  # seconds for the others to speak
_KEPT = "The finished blocks are kept: run the same command to go on, with any number of ranks."


@contextmanager
def joined(device: str, say: Say) -> Iterator[Ranks]:
    """The processes that torchrun started with this one, by its environment variables; `ALONE`
    without them.

    Communication is NCCL where each has a GPU of its own, and gloo on the CPU. What is raised
    within is raised again so that one rank tells the user: a LowbitError there, `ToldElsewhere` on
    the others.

    Args:
        device: as the user named it, see `lowbit.machine.pick_device`.
        say: prints one sentence; called instead of raising when the process is told to end
            (torchrun ends all if one fails).

    Raises:
        LowbitError: the others cannot be reached; one of them is gone; whatever is raised within.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    with _reached(rank, size):
        store, _, _ = next(rendezvous("env://", timeout=_JOIN))
    voices = _Voices(PrefixStore("lowbit", store), rank, size, say)
    group = None
    with voices.until_ended():
        try:
            with voices.heard():  # leaves word of a failure before the connections are closed
                where = device_of_rank(device, local)
                if where.type == "cuda":
                    torch.cuda.set_device(where)
                with _reached(rank, size):
                    kinds = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
                    dist.init_process_group(
                        kinds,
                        store=PrefixStore("torch", store),
                        rank=rank,
                        world_size=size,
                        timeout=_ANSWER,
                    )
                    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
                here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
                near = _machine(rank, local, here) if here < size else None
                yield Ranks(rank, size, local, here, group, machine=near)
        except BaseException:
            # Closes the connections, which wakes the others; NCCL might wait for them.
            if group is not None and where.type == "cpu":
                _leave()
            raise
        _leave()


def _machine(rank: int, local: int, here: int) -> Ranks:
    """The ranks of this machine, which torchrun numbers one after the other."""
    members = list(range(rank - local, rank - local + here))
    groups = [
        dist.new_group(members, **how, use_local_synchronization=True)
        for how in ({"backend": "gloo", "timeout": _PATIENCE}, {"timeout": _ANSWER})
    ]
    return Ranks(local, here, local, here, *groups)


def _leave() -> None:
    with suppress(RuntimeError, ValueError):
        dist.destroy_process_group()


@contextmanager
def _reached(rank: int, size: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as e:
        raise LowbitError(
            f"rank {rank} of {size} cannot reach the others ({_brief(str(e))}). Have all been "
            "started?"
        ) from e


def _brief(what: str) -> str:
    """An error of torch.distributed without the places in its source and what it advises."""
    line = re.sub(
        r"\[[^\]]*\.(cc|cpp|h):\d+\]\s*|\s*\[[^\]]*\]:\d+",
        "",
        what.splitlines()[0] if what else "no answer",
    )
    return re.split(r"\.\s|\. ?This may", line)[0].strip(" .")


class _Voices:
    """Which rank tells the user what.

    Args:
        store: shared with the other ranks. say: prints.
    """

    def __init__(self, store: Any, rank: int, size: int, say: Say) -> None:
        self._store, self._rank, self._size, self._say = store, rank, size, say
        self._ending = False
        self._first = threading.Lock()

    def _begins(self) -> bool:
        """Whether the caller is the thread that speaks: what was raised, or what listens for the
        end, whichever comes first.
        """
        with self._first:
            before, self._ending = self._ending, True
        return not before

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Raise what is raised within again, as what this rank is to say of it."""
        try:
            yield
        except Exception as e:
            if not self._begins():
                # The listening thread is speaking, and ends the process when it has.
                time.sleep(2 * _GRACE)
            self._say_again(e)

    def _say_again(self, raised: Exception) -> NoReturn:
        try:
            raise raised
        except RankGone as e:
            told = self._of_others(_brief(str(e)))
            raise (ToldElsewhere(str(e)) if told is None else LowbitError(told)) from None
        except LowbitError as e:
            if not self._of_own(str(e)):
                raise ToldElsewhere(str(e)) from e
            raise (
                type(e)(f"rank {self._rank} of {self._size}: {e}") if self._rank else e
            ) from None
        except Exception as e:
            if not ran_out(e):
                self._of_own(repr(e))
                raise  # ours to repair: its traceback is printed
            what = f"rank {self._rank} of {self._size} is out of memory ({_brief(str(e))}). {_KEPT}"
            raise (LowbitError(what) if self._of_own(what) else ToldElsewhere(what)) from e

    def _claim(self) -> bool:
        with suppress(RuntimeError):  # torchrun itself is gone, and the store with it
            return bool(self._store.add("said", 1) == 1)
        return self._rank == 0

    def _known(self, key: str) -> bool:
        with suppress(RuntimeError):
            return bool(self._store.check([key]))
        return False

    def _wait(self, until: Callable[[], bool]) -> None:
        end = time.monotonic() + _GRACE
        while time.monotonic() < end and not until():
            time.sleep(0.02)

    def _of_own(self, what: str) -> bool:
        """Leave word of an error of this rank's; whether it tells the user. One that all have, rank
        0 tells.
        """
        with suppress(RuntimeError):
            self._store.set(f"error/{self._rank}", what)
        if self._rank:
            self._wait(lambda: self._known("said"))
        return self._claim()

    def _of_others(self, why: str) -> str | None:
        """What to say when others have ended; None if another rank says it."""
        if any(self._known(f"error/{r}") for r in range(self._size)):
            return None  # it tells itself
        with suppress(RuntimeError):
            self._store.set(f"alive/{self._rank}", "yes")
        if not self._claim():
            return None
        others = [r for r in range(self._size) if r != self._rank]
        self._wait(lambda: all(self._known(f"alive/{r}") for r in others))
        gone = [str(r) for r in others if not self._known(f"alive/{r}")]
        if not gone:
            return f"the {self._size} ranks have ended together ({why}). {_KEPT}"
        return f"rank {', '.join(gone)} of {self._size} is gone ({why}). {_KEPT}"

    @contextmanager
    def until_ended(self) -> Iterator[None]:
        """Within, SIGTERM ends the process after a word to the user, also while it waits for a
        device or another rank.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        near, far = socket.socketpair()
        far.setblocking(False)
        woken = signal.set_wakeup_fd(far.fileno(), warn_on_full_buffer=False)
        handler = signal.signal(signal.SIGTERM, lambda *_: None)
        threading.Thread(target=self._listen, args=(near,), daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(woken)
            if not self._ending:
                signal.signal(signal.SIGTERM, handler)  # else what is being said is said to its end
            far.close()

    def _listen(self, near: socket.socket) -> None:
        while (number := near.recv(1)) and number[0] != signal.SIGTERM:
            pass
        if not number or not self._begins():  # over, or the main thread is speaking
            return
        told = self._of_others("all were told to end")
        if told is not None:
            self._say(told)
        os._exit(2)
