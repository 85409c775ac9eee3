"""EntropyTopRatio against a loop over rows that sorts, ties, NaN, and what it refuses."""

import math

import pytest
import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from opd_lightning.errors import ConfigError
from opd_lightning.records import Rollout
from opd_lightning.weighting import EntropyTopRatio
from tests.weighting.cases import LENGTHS, dense, logits, rollout_of, rows_of, served, with_gap

RATIOS = [0.01, 0.2, 0.3, 0.5, 0.99, 1.0]


def loop(z: Tensor, rollout: Rollout, ratio: float) -> list[float]:
    p = z.softmax(1)
    entropy = [-sum(x * math.log(x) for x in row if x > 0) for row in p.tolist()]
    weights = [0.0] * len(entropy)
    for places in rows_of(rollout):
        count = max(1, math.floor(ratio * len(places)))
        for n in sorted(places, key=lambda n: -entropy[n])[:count]:
            weights[n] = 1.0
    return weights


@pytest.mark.parametrize("of", ["student", "teacher"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("rows", LENGTHS)
def test_equals_the_loop(rows: str, ratio: float, of: str):
    rollout = rollout_of(LENGTHS[rows])
    n = rollout.num_tokens
    z = logits(n, 0)
    models = [TokenDistribution.from_logits(z), dense(n, 1)]
    models = models if of == "student" else models[::-1]
    weights = EntropyTopRatio(ratio, of).weight(rollout, *models)
    assert weights.tolist() == loop(z, rollout, ratio)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_row_of_two_spans_is_one_row(ratio: float):
    rollout = with_gap()
    z = logits(rollout.num_tokens, 0)
    student = TokenDistribution.from_logits(z)
    weights = EntropyTopRatio(ratio).weight(rollout, student, student)
    assert weights.tolist() == loop(z, rollout, ratio)


@pytest.mark.parametrize("length", [90, 100, 300])
@pytest.mark.parametrize("ratio", [0.7, 0.29, 0.21])
def test_the_count_is_that_of_float64(length: int, ratio: float):
    rollout = rollout_of([length])
    student = dense(length, 0, torch.float32)
    weights = EntropyTopRatio(ratio).weight(rollout, student, student)
    assert weights.sum() == math.floor(ratio * length)


def test_ties_at_the_threshold_all_count():
    rollout = rollout_of([5, 2])
    z = torch.zeros(7, 4, dtype=torch.float64)
    for n, peak in enumerate([3.0, 1.0, 1.0, 5.0, 1.0, 2.0, 2.0]):
        z[n, 0] = peak  # the higher, the lower the entropy
    student = TokenDistribution.from_logits(z)
    weights = EntropyTopRatio(0.5).weight(rollout, student, student)
    assert weights.tolist() == [0, 1, 1, 0, 1, 1, 1]


def test_a_nan_counts_as_the_highest_entropy():
    rollout = rollout_of([4, 2])
    z = logits(6, 0)
    z[2] = torch.nan
    student = TokenDistribution.from_logits(z)
    weights = EntropyTopRatio(0.5).weight(rollout, student, student)
    finite = loop(z[[0, 1, 3]], rollout_of([3]), 0.34)
    assert weights[:4].tolist() == [*finite[:2], 1.0, finite[2]]
    assert weights[4:].tolist() == loop(z[4:], rollout_of([2]), 0.5)


def test_nothing_is_kept_for_a_backward_pass():
    rollout = rollout_of([4, 2])
    student = TokenDistribution.from_logits(logits(6, 0).requires_grad_())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        EntropyTopRatio().weight(rollout, student, student)
        assert not saved
        student.entropy()
        assert saved, "the hook sees what a read with a gradient keeps"


def test_impossible_tokens_of_the_model_have_no_part_in_the_entropy():
    rollout = rollout_of([4])
    z = logits(4, 0)
    z[:, 2:4] = -torch.inf
    student = TokenDistribution.from_logits(z)
    weights = EntropyTopRatio(0.5).weight(rollout, student, student)
    assert weights.tolist() == loop(z, rollout, 0.5)


def test_a_teacher_of_top_k_cannot_be_asked_for_its_entropy():
    rollout = rollout_of([3])
    teacher = served(logits(3, 1), rollout)
    with pytest.raises(
        ConfigError, match=r"of='teacher'.*whole vocabulary.*gives 'topk'.*of='student' or a local"
    ):
        EntropyTopRatio(of="teacher").weight(rollout, dense(3, 0), teacher)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, 20, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio: float):
    with pytest.raises(
        ConfigError, match=rf"ratio must be above 0 and at most 1; got {ratio}\. .*share"
    ):
        EntropyTopRatio(ratio)


def test_an_unknown_model_is_refused():
    with pytest.raises(ConfigError, match=r"of 'both' is not known\. Known: student, teacher"):
        EntropyTopRatio(of="both")
