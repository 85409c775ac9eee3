"""AgreementSoFar against a walk along each row, gaps that are not finite, what it refuses."""

import math

import pytest
import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from opd_lightning.errors import ConfigError
from opd_lightning.records import Rollout
from opd_lightning.weighting import AgreementSoFar
from tests.weighting.cases import LENGTHS, dense, logits, rollout_of, rows_of, served, with_gap


def sampled(z: Tensor, rollout: Rollout) -> list[float]:
    logprobs = torch.log(z.exp() / z.exp().sum(1, keepdim=True))
    return [float(row[y]) for row, y in zip(logprobs, rollout.token_ids.tolist(), strict=True)]


def loop(gaps: list[float], rollout: Rollout, rate: float) -> Tensor:
    weights = [0.0] * len(gaps)
    for places in rows_of(rollout):
        for t, n in enumerate(places):
            earlier = [gaps[u] for u in places[:t] if not math.isnan(gaps[u])]
            weights[n] = math.exp(-rate * sum(earlier) / len(earlier)) if earlier else 1.0
    return torch.tensor(weights, dtype=torch.float64)


def gaps_of(z: Tensor, t: Tensor, rollout: Rollout) -> list[float]:
    pairs = zip(sampled(t, rollout), sampled(z, rollout), strict=True)
    return [abs(q - p) for q, p in pairs]


@pytest.mark.parametrize("rate", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("rows", [*LENGTHS, "gap"])
def test_equals_the_loop(rows: str, rate: float):
    rollout = with_gap() if rows == "gap" else rollout_of(LENGTHS[rows])
    z, t = logits(rollout.num_tokens, 0), logits(rollout.num_tokens, 1)
    wanted = loop(gaps_of(z, t, rollout), rollout, rate)
    for teacher in (TokenDistribution.from_logits(t), served(t, rollout)):
        weights = AgreementSoFar(rate).weight(rollout, TokenDistribution.from_logits(z), teacher)
        torch.testing.assert_close(weights, wanted)


def test_a_teacher_that_agrees_keeps_every_weight_at_one():
    rollout = rollout_of([5, 2])
    student = dense(7, 0)
    assert AgreementSoFar().weight(rollout, student, student).tolist() == [1.0] * 7


def test_after_a_token_that_the_teacher_rules_out_the_row_weighs_nothing():
    rollout = rollout_of([4, 3])
    z, t = logits(7, 0), logits(7, 1)
    t[1, rollout.token_ids[1]] = -torch.inf
    weights = AgreementSoFar().weight(
        rollout, TokenDistribution.from_logits(z), TokenDistribution.from_logits(t)
    )
    wanted = loop(gaps_of(z, t, rollout), rollout, 1.0)
    assert weights[2:4].tolist() == [0.0, 0.0] and (weights[4:] > 0).all()
    torch.testing.assert_close(weights, wanted)


def test_an_unknown_gap_is_left_out_of_the_mean():
    rollout = rollout_of([5, 3])
    z, t = logits(8, 0), logits(8, 1)
    t[0] = t[2] = t[6] = torch.nan
    weights = AgreementSoFar().weight(
        rollout, TokenDistribution.from_logits(z), TokenDistribution.from_logits(t)
    )
    wanted = loop(gaps_of(z, t, rollout), rollout, 1.0)
    assert weights[:2].tolist() == [1.0, 1.0], "nothing known before them"
    assert weights[2] == weights[3] < 1, "the gap between them is not known"
    torch.testing.assert_close(weights, wanted)


def test_a_gap_without_limit_and_an_unknown_one_in_a_row():
    rollout = rollout_of([4])
    z, t = logits(4, 0), logits(4, 1)
    t[0] = torch.nan
    t[1, rollout.token_ids[1]] = -torch.inf
    weights = AgreementSoFar(0.001).weight(
        rollout, TokenDistribution.from_logits(z), TokenDistribution.from_logits(t)
    )
    assert weights.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_it_shares_the_logsumexp_that_the_objective_will_read():
    rollout = rollout_of([3, 2])
    calls = []
    hidden, head = logits(5, 0).requires_grad_(), logits(9, 2)
    student = TokenDistribution.from_hidden(hidden, head)
    read = student.read
    student.read = lambda *args: calls.append(args) or read(*args)
    AgreementSoFar().weight(rollout, student, TokenDistribution.from_logits(logits(5, 1)))
    student.logprobs(rollout.token_ids).sum().backward()
    assert len(calls) == 1 and hidden.grad.abs().max() > 0


@pytest.mark.parametrize("rate", [0, -1.0, float("nan")])
def test_a_rate_not_above_zero_is_refused(rate: float):
    with pytest.raises(
        ConfigError, match=rf"rate must be above 0; got {rate}\. .*leave AgreementSoFar out"
    ):
        AgreementSoFar(rate)
