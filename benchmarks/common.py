"""What all benchmarks share: a case in a process of its own, peak memory, ratios of pairs, tables.

A case is a function that takes JSON values and returns JSON values. `run_case` starts it in a fresh
process, so that its peak memory is its own; `interleave` runs several cases in turn, so that what
else the machine does hits all of them alike.
"""

import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

import torch

ROOT = Path(__file__).parents[1]
MIB = 2**20

# glibc keeps freed blocks up to a moving limit for itself; with a fixed limit they go back to the
# system, and the resident size is what is in use
EXACT_MEMORY = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(64 * 1024))


class BenchmarkError(Exception):
    """A case failed, or two sides that must agree do not."""


# ----------------------------------------------------------------------------------- processes


def run_case(
    function: Callable[..., dict[str, Any]], exact_memory: bool = True, **arguments: Any
) -> dict[str, Any]:
    """Return `function(**arguments)`, computed in a fresh process.

    Args:
        function: Of a module under `benchmarks`, at its top level; returns JSON values.
        exact_memory: Let freed memory go back to the system at once. It makes allocations much
            slower, so time is measured without it.
        arguments: JSON values.

    Raises:
        BenchmarkError: If the process fails, with the end of what it wrote.
    """
    name = f"{_module_name(function)}:{function.__name__}"
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.common", name, json.dumps(arguments), answer]
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=os.environ | (EXACT_MEMORY if exact_memory else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not answer.is_file():
            raise BenchmarkError(
                f"{name} with {arguments} ended with code {done.returncode}:\n{done.stdout[-3000:]}"
            )
        return json.loads(answer.read_text())


def _module_name(function: Callable[..., Any]) -> str:
    """Return the name under which a new process imports the function's module."""
    if function.__module__ != "__main__":
        return function.__module__
    return f"benchmarks.{Path(sys.modules['__main__'].__file__).stem}"


def _answer(name: str, arguments: str, answer: str) -> None:
    module, function = name.split(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    Path(answer).write_text(json.dumps(result))


# ------------------------------------------------------------------------------ time and memory


class PeakMemory:
    """Largest memory in use between entry and exit, in bytes above that at entry.

    On a GPU: what torch has allocated. Otherwise the resident size of the process: the kernel's own
    high-water mark where it can be reset (Linux), else sampled every millisecond.

    Attributes:
        baseline_bytes: In use at entry.
        peak_bytes: Above the baseline; 0 or more.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self.baseline_bytes = self.peak_bytes = 0
        self._sampler: _Sampler | None = None

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self.baseline_bytes = torch.cuda.memory_allocated(self._device)
        else:
            if not _reset_high_water_mark():
                self._sampler = _Sampler()
                self._sampler.start()
            self.baseline_bytes = resident_bytes()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.peak_bytes = max(0, self.highest_bytes() - self.baseline_bytes)
        if self._sampler is not None:
            self._sampler.stop()

    def highest_bytes(self) -> int:
        """Return the largest memory in use since entry, not above anything."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device)
        return _status_bytes("VmHWM") if self._sampler is None else self._sampler.highest


class _Sampler(threading.Thread):
    """Keeps the largest resident size it has seen."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = resident_bytes()
        self._halt = threading.Event()

    def run(self) -> None:
        while not self._halt.wait(0.001):
            self.highest = max(self.highest, resident_bytes())

    def stop(self) -> None:
        self._halt.set()
        self.join()


def resident_bytes() -> int:
    """Return the resident size of this process."""
    if Path("/proc/self/status").exists():
        return _status_bytes("VmRSS")
    # the largest so far, all that the standard library says elsewhere; kibibytes but on macOS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    # some sandboxes take the request and do nothing
    return _status_bytes("VmHWM") - _status_bytes("VmRSS") < 16 * MIB


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(
    work: Callable[[], Any], repeats: int = 1, warm_up: int = 0, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Run `work` and return its median `seconds`, and `peak_bytes` above what was there before.

    The memory is that of all runs together, warm-up included.
    """
    device, seconds = torch.device(device), []
    with PeakMemory(device) as memory:
        for i in range(warm_up + repeats):
            started = now(device)
            work()
            if i >= warm_up:
                seconds.append(now(device) - started)
    return {"seconds": median(seconds), "peak_bytes": memory.peak_bytes}


def now(device: torch.device | str = "cpu") -> float:
    """Return the time in seconds, when what was queued on a GPU is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleave(
    cases: dict[str, Callable[[], dict[str, Any]]], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Run all cases in turn, `rounds` times, and return the results of each in that order.

    Every other round goes backwards, so that no case always follows the same one.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for i in range(rounds):
        for name in list(cases) if i % 2 == 0 else reversed(cases):
            results[name].append(cases[name]())
    return results


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Return the median over pairs of theirs / ours, pair i being the two values of round i.

    Raises:
        ValueError: If there are not as many of one as of the other.
    """
    return median(a / b for a, b in zip(theirs, ours, strict=True))


# ------------------------------------------------------------------------------ where it was run


def device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def versions() -> dict[str, str]:
    """Return the versions of what is measured and compared with."""
    names = ("torch", "transformers", "lightning", "trl", "liger-kernel", "opd-lightning")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Return processor, cores, threads, memory and GPU; nothing that names the machine."""
    described = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ------------------------------------------------------------------------------------ results


def settings(result: dict[str, Any]) -> dict[str, Any]:
    """Return `result` with versions and machine added."""
    return {"machine": machine(), "versions": versions()} | result


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; floats get three significant digits, numbers stand on the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    right = [
        bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        for i in range(len(header))
    ]
    lines = [header, ["---:" if flag else "---" for flag in right], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def mib(size: float) -> float:
    """Return bytes as MiB."""
    return size / MIB


if __name__ == "__main__":
    _answer(*sys.argv[1:])
