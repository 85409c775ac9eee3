"""StepClock on a clock of its own."""

import time

import pytest
import torch

from opd_lightning.metrics import StepClock


def test_laps_add_up_and_taking_starts_anew(monkeypatch: pytest.MonkeyPatch):
    times = iter([10.0, 11.0, 13.5, 14.0, 20.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = StepClock(torch.device("cpu"))
    clock.add("rollout", 7.0)
    clock.lap("teacher")
    clock.lap("student")
    clock.lap("teacher")
    assert clock.take() == {"rollout": 7.0, "teacher": 1.5, "student": 2.5}
    assert clock.take() == {}
    clock.lap("student")
    assert clock.take() == {"student": 6.0}, "time since the last lap, none is lost"


def test_it_measures_real_time():
    clock = StepClock(torch.device("cpu"))
    time.sleep(0.02)
    clock.lap("sleep")
    assert 0.02 <= clock.take()["sleep"] < 1.0
