"""PositionWindow and PositionDecay against a walk along each row, and what they refuse."""

import pytest
import torch

from opd_lightning.errors import ConfigError
from opd_lightning.records import Rollout
from opd_lightning.weighting import PositionDecay, PositionWindow, TokenWeight
from tests.weighting.cases import LENGTHS, dense, rollout_of, rows_of, with_gap


def weigh(weight: TokenWeight, rollout: Rollout) -> list[float]:
    some = dense(rollout.num_tokens, 0)
    return weight.weight(rollout, some, some).tolist()


def positions(rollout: Rollout) -> list[int]:
    return [place for places in rows_of(rollout) for place in range(len(places))]


@pytest.mark.parametrize(("start", "end"), [(0, None), (0, 1), (2, None), (1, 3), (3, 4), (50, 90)])
@pytest.mark.parametrize("rows", LENGTHS)
def test_the_window_counts_from_the_first_completion_token(rows: str, start: int, end: int | None):
    rollout = rollout_of(LENGTHS[rows])
    last = 10**9 if end is None else end
    wanted = [1.0 if start <= place < last else 0.0 for place in positions(rollout)]
    assert weigh(PositionWindow(start, end), rollout) == wanted


def test_by_default_the_window_holds_every_token():
    assert weigh(PositionWindow(), rollout_of([3, 2])) == [1.0] * 5


@pytest.mark.parametrize("half_life", [0.5, 1, 7.5, 1000.0])
@pytest.mark.parametrize("rows", LENGTHS)
def test_the_decay_halves_every_half_life(rows: str, half_life: float):
    rollout = rollout_of(LENGTHS[rows])
    wanted = [2.0 ** (-place / half_life) for place in positions(rollout)]
    assert weigh(PositionDecay(half_life), rollout) == pytest.approx(wanted, rel=1e-6)


def test_the_decay_reaches_zero_and_no_nan_far_out():
    weights = weigh(PositionDecay(0.001), rollout_of([300]))
    assert weights[0] == 1.0 and weights[1:] == [0.0] * 299


def test_tokens_of_another_speaker_take_no_position():
    rollout = with_gap()
    assert weigh(PositionWindow(2, 4), rollout) == [0, 0, 1, 1, 0, 0, 0, 1]
    assert weigh(PositionDecay(1), rollout) == [1, 0.5, 0.25, 0.125, 0.0625, 1, 0.5, 0.25]


@pytest.mark.parametrize(("start", "end"), [
    (-1, None), (3, 3), (4, 2), (0, 0), (0, -5), (0.5, None), (0, 0.5),
])  # fmt: skip
def test_a_window_that_is_empty_or_no_number_of_tokens_is_refused(start: float, end: float | None):
    with pytest.raises(
        ConfigError, match=rf"0 <= start < end; got start={start}, end={end}\. Leave end out"
    ):
        PositionWindow(start, end)


@pytest.mark.parametrize("half_life", [0, -2.0, float("inf"), float("nan")])
def test_a_half_life_not_above_zero_is_refused(half_life: float):
    with pytest.raises(
        ConfigError, match=rf"half_life must be .* above 0; got {half_life}\. .*leave PositionDecay"
    ):
        PositionDecay(half_life)


def test_the_default_float_dtype_is_followed():
    rollout = rollout_of([2])
    torch.set_default_dtype(torch.float64)
    try:
        some = dense(2, 0)
        for weight in (PositionWindow(), PositionDecay(3.0)):
            assert weight.weight(rollout, some, some).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
