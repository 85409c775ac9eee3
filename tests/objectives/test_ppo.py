"""The clipped forms of the sampled-token loss: where the gradient is zero, and its value."""

import math

import pytest
import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from opd_lightning.objectives import SampledTokenReverseKL, SequenceReverseKL
from opd_lightning.objectives.base import ObjectiveOutput
from opd_lightning.records import Rollout

V, Y = 5, 3
Z = torch.tensor([0.3, -0.5, 1.0, 0.2, -1.0], dtype=torch.float64)
LOG_P = Z.log_softmax(0)[Y]


def one_token(
    objective: SampledTokenReverseKL, advantage: float, ratio: float | None
) -> tuple[ObjectiveOutput, Tensor]:
    """Return the output and gradient [V] where A is `advantage` and pi / pi_old is `ratio`."""
    old = LOG_P - math.log(ratio if ratio is not None else 1.0)
    q = torch.full((V,), 0.0, dtype=torch.float64)
    q[Y] = (old + advantage).exp()
    q[[v for v in range(V) if v != Y]] = (1 - q[Y]) / (V - 1)
    assert 0 < q[Y] < 1
    leaf = Z[None].clone().requires_grad_()
    rollout = Rollout.from_flat(
        torch.tensor([Y]),
        torch.tensor([0]),
        old_logprobs=None if ratio is None else old[None],
    )
    one = torch.ones(1, dtype=torch.float64)
    student, teacher = (
        TokenDistribution.from_logits(leaf),
        TokenDistribution.from_logits(q.log()[None]),
    )
    output = objective(student, teacher, rollout, one)
    return output, torch.autograd.grad(output.loss, leaf)[0][0]


SCORE = torch.nn.functional.one_hot(torch.tensor(Y), V) - Z.softmax(0)

# (A, rho, clipped): section 1.1, c = 0.2 and dual clip 3
REGIONS = [
    (0.3, 1.0, False),
    (0.3, 1.19, False),
    (0.3, 1.21, True),
    (0.3, 5.0, True),
    (0.3, 0.5, False),
    (0.3, 0.81, False),
    (-0.3, 1.0, False),
    (-0.3, 0.79, True),
    (-0.3, 0.2, True),
    (-0.3, 0.81, False),
    (-0.3, 1.5, False),
    (-0.3, 2.9, False),
    (-0.3, 3.1, "dual"),
    (-0.3, 9.0, "dual"),
]


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize(("advantage", "ratio", "clipped"), REGIONS)
def test_gradient_is_zero_exactly_where_a_clip_holds(
    advantage: float, ratio: float, clipped: bool | str, dual: float | None
):
    objective = SampledTokenReverseKL(clip_ratio=0.2, dual_clip=dual)
    output, gradient = one_token(objective, advantage, ratio)
    held = clipped is True or (clipped == "dual" and dual is not None)
    if held:
        assert (gradient == 0).all()
    else:
        torch.testing.assert_close(gradient, -advantage * ratio * SCORE, rtol=1e-10, atol=1e-12)
    edges = {True: 1.2 if advantage > 0 else 0.8, "dual": 3.0}
    value = -advantage * (edges[clipped] if held else ratio)
    torch.testing.assert_close(output.loss.item(), value)
    assert output.metrics["loss/ratio_clipped_frac"].item() == float(clipped is True)
    if dual is not None:
        assert output.metrics["loss/ratio_dual_clipped_frac"].item() == float(clipped == "dual")


@pytest.mark.parametrize("advantage", [0.3, -0.3])
@pytest.mark.parametrize("cls", [SampledTokenReverseKL, SequenceReverseKL])
def test_without_old_logprobs_the_first_update_has_the_reinforce_gradient(cls, advantage: float):  # noqa: ANN001
    clipped = one_token(cls(clip_ratio=0.2, dual_clip=3.0), advantage, None)[1]
    plain = one_token(cls(), advantage, None)[1]
    torch.testing.assert_close(clipped, plain, rtol=0, atol=1e-15)
    torch.testing.assert_close(plain, -advantage * SCORE, rtol=1e-10, atol=1e-12)


def test_without_clip_ratio_old_logprobs_play_no_part():
    plain = one_token(SampledTokenReverseKL(), -0.3, 1.0)[1]
    moved = SampledTokenReverseKL()
    assert not moved.uses_old_logprobs
    # A is taken with pi, so the teacher that gave A = -0.3 to pi_old gives -0.3 - log 2 to pi
    torch.testing.assert_close(
        one_token(moved, -0.3, 2.0)[1], (0.3 + math.log(2)) / 0.3 * plain, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize(("advantage", "clamp", "seen"), [
    (0.3, 0.5, 0.3),
    (0.3, 0.1, 0.1),
    (-4.0, 5.0, -4.0),
    (-4.0, 1.5, -1.5),
])  # fmt: skip
@pytest.mark.parametrize("clip", [None, 0.2])
def test_log_ratio_clamp_bounds_the_advantage_on_both_sides(
    advantage: float, clamp: float, seen: float, clip: float | None
):
    objective = SampledTokenReverseKL(clip_ratio=clip, log_ratio_clamp=clamp)
    output, gradient = one_token(objective, advantage, 1.0)
    torch.testing.assert_close(gradient, -seen * SCORE, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(output.metrics["advantage/mean"].item(), seen)
    torch.testing.assert_close(output.metrics["kl/reverse_k1"].item(), -advantage)
    assert output.metrics["advantage/negative_frac"].item() == float(seen < 0)


def test_a_sequence_clamps_each_cost_and_not_their_sum():
    t = torch.zeros(3, V, dtype=torch.float64)
    t[:, Y] = -8.0
    rollout = Rollout.from_flat(torch.full((3,), Y), torch.zeros(3, dtype=torch.long))
    student = TokenDistribution.from_logits(Z.expand(3, V).clone().requires_grad_())
    teacher = TokenDistribution.from_logits(t)
    loss = SequenceReverseKL(log_ratio_clamp=1.0).token_loss(student, teacher, rollout)
    assert loss.metrics["advantage/mean"].tolist() == [-3.0, -2.0, -1.0]


def test_nothing_flows_through_the_advantage():
    # differentiated as a loss, log pi - log q has expected gradient 0 (section 1.1)
    naive, ours = torch.zeros(V, dtype=torch.float64), torch.zeros(V, dtype=torch.float64)
    t = torch.linspace(-1, 1, V, dtype=torch.float64)
    for y in range(V):
        leaf = Z[None].clone().requires_grad_()
        rollout = Rollout.from_flat(torch.tensor([y]), torch.tensor([0]))
        student, teacher = (
            TokenDistribution.from_logits(leaf),
            TokenDistribution.from_logits(t[None]),
        )
        loss = SampledTokenReverseKL().token_loss(student, teacher, rollout).loss
        ours += Z.softmax(0)[y] * torch.autograd.grad(loss.sum(), leaf)[0][0]
        naive += Z.softmax(0)[y] * (torch.nn.functional.one_hot(torch.tensor(y), V) - Z.softmax(0))
    assert naive.abs().max() < 1e-15
    assert ours.abs().max() > 0.1
