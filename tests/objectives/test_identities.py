"""The identities of docs/mathematics.md that concern one position, by number; V = 12, float64.

E_y is enumerated: one row for each y, weighted by pi(y).
"""

import pytest
import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from opd_lightning.objectives import (
    EntropyAware,
    ForwardKL,
    HeadTailReverseKL,
    JensenShannon,
    Objective,
    PowerOPD,
    ReverseKL,
    SampledTokenReverseKL,
    TopKReverseKL,
)
from opd_lightning.records import Rollout

V = 12


def draw(seed: int) -> Tensor:
    return 1.5 * torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Z, T = draw(1), draw(2)
P, Q = Z.softmax(0), T.softmax(0)
LOG_RATIO = (P / Q).log()
KL = (P * LOG_RATIO).sum()
REVERSE_GRADIENT = P * (LOG_RATIO - KL)


def per_sample(objective: Objective, z: Tensor = Z, t: Tensor = T) -> tuple[Tensor, Tensor]:
    """Return the loss [V] and its gradient on the logits [V, V] for each sampled token y."""
    leaf = z.expand(V, V).clone().requires_grad_()
    rollout = Rollout.from_flat(torch.arange(V), torch.arange(V))
    teacher = TokenDistribution.from_logits(t.expand(V, V))
    ones = torch.ones(V, dtype=torch.float64)
    output = objective(TokenDistribution.from_logits(leaf), teacher, rollout, ones)
    return output.token_loss, torch.autograd.grad(output.loss, leaf)[0]


def in_expectation(objective: Objective, z: Tensor = Z, t: Tensor = T) -> tuple[Tensor, Tensor]:
    losses, gradients = per_sample(objective, z, t)
    p = z.softmax(0)
    return (p * losses).sum(), p @ gradients


def by_autograd(function, z: Tensor = Z) -> Tensor:  # noqa: ANN001
    leaf = z.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


def assert_equal(actual: Tensor, wanted: Tensor, atol: float = 1e-14) -> None:
    torch.testing.assert_close(actual, wanted, rtol=0, atol=atol)


def top_ids(x: Tensor, k: int) -> list[int]:
    return sorted(range(V), key=lambda v: -float(x[v]))[:k]


def test_01_reverse_kl_gradient():
    value, gradient = in_expectation(ReverseKL())
    assert_equal(value, KL)
    assert_equal(gradient, REVERSE_GRADIENT)


def test_02_forward_kl_gradient():
    value, gradient = in_expectation(ForwardKL())
    assert_equal(value, -(Q * LOG_RATIO).sum())
    assert_equal(gradient, P - Q)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_03_jensen_shannon_gradient(beta: float):
    m = beta * Q + (1 - beta) * P
    to_m = (P / m).log()
    gradient = in_expectation(JensenShannon(beta))[1]
    assert_equal(gradient, (1 - beta) * P * (to_m - (P * to_m).sum()))


def test_04_jensen_shannon_tends_to_forward_and_reverse_kl():
    forward, reverse = in_expectation(ForwardKL())[0], in_expectation(ReverseKL())[0]
    low, high = in_expectation(JensenShannon(1e-6))[0], in_expectation(JensenShannon(1 - 1e-6))[0]
    assert_equal(low / 1e-6, forward, atol=1e-4)
    assert_equal(high / 1e-6, reverse, atol=1e-4)
    assert abs(forward - reverse) > 0.01


def test_05_expected_sampled_token_gradient_is_the_reverse_kl_gradient():
    _, samples = per_sample(SampledTokenReverseKL())
    assert_equal(P @ samples, REVERSE_GRADIENT)
    assert (samples - REVERSE_GRADIENT).abs().max() > 0.1, "single samples differ from their mean"


def trace_of_covariance(samples: Tensor) -> float:
    mean = P @ samples
    return float((P * (samples - mean).square().sum(1)).sum())


@pytest.mark.parametrize("k", [None, 2, 4, V])
def test_06_a_baseline_keeps_the_mean_and_lowers_the_variance(k: int | None):
    plain = per_sample(SampledTokenReverseKL())[1]
    samples = per_sample(SampledTokenReverseKL(baseline="kl", baseline_k=k))[1]
    assert_equal(P @ samples, REVERSE_GRADIENT)
    assert trace_of_covariance(samples) < 0.95 * trace_of_covariance(plain)
    if k is None:
        by_hand = -(KL - LOG_RATIO)[:, None] * (torch.eye(V, dtype=torch.float64) - P)
        assert_equal(samples, by_hand)


