"""The first look at a file from elsewhere: in another process, with bounds on all that it takes.

Nothing in this process parses the file before that. Malformed models have crashed ONNX Runtime,
and a small one may ask for all memory or never end: then that process dies, and this one says so.
What the look does not bound is what larger batches take later: the model has then shown that it
behaves at batches of 1, 2 and 7.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from deploykit.errors import ModelError
from deploykit.foreign.border import Border
from deploykit.runtime import printable

MAX_BYTES = 2**31 - 1  # of one protobuf message
MAX_TOLD = 600  # letters of what the process says
_PROGRAM = "from deploykit.foreign.checks import answer; answer()"


@dataclass(frozen=True)
class Limits:
    """What the process may take.

    Attributes:
        memory_bytes: address space beyond what Python and ONNX Runtime hold before they read the
            file, and beyond eight times its size.
        cpu_seconds: of all its threads.
        wall_seconds: from start to end.
    """

    memory_bytes: int = 4 * 2**30
    cpu_seconds: int = 120
    wall_seconds: float = 180.0


def read_model(path: Path) -> bytes:
    """Return the bytes of an ONNX file, unread.

    Raises:
        ModelError: there is no such plain file, or it is too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would block
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ModelError(f"{path}: expected an ONNX file, got something else")
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path}: expected an ONNX file, got {reason}") from error
    if len(data) > MAX_BYTES:
        raise ModelError(f"{path}: expected at most {MAX_BYTES} bytes, got more")
    return data


def examine(
    data: bytes,
    where: str,
    *,
    sample_shape: tuple[int, ...] | None = None,
    limits: Limits | None = None,
) -> Border:
    """Check a file and let it answer, in a process with limits.

    Args:
        data: the file's bytes; the process gets a copy of these, wherever they came from.
        where: the file, for messages.
        sample_shape: of one sample as the model takes it, where the file leaves sizes open;
            without it such a file is not run.
        limits: of the process.

    Returns:
        The model's border; of a model that ran without open sizes.

    Raises:
        ModelError: the file cannot be used, or takes more than it may.
    """
    limits = limits or Limits()
    with TemporaryDirectory(prefix="deploykit-") as folder:
        copy = Path(folder) / "model.onnx"
        copy.write_bytes(data)
        order = {
            "path": str(copy),
            "sample_shape": sample_shape,
            "memory_bytes": limits.memory_bytes + 8 * len(data),
            "cpu_seconds": limits.cpu_seconds,
        }
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", _PROGRAM, json.dumps(order)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=limits.wall_seconds,
                start_new_session=True,  # Ctrl-C is for the caller
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ModelError(
                f"{where}: expected a model that opens and answers within "
                f"{limits.wall_seconds:g} s, got no answer; it may hold an endless loop"
            ) from error
    if done.returncode:
        raise ModelError(
            f"{where}: expected a model that opens and answers, got {_death(done, limits)}"
        )
    found = json.loads(done.stdout)
    if "refused" in found:
        raise ModelError(f"{where}: {printable(found['refused'][:MAX_TOLD])}")
    return Border.from_json(found)


def _death(done: subprocess.CompletedProcess[bytes], limits: Limits) -> str:
    """Say of what the process died."""
    if done.returncode == -signal.SIGXCPU:
        return f"none within {limits.cpu_seconds} s of computing; it may hold an endless loop"
    if done.returncode < 0:
        number = -done.returncode
        named = next((one.name for one in signal.Signals if one == number), f"signal {number}")
        return f"one that brings its process down ({named}), or takes more memory than it may"
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else f"exit code {done.returncode}"
    return f"one that brings its process down ({printable(last[:MAX_TOLD])})"
