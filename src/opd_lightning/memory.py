"""How many tokens a micro-batch may have within a memory limit: measured on a few and extrapolated.

Memory is that of one process, all in: on a CPU what it holds resident, on a GPU what it allocated.
"""

import ctypes
import gc
import math
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from opd_lightning.errors import ConfigError
from opd_lightning.records import Rollout

_GB = 10**9
# Of what the limit leaves beside weights, gradients and optimiser: allocators do not give back
# every hole, and later rows leave other holes than the measured ones.
_MARGIN = 0.15
# Shares of the memory that is free (CPU: other processes need some) or there (GPU: other libraries
# and holes) that are taken where no limit is given.
_CPU_SHARE, _GPU_SHARE = 0.5, 0.9
# A line through two measurements is trusted up to this multiple of the larger one.
_TRUSTED = 4


def largest_budget(
    peak_of: Callable[[int, int], int],
    longest: int,
    limit: int,
    later: int = 0,
    most_rows: int | None = None,
) -> int:
    """Return the most tokens of a micro-batch whose peak stays within `limit`.

    The peak is taken as a + b * tokens; b is fitted to measurements that grow from a quarter of one
    row to a quarter of the answer, each within the limit by the line before it.

    Args:
        peak_of: Runs rows x tokens and returns the peak in bytes; the same on all ranks.
        longest: Tokens of the longest row that can come; at least one has to fit.
        limit: Bytes.
        later: Bytes that are not there yet when `peak_of` measures, such as the optimiser's state.
        most_rows: Rows of an update, which is all that is needed; None: not known.

    Raises:
        ConfigError: If one row of `longest` tokens does not fit.
    """
    quarter, half = math.ceil(longest / 4), math.ceil(longest / 2)
    peak_of(1, quarter)  # the first run loads kernels and fills pools
    points = [(quarter, peak_of(1, quarter)), (half, peak_of(1, half))]
    while True:
        (fewer, low), (tokens, high) = points
        slope = max((high - low) / max(tokens - fewer, 1), 1e-3)
        fixed = high - slope * tokens + later
        fit = (1 - _MARGIN) * (limit - fixed) / slope
        if fit < longest:
            raise ConfigError(
                f"micro_batch_tokens: auto: one row of {longest} tokens needs about "
                f"{(fixed + slope * longest / (1 - _MARGIN)) / _GB:.2f} GB ({fixed / _GB:.2f} GB "
                f"for weights, gradients, optimiser and the rest, {slope / 1e6:.3f} MB a token), "
                f"but memory_limit_gb is {limit / _GB:.2f}. Raise it, shorten prompts or "
                "completions, or set student.gradient_checkpointing."
            )
        if most_rows is not None:
            fit = min(fit, longest * most_rows)
        if tokens >= longest and fit <= _TRUSTED * tokens:
            return int(fit)
        rows = min(int(fit / _TRUSTED), 8 * tokens) // longest
        rows = max(rows, 1 if tokens < longest else tokens // longest + 1)
        points = [points[-1], (rows * longest, peak_of(rows, longest))]


def full_rows(rows: int, length: int, vocab_size: int, device: torch.device) -> Rollout:
    """Return rows of a one-token prompt and a completion up to `length`, with all log-probs."""
    ids = (torch.arange(rows * length, device=device) % vocab_size).view(rows, length)
    completion = torch.ones_like(ids, dtype=torch.bool)
    completion[:, 0] = False
    logprobs = torch.full(ids.shape, -1.0, device=device)
    return Rollout(
        ids,
        torch.ones_like(ids),
        completion,
        sampling_logprobs=logprobs,
        old_logprobs=logprobs,
        reward=torch.zeros(rows, device=device),
    )


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """Call `run` and return the most memory that was held at once meanwhile, in bytes.

    Raises:
        ConfigError: If the system cannot say (neither a GPU of CUDA's nor Linux).
    """
    _give_back(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    _check_linux(device)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    run()
    return _status("/proc/self/status", "VmHWM")


def memory_limit(device: torch.device, limit_gb: float | None, processes: int = 1) -> int:
    """Return the limit of one process in bytes: the one given, or a share of the device's memory.

    Args:
        device: A GPU: 90 % of its memory. Else what is held, and half of what is free.
        limit_gb: In 10^9 bytes; None: from the device.
        processes: Processes that share the machine's free memory.

    Raises:
        ConfigError: If no limit is given and the system cannot say.
    """
    if limit_gb is not None:
        return int(limit_gb * _GB)
    if device.type == "cuda":
        return int(_GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
    _check_linux(device)
    free = _status("/proc/meminfo", "MemAvailable")
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # a container or a job may have less; "max": it has not
        most = int((group / "memory.max").read_text())
        free = min(free, most - int((group / "memory.current").read_text()))
    return _status("/proc/self/status", "VmRSS") + int(_CPU_SHARE * free / processes)


def optimizer_bytes(
    factory: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    parameters: Iterable[nn.Parameter],
) -> int:
    """Return the bytes of state that the optimiser will hold on this rank, from one small step."""
    probe = nn.Parameter(torch.zeros(64, 64))
    probe.grad = torch.zeros_like(probe)
    optimizer = factory([probe])
    optimizer.step()
    state = [v for v in optimizer.state[probe].values() if isinstance(v, Tensor)]
    copies = sum(value.numel() for value in state) / probe.numel()
    return int(copies * parameter_bytes(parameters))


def parameter_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of these parameters on this rank."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    return sum(p.numel() * p.element_size() for p in local)


def _give_back(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def _check_linux(device: torch.device) -> None:
    if device.type != "cpu" or sys.platform != "linux":
        raise ConfigError(
            f"micro_batch_tokens: auto cannot measure memory of {device.type!r} on {sys.platform}; "
            "CUDA, and the CPU under Linux, can. Give a number of tokens."
        )


def _status(file: str, name: str) -> int:
    """Return the bytes that a line `name:  123 kB` of a file under /proc says."""
    lines = Path(file).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024
