"""The machine a run finds itself on: its devices, and the memory it takes and gives back."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from pathlib import Path

import torch

from .errors import LowbitError

_LOADING = 1.3  # what a load takes, beside the weights: measured


def forget_peaks(device: torch.device) -> None:
    """On an accelerator, `peak_memory` and `reserved_memory` are of what follows."""
    if device.type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats(device)


def reserved_memory(device: torch.device) -> int | None:
    """Largest number of bytes that were taken from an accelerator, what its allocator keeps for
    later included; None on a CPU.
    """
    if device.type == "cpu" or not torch.accelerator.is_available():
        return None
    return int(torch.accelerator.max_memory_reserved(device))


def peak_memory(device: torch.device) -> int:
    """Largest memory use of this process in bytes: on the accelerator, if there is one, since
    `forget_peaks`, else resident and so far.
    """
    if device.type != "cpu" and torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated(device))
    if sys.platform == "linux":  # its ru_maxrss starts from what the parent process held
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def fits_whole(numbers: int, itemsize: int, device: torch.device) -> bool:
    """Whether a model can be loaded whole, as far as that is known.

    Args:
        numbers: its parameters. itemsize: bytes of one.
    """
    free = free_memory(device)
    return free is None or _LOADING * itemsize * numbers < free


def free_memory(device: torch.device) -> int | None:
    """Bytes that could still be allocated, None where nobody tells.

    On an accelerator what its driver calls free, and what torch has cached. In host memory what the
    kernel could hand out without swapping (MemAvailable), or what is left to this process's control
    groups where that is less.
    """
    if device.type != "cpu":
        kind = getattr(torch, device.type, None)  # cuda, xpu
        if kind is None or not hasattr(kind, "mem_get_info"):
            return None
        cached = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(
            device
        )
        return int(kind.mem_get_info(device)[0]) + cached
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")))
    if found is None:
        return None
    return min([int(found[1]) * 1024, *control_groups()])


def control_groups(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Bytes left to each control group this process is in that has a limit; cached files that can
    be dropped count as left.

    Args:
        membership: a file like /proc/self/cgroup. root: where the groups' file system is mounted,
            of version 1 or 2.
    """
    out = []
    names: tuple[str, ...]
    cache: tuple[str, ...]
    for line in _text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current")
            cache = ("inactive_file", "active_file", "slab_reclaimable")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cache = ("total_inactive_file", "total_active_file")
        else:
            continue
        group = base / path.lstrip("/")
        # A limit of a parent binds its children.
        for folder in (group, *(p for p in group.parents if p.is_relative_to(base))):
            limit, used = (_text(folder / n).strip() for n in names)
            if limit.isdigit() and used.isdigit():
                dropped = re.findall(
                    rf"^(?:{'|'.join(cache)}) (\d+)$", _text(folder / "memory.stat"), re.M
                )
                out.append(max(0, int(limit) - int(used) + sum(map(int, dropped))))
    return out


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def give_back_memory() -> None:
    """Return freed memory to the system: glibc keeps it, and the holes between steps and blocks
    would add up with depth.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def device_of_rank(name: str, local: int) -> torch.device:
    """The device of process number ``local`` on this machine, where several share a run: a GPU of
    its own, or the CPU for all.

    Raises:
        LowbitError: there are fewer GPUs than processes, a single one was asked for, or another
            kind of device.
    """
    found = pick_device(name)
    if found.type == "cpu":
        return found
    if found.type != "cuda":
        raise LowbitError(
            f"several processes can share a run on CUDA GPUs or on the CPU, not on '{found.type}'. "
            "Use --device cpu, or one process."
        )
    if found.index is not None:
        raise LowbitError(
            f"--device {name} is one GPU for all processes: use --device cuda, which gives each "
            "its own."
        )
    if local >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise LowbitError(
            f"process {local + 1} on this machine has no GPU, there are {count}: give torchrun "
            f"--nproc-per-node {count}."
        )
    return torch.device("cuda", local)


def pick_device(name: str) -> torch.device:
    """ "auto" is the accelerator if there is one (with float64), else the CPU.

    Raises:
        LowbitError: no such device here.
    """
    if name == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return found if found and found.type != "mps" else torch.device("cpu")
    if name.startswith("mps"):
        raise LowbitError(
            "device 'mps' has no float64, which folding factors into 16-bit norms needs. Use "
            "--device cpu."
        )
    try:
        torch.zeros(1, device=name).item()  # "meta" makes tensors too, but without numbers
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:
        raise LowbitError(
            f"device '{name}' is not available here ({str(e).splitlines()[0]}). Use --device cpu "
            "or auto."
        ) from e
