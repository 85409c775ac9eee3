"""The one-token imbalance: the digits of its table, and each column against enumeration."""

from functools import cache

import pytest
import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from opd_lightning.objectives import ReverseKL, SampledTokenReverseKL, TopKReverseKL
from opd_lightning.records import Rollout
from opd_lightning.study.imbalance import (
    Draw,
    advantages,
    draws,
    gradients,
    imbalance_rows,
    negative_probability,
    one_sample_variance,
    push_ratio,
    top_share,
)
from opd_lightning.study.tables import Row

# (tau, sigma): digits as printed, in the order of the columns
TABLE = {
    (1.0, 0.5): "0.604 -0.091 0.366 0.043 0.284 0.167 0.0216 1.000 0.917 0.912",
    (1.0, 1.0): "0.685 -0.367 0.244 0.042 0.288 0.718 0.0765 1.000 0.917 0.897",
    (0.6, 1.0): "0.621 -1.244 0.143 0.047 0.326 5.94 0.409 1.000 0.999 0.897",
}
V = 7


@cache
def rows() -> list[Row]:
    return imbalance_rows()


@pytest.mark.parametrize("place", range(len(TABLE)))
def test_the_digits_are_those_of_the_table(place: int):
    (setting, printed), row = list(TABLE.items())[place], rows()[place]
    assert (row["tau"], row["sigma"]) == setting
    wanted = printed.split()
    found = [f"{v:.{len(w.partition('.')[2])}f}" for v, w in zip(list(row.values())[2:], wanted)]  # noqa: B905
    assert found == wanted


def small() -> Draw:
    g = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(3, V, generator=g, dtype=torch.float64) for _ in range(2))
    return Draw(student, teacher, torch.randint(V, (3, 4), generator=g))


def every_sample(draw: Draw, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return pi [V], A [V] and the sampled-token gradients [V, V] of each y at one prefix."""
    leaf = draw.student[prefix].expand(V, V).clone().requires_grad_()
    teacher = TokenDistribution.from_logits(draw.teacher[prefix].expand(V, V))
    rollout = Rollout.from_flat(torch.arange(V), torch.arange(V))
    ones = torch.ones(V, dtype=torch.float64)
    output = SampledTokenReverseKL()(TokenDistribution.from_logits(leaf), teacher, rollout, ones)
    gradient = torch.autograd.grad(output.loss, leaf)[0]
    return draw.student[prefix].softmax(0), output.metrics["advantage/mean"], gradient


@pytest.mark.parametrize("prefix", range(3))
def test_variance_and_negative_probability_are_those_of_all_samples(prefix: int):
    draw = small()
    p, a, samples = every_sample(draw, prefix)
    mean = p @ samples
    variance = p @ (samples - mean).square().sum(1)
    exact = gradients(ReverseKL(), draw)[0]
    torch.testing.assert_close(exact[prefix], mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        one_sample_variance(draw, exact)[prefix], variance, rtol=0, atol=1e-14
    )
    torch.testing.assert_close(negative_probability(draw)[prefix], p[a < 0].sum())


def test_advantages_are_the_log_ratios_of_the_samples():
    draw = small()
    ratio = draw.teacher.log_softmax(1) - draw.student.log_softmax(1)
    torch.testing.assert_close(advantages(draw), ratio.gather(1, draw.samples))


def test_top_k_matching_pushes_up_as_much_as_down():
    draw = draws(num_prefixes=5, num_samples=2)[2]
    balanced = push_ratio(gradients(TopKReverseKL(k=32), draw)[0])
    torch.testing.assert_close(balanced, torch.ones_like(balanced), rtol=0, atol=1e-12)


def test_push_ratio_is_up_over_down():
    gradient = torch.tensor([[-1.0, -2.0, 4.0, 2.0]])
    assert float(push_ratio(gradient)) == 0.5


def test_top_share_is_that_of_the_largest():
    values = torch.tensor([-4.0, 1, 1, 1, 1, 1, 1, 0, 0, 0])
    assert top_share(values, 0.1) == pytest.approx(0.4)
    assert top_share(values, 0.2) == pytest.approx(0.5)


def test_the_draw_depends_on_the_seed_alone():
    one, same, other = (draws(num_prefixes=2, num_samples=3, seed=s)[1] for s in (4, 4, 5))
    assert torch.equal(one.samples, same.samples) and torch.equal(one.student, same.student)
    assert not torch.equal(one.student, other.student)
