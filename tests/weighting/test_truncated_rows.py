"""TruncatedRowWeight: which rows it finds, and what it refuses."""

import pytest
import torch

from opd_lightning.errors import ConfigError
from opd_lightning.weighting import TruncatedRowWeight
from tests.weighting.cases import dense, rollout_of


@pytest.mark.parametrize("weight", [0, 0.25, 1.0])
def test_all_tokens_of_truncated_rows_weigh_the_same(weight: float):
    rollout = rollout_of([2, 0, 3, 1], truncated=[True, True, False, True])
    some = dense(6, 0)
    weights = TruncatedRowWeight(weight).weight(rollout, some, some)
    assert weights.tolist() == [weight, weight, 1, 1, 1, weight]


def test_by_default_truncated_rows_are_left_out_and_rows_are_not_truncated():
    rollout = rollout_of([2, 1], truncated=[False, True])
    some = dense(3, 0)
    assert TruncatedRowWeight().weight(rollout, some, some).tolist() == [1, 1, 0]
    assert TruncatedRowWeight().weight(rollout_of([2, 1]), some, some).tolist() == [1, 1, 1]


def test_it_follows_the_rows_of_a_micro_batch():
    rollout = rollout_of([2, 1, 3], truncated=[True, False, True])
    part = rollout.select_rows(torch.tensor([1, 2]))
    some = dense(4, 0)
    assert TruncatedRowWeight(0.5).weight(part, some, some).tolist() == [1, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_a_weight_out_of_range_is_refused(weight: float):
    with pytest.raises(
        ConfigError, match=rf"must lie within 0 and 1; got {weight}\. 0 leaves them out, 1 keeps"
    ):
        TruncatedRowWeight(weight)