def test_08_k2_as_a_loss_has_the_reverse_kl_gradient():
    values, samples = per_sample(SampledTokenReverseKL(estimator="k2"))
    assert_equal(P @ samples, REVERSE_GRADIENT)
    assert_equal(values, LOG_RATIO.square() / 2)
    assert_equal(samples, per_sample(SampledTokenReverseKL())[1])


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_power_reward_follows_the_density_power_divergence(alpha: float):
    def divergence(z: Tensor) -> Tensor:
        p = z.softmax(0)
        terms = p ** (alpha + 1) - (alpha + 1) * p * Q**alpha + alpha * Q ** (alpha + 1)
        return terms.sum() / (alpha * (alpha + 1))

    assert_equal(in_expectation(PowerOPD(alpha))[1], by_autograd(divergence))


def test_power_reward_tends_to_the_log_ratio():
    assert_equal(in_expectation(PowerOPD(1e-7))[1], REVERSE_GRADIENT, atol=1e-6)


def test_11_ppo_at_ratio_one_has_the_reinforce_gradient_for_all_y():
    reinforce = per_sample(SampledTokenReverseKL())[1]
    assert_equal(
        per_sample(SampledTokenReverseKL(clip_ratio=0.2, dual_clip=3.0))[1], reinforce, 1e-15
    )


def test_12_a_clamp_biases_only_where_it_acts():
    assert 1 < LOG_RATIO.abs().max() < 7
    wide = in_expectation(SampledTokenReverseKL(log_ratio_clamp=7.0))[1]
    assert_equal(wide, REVERSE_GRADIENT)
    narrow = in_expectation(SampledTokenReverseKL(log_ratio_clamp=1.0))[1]
    assert (narrow - REVERSE_GRADIENT).abs().max() > 0.05


@pytest.mark.parametrize("k", [3, 5, 12])
def test_13_support_matching_gradient_on_s_and_exactly_zero_off_it(k: int):
    ids = top_ids(T, k)
    p_hat, q_hat = P[ids] / P[ids].sum(), Q[ids] / Q[ids].sum()
    loss = (p_hat * (p_hat / q_hat).log()).sum()
    value, gradient = in_expectation(TopKReverseKL(k=k))
    assert_equal(value, loss)
    assert_equal(gradient[ids], p_hat * ((p_hat / q_hat).log() - loss))
    assert (gradient[[v for v in range(V) if v not in ids]] == 0).all()
    assert abs(gradient.sum()) < 1e-15
    up, down = gradient.clamp(max=0).sum(), gradient.clamp(min=0).sum()
    assert_equal(-up, down)


def test_14_one_token_would_be_no_loss_and_is_refused():
    only = top_ids(T, 1)
    assert (Z[only] - Z[only].logsumexp(0)).abs().max() == 0
    with pytest.raises(ValueError, match="at least 2; got 1"):
        TopKReverseKL(k=1)


@pytest.mark.parametrize("tail", ["drop", "bucket", "sampled"])
@pytest.mark.parametrize("k", [V, V + 5])
def test_15_whole_vocabulary_equals_full_reverse_kl(k: int, tail: str):
    value, gradient = in_expectation(TopKReverseKL(k=k, tail=tail))
    assert_equal(value, KL)
    assert_equal(gradient, REVERSE_GRADIENT)


@pytest.mark.parametrize("k", [3, 5])
def test_16_chain_rule(k: int):
    ids = top_ids(T, k)
    rest = [v for v in range(V) if v not in ids]
    inside, outside = P[ids].sum(), P[rest].sum()
    masses = inside * (inside / Q[ids].sum()).log() + outside * (outside / Q[rest].sum()).log()
    p_rest, q_rest = P[rest] / outside, Q[rest] / Q[rest].sum()
    off = (p_rest * (p_rest / q_rest).log()).sum()
    on = in_expectation(TopKReverseKL(k=k))[0]
    assert_equal(masses + inside * on + outside * off, KL)
    bucket = in_expectation(TopKReverseKL(k=k, tail="bucket"))[0]
    assert_equal(masses + inside * on, bucket)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_17_bucket_is_a_lower_bound_with_the_stated_gradient(k: int):
    ids = top_ids(T, k)
    rest = [v for v in range(V) if v not in ids]
    value, gradient = in_expectation(TopKReverseKL(k=k, tail="bucket"))
    assert 0 < value < KL
    rest_ratio = (P[rest].sum() / Q[rest].sum()).log()
    assert_equal(gradient[ids], P[ids] * (LOG_RATIO[ids] - value))
    assert_equal(gradient[rest], P[rest] * (rest_ratio - value))


def test_17_bucket_vanishes_when_only_the_tail_differs():
    ids = top_ids(T, 5)
    z = T.clone()
    rest = [v for v in range(V) if v not in ids]
    z[rest] = z[rest].flip(0)
    value, gradient = in_expectation(TopKReverseKL(k=5, tail="bucket"), z=z)
    assert abs(value) < 1e-15 and gradient.abs().max() < 1e-15


