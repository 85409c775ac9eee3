"""A process that compares answers for this one, and dies of hostile ones in its stead."""

import json
import os
import selectors
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from opd_lightning.errors import RunError

_PROGRAM = Path(__file__).with_name("math_program.py")
# Imports sympy: 1-2 s of processor time, many times that on a busy machine.
_START_SECONDS = 300.0
# The worker limits its processor time itself; the clock is for one that sleeps or was stopped.
_CLOCK_FACTOR, _CLOCK_SECONDS = 20.0, 60.0
_SLICE_SECONDS = 0.5


class MathWorker:
    """Asks `math_program.py`, started when first needed, and anew after an answer that killed it.

    Usable from any thread, and after a fork: each process gets a worker of its own. The worker ends
    with the process that started it.

    Args:
        timeout_seconds: Processor time of one comparison.
        memory_mb: Address space of the worker, 2^20 bytes each.
    """

    def __init__(self, timeout_seconds: float, memory_mb: int) -> None:
        self.timeout_seconds = timeout_seconds
        self.memory_mb = memory_mb
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._pid_of_owner = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"timeout_seconds": self.timeout_seconds, "memory_mb": self.memory_mb}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def equal(self, wanted: str, said: str) -> bool:
        """Return whether two LaTeX expressions are equal; False where a limit was exceeded.

        Raises:
            RunError: If the worker cannot be started.
        """
        if self._pid_of_owner != os.getpid():
            self._reset()  # a fork: the other process talks with that worker
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            try:
                self._process.stdin.write(json.dumps([wanted, said]).encode() + b"\n")
                self._process.stdin.flush()
                line = self._line(_CLOCK_FACTOR * self.timeout_seconds + _CLOCK_SECONDS)
            except OSError:
                line = b""
            if not line:
                self.close()
            return line == b"1\n"

    def close(self) -> None:
        """End the worker; the next question starts another."""
        if self._process is not None:
            self._end()
            self._process = None

    def _start(self) -> None:
        self.close()
        # -P: the files beside the program are no modules of its; -B: it writes nothing
        command = [sys.executable, "-P", "-B", str(_PROGRAM)]
        limits = [str(self.timeout_seconds), str(self.memory_mb)]
        self._process = subprocess.Popen(
            [*command, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._end = weakref.finalize(self, _end, self._process, os.getpid())
        if self._line(_START_SECONDS) != b"ready\n":
            self.close()
            raise RunError(
                f"the process that checks answers ({' '.join(command)}) did not start. Check that "
                f"`import math_verify` works there, and that {self.memory_mb} MB (memory_mb) are "
                "enough for it."
            )

    def _line(self, seconds: float) -> bytes:
        """Return the worker's next line; empty where it ended or did not answer in time."""
        # waited for in slices: where both processes were stopped for a while, that counts as one
        slices, line = int(seconds / _SLICE_SECONDS) + 1, b""
        output = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if selector.select(_SLICE_SECONDS):
                    if not (part := os.read(output, 4096)):
                        return b""
                    line += part
                elif (slices := slices - 1) == 0:
                    return b""
        return line


def _end(process: subprocess.Popen, owner: int) -> None:
    if os.getpid() == owner:  # and not a fork of it
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
