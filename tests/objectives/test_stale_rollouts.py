"""Importance weights: completions of an older student, enumerated over what it would have drawn."""

import pytest
import torch

from opd_lightning.distributions import TokenDistribution
from opd_lightning.errors import ConfigError
from opd_lightning.objectives import OutcomeReward, PowerOPD, SampledTokenReverseKL
from opd_lightning.records import Rollout

V = 8
G = torch.Generator().manual_seed(3)
Z, OLD, T = (1.2 * torch.randn(3, V, generator=G, dtype=torch.float64)).unbind()


def expected_gradient(objective: SampledTokenReverseKL) -> torch.Tensor:
    """Mean over y drawn from the older student of the gradient on the present one's logits."""
    mu = OLD.softmax(0)
    leaf = Z.expand(V, V).clone().requires_grad_()
    rollout = Rollout.from_flat(torch.arange(V), torch.arange(V), sampling_logprobs=mu.log())
    teacher = TokenDistribution.from_logits(T.expand(V, V))
    output = objective(TokenDistribution.from_logits(leaf), teacher, rollout, mu)
    return torch.autograd.grad(output.loss, leaf)[0].sum(0)


def reverse_kl_gradient() -> torch.Tensor:
    p, ratio = Z.softmax(0), Z.log_softmax(0) - T.log_softmax(0)
    return p * (ratio - (p * ratio).sum())


@pytest.mark.parametrize("baseline", ["none", "kl"])
def test_weights_below_the_cap_restore_the_gradient(baseline: str):
    objective = SampledTokenReverseKL(importance_cap=1e3, baseline=baseline)
    torch.testing.assert_close(
        expected_gradient(objective), reverse_kl_gradient(), rtol=0, atol=1e-14
    )


def test_without_weights_and_where_the_cap_holds_it_is_biased():
    for objective in (SampledTokenReverseKL(), SampledTokenReverseKL(importance_cap=0.5)):
        assert (expected_gradient(objective) - reverse_kl_gradient()).abs().max() > 0.05


def test_effective_sample_size_by_hand():
    cap = 1.5
    rollout = Rollout.from_flat(
        torch.arange(V), torch.arange(V), sampling_logprobs=OLD.log_softmax(0)
    )
    loss = SampledTokenReverseKL(importance_cap=cap).token_loss(
        TokenDistribution.from_logits(Z.expand(V, V)),
        TokenDistribution.from_logits(T.expand(V, V)),
        rollout,
    )
    w = [min(cap, float(a / b)) for a, b in zip(Z.softmax(0), OLD.softmax(0), strict=True)]
    assert max(w) == cap > min(w)
    means = {key: float(value.mean()) for key, value in loss.metrics.items()}
    finished = SampledTokenReverseKL(importance_cap=cap).finish_metrics(means)
    assert finished["importance/weight"] == pytest.approx(sum(w) / V)
    assert finished["importance/ess"] == pytest.approx(sum(w) ** 2 / sum(x * x for x in w) / V)
    assert "importance/weight_squared" not in finished
    assert 0 < finished["importance/ess"] < 1


def test_finish_metrics_leaves_other_keys_alone():
    means = {"advantage/mean": -1.0}
    assert SampledTokenReverseKL().finish_metrics(means) == means


@pytest.mark.parametrize(("objective", "message"), [
    (SampledTokenReverseKL(importance_cap=2.0), r"importance_cap=2\.0 needs .*sampling_logprobs"),
    (PowerOPD(importance_cap=2.0), r"importance_cap=2\.0 needs"),
    (OutcomeReward(), r"OutcomeReward needs the reward .*\(reward: None\)"),
])  # fmt: skip
def test_a_rollout_that_lacks_what_is_needed_is_refused(objective, message: str):  # noqa: ANN001
    student = TokenDistribution.from_logits(Z.expand(V, V))
    rollout = Rollout.from_flat(torch.arange(V), torch.arange(V))
    with pytest.raises(ConfigError, match=message):
        objective(student, student, rollout, torch.ones(V))