def unnormalised(k: int) -> TopKReverseKL:
    return TopKReverseKL(k=k, renormalize=False, biased_ok=True)


def test_18_unnormalised_head():
    ids = top_ids(T, 5)
    rest = [v for v in range(V) if v not in ids]
    value, gradient = in_expectation(unnormalised(5))
    constant = value + P[ids].sum()
    assert_equal(value, (P[ids] * LOG_RATIO[ids]).sum())
    assert_equal(gradient[ids], P[ids] * (LOG_RATIO[ids] + 1 - constant))
    assert_equal(gradient[rest], -P[rest] * constant)


def test_18_unnormalised_head_moves_a_student_that_is_the_teacher():
    value, gradient = in_expectation(unnormalised(5), z=T)
    assert abs(value) < 1e-15
    assert gradient.abs().max() > 0.01


def published_head_and_tail(z: Tensor, k: int, y: int, variant: str) -> Tensor:
    """V5 as printed (paper 1.4), or with the tail's log-ratio differentiated too."""
    ids = top_ids(T, k)
    log_p, log_q = z.log_softmax(0), T.log_softmax(0)
    head = (log_p[ids].exp() * (log_p[ids] - log_q[ids])).sum()
    if y in ids:
        return head
    tail_ratio = log_p[y] - log_q[y]
    if variant == "published":
        tail_ratio = tail_ratio.detach()
    return head + (log_p[y] - log_p[y].detach()).exp() * tail_ratio


@pytest.mark.parametrize("k", [2, 3, 5])
def test_19_published_form_is_biased_by_the_gradient_of_the_support_mass(k: int):
    ids = top_ids(T, k)
    values = [published_head_and_tail(Z, k, y, "published") for y in range(V)]
    assert_equal((P * torch.stack(values)).sum(), KL)
    samples = [
        by_autograd(lambda z, y=y: published_head_and_tail(z, k, y, "published")) for y in range(V)
    ]
    bias = P @ torch.stack(samples) - REVERSE_GRADIENT
    assert_equal(bias, by_autograd(lambda z: z.softmax(0)[ids].sum()))
    assert bias.norm() / REVERSE_GRADIENT.norm() > 0.02


@pytest.mark.parametrize("k", [2, 3, 5])
def test_20_ours_is_unbiased_in_value_and_gradient(k: int):
    value, gradient = in_expectation(HeadTailReverseKL(k=k))
    assert_equal(value, KL)
    assert_equal(gradient, REVERSE_GRADIENT)
    same = in_expectation(TopKReverseKL(k=k, tail="sampled"))
    assert_equal(same[1], REVERSE_GRADIENT)


def test_20_differentiating_the_log_ratio_of_the_tail_repairs_it_too():
    samples = [
        by_autograd(lambda z, y=y: published_head_and_tail(z, 3, y, "both")) for y in range(V)
    ]
    assert_equal(P @ torch.stack(samples), REVERSE_GRADIENT)


def test_20_the_student_may_choose_the_support_as_well():
    value, gradient = in_expectation(TopKReverseKL(k=3, support="student", tail="sampled"))
    assert_equal(value, KL)
    assert_equal(gradient, REVERSE_GRADIENT)


@pytest.mark.parametrize("k", [2, 3, 11])
def test_20_the_head_lowers_the_variance_of_the_sampled_token(k: int):
    def variance(samples: Tensor) -> float:
        return float((P[:, None] * (samples - P @ samples) ** 2).sum())

    plain = variance(per_sample(SampledTokenReverseKL())[1])
    assert variance(per_sample(HeadTailReverseKL(k=k))[1]) < plain


def test_23_gradcheck_of_support_matching():
    teacher = TokenDistribution.from_logits(T[None])
    rollout = Rollout.from_flat(torch.tensor([0]), torch.tensor([0]))

    def function(z: Tensor) -> Tensor:
        student = TokenDistribution.from_logits(z)
        return TopKReverseKL(k=4).token_loss(student, teacher, rollout).loss

    assert torch.autograd.gradcheck(function, [Z[None].clone().requires_grad_()])


def test_an_excluded_token_is_no_matter_where_only_the_forward_kl_counts():
    t = T.clone()
    t[3] = -torch.inf  # the reverse KL is infinite
    q = t.softmax(0)
    undecided = EntropyAware(threshold=0.1)
    value, gradient = in_expectation(undecided, t=t)
    kept = q > 0
    assert_equal(value, (q[kept] * (q / P).log()[kept]).sum())
    assert_equal(gradient, P - q)
    assert in_expectation(EntropyAware(threshold=9.0), t=t)[0] == torch.inf
