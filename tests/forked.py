"""Readers forked from a process that has torch and transformers loaded: a reader of its own each
time, without seconds of imports.

The process that is forked never imports lowbit, so what a reader finds loaded is what it would find
when started anew.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PRELOADED = [
    "torch",
    "safetensors.torch",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "compressed_tensors",
    "transformers.quantizers.auto",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)


def run(
    command: Sequence[str], *, input: bytes, env: Mapping[str, str], **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """As `subprocess.run` with its output captured; forked where the command is a script under this
    interpreter.
    """
    program, script, *arguments = command
    if program != sys.executable:
        return subprocess.run(command, input=input, env=dict(env), **options)
    with tempfile.TemporaryDirectory() as scratch:
        streams = [Path(scratch, n) for n in ("in", "out", "err")]
        streams[0].write_bytes(input)
        process = _context.Process(
            target=_be, args=(script, arguments, dict(env), [str(s) for s in streams])
        )
        process.start()
        process.join()
        assert process.exitcode is not None
        out, err = (s.read_bytes() if s.exists() else b"" for s in streams[1:])
        return subprocess.CompletedProcess(command, process.exitcode, out, err)


def _be(script: str, arguments: list[str], env: dict[str, str], streams: list[str]) -> None:
    for number, (name, mode) in enumerate(
        zip(streams, (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT), strict=True)
    ):
        os.dup2(os.open(name, mode), number)
    opened = [os.fdopen(n, "r" if n == 0 else "w", closefd=False) for n in range(3)]
    sys.stdin, sys.stdout, sys.stderr = opened
    os.environ.clear()
    os.environ.update(env)
    for path in reversed([p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]):
        sys.path.insert(0, path)
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
