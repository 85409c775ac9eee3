"""The largest micro-batch within a limit: the search on known memories, and the measures."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from opd_lightning import memory
from opd_lightning.errors import ConfigError
from opd_lightning.memory import full_rows, largest_budget, memory_limit, optimizer_bytes

CPU = torch.device("cpu")
GB = 10**9


class Device:
    """A memory that is `fixed` and so much a token, and a square in the row's length."""

    def __init__(self, limit: int, fixed: int, token: int, square: int = 0, later: int = 0) -> None:
        self.limit, self.fixed, self.token, self.square = limit, fixed, token, square
        self.later = later
        self.runs: list[tuple[int, int]] = []

    def peak(self, rows: int, length: int) -> int:
        self.runs.append((rows, length))
        peak = self.fixed + rows * (length * self.token + length**2 * self.square)
        assert peak <= self.limit, f"crashed with {rows} x {length}"
        return peak

    def most(self, longest: int) -> float:
        return (self.limit - self.fixed - self.later) / (self.token + longest * self.square)


@pytest.mark.parametrize("square", [0, 300])
@pytest.mark.parametrize("longest", [7, 130, 1024])
@pytest.mark.parametrize("limit", [4 * GB, 40 * GB, 400 * GB])
def test_most_of_what_fits_and_never_more(limit: int, longest: int, square: int):
    device = Device(limit, GB, 10**6, square, later=GB // 2)
    budget = largest_budget(device.peak, longest, limit, device.later)
    assert 0.5 * device.most(longest) <= budget <= device.most(longest)
    assert budget >= longest
    # measured without a crash, and without as much work as the budget is
    assert max(rows * length for rows, length in device.runs) <= max(budget / 3, longest)
    assert len(device.runs) < 12


def test_a_row_that_does_not_fit_is_refused_before_it_runs():
    device = Device(3 * GB, 2 * GB, 10**6)
    with pytest.raises(ConfigError) as error:
        largest_budget(device.peak, 1000, 3 * GB)
    for part in ("one row of 1000 tokens", "3.18 GB", "2.00 GB for weights", "1.000 MB a token",
                 "memory_limit_gb is 3.00", "Raise it"):  # fmt: skip
        assert part in str(error.value)
    assert max(rows * length for rows, length in device.runs) == 500
    assert largest_budget(device.peak, 800, 3 * GB) >= 800
    with pytest.raises(ConfigError, match=r"1\.50 GB"):
        largest_budget(Device(2 * GB, GB, 1).peak, 100, GB, later=GB // 2)


def test_more_rows_than_an_update_has_are_not_looked_for():
    device = Device(400 * GB, GB, 10**6)
    assert largest_budget(device.peak, 100, 400 * GB, most_rows=12) == 1200
    assert max(rows for rows, _ in device.runs) <= 3


def test_memory_that_does_not_grow_needs_the_rows_of_an_update():
    device = Device(2 * GB, GB, 0)
    assert largest_budget(device.peak, 8, 2 * GB, most_rows=64) == 512


def test_the_peak_is_that_of_the_call_alone():
    def hold(megabytes: int) -> None:
        torch.ones(megabytes * 2**18)  # float32

    memory.peak_bytes(CPU, lambda: hold(1))
    small, large, again = (memory.peak_bytes(CPU, partial(hold, m)) for m in (20, 120, 20))
    assert large - small == pytest.approx(100 * 2**20, rel=0.05)
    assert abs(again - small) < 5 * 2**20, "an earlier peak is forgotten"


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [
        (partial(torch.optim.AdamW, lr=1e-3), 2),
        (partial(torch.optim.SGD, lr=1e-3), 0),
        (partial(torch.optim.SGD, lr=1e-3, momentum=0.9), 1),
    ],
)
def test_the_optimizers_state_is_known_beforehand(optimizer: partial, copies: int):
    model = nn.Linear(50, 40).double()
    expected = copies * 8 * (50 * 40 + 40)
    assert optimizer_bytes(optimizer, model.parameters()) == pytest.approx(expected, rel=1e-3)


def test_rows_are_as_full_as_rows_can_be():
    rollout = full_rows(3, 5, 7, CPU)
    assert rollout.input_ids.shape == (3, 5)
    assert int(rollout.input_ids.max()) < 7
    assert rollout.attention_mask.all()
    assert rollout.num_tokens == 12
    assert len(rollout.flat_sampling_logprobs) == len(rollout.flat_old_logprobs) == 12


def test_the_limit_is_the_one_given_or_half_of_what_is_free():
    assert memory_limit(CPU, 1.5) == 1_500_000_000
    held = memory._status("/proc/self/status", "VmRSS")
    alone, shared = memory_limit(CPU, None), memory_limit(CPU, None, processes=4)
    assert alone > shared > held * 0.9
    assert math.isclose(alone - held, 4 * (shared - held), rel_tol=0.1)


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_a_device_that_cannot_be_measured_is_refused(device: str):
    for call in (partial(memory_limit, limit_gb=None), partial(memory.peak_bytes, run=print)):
        with pytest.raises(ConfigError, match=f"'{device}'.*Give a number of tokens"):
            call(torch.device(device))
