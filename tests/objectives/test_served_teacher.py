"""A teacher that gives its top K and the sampled token: the same result, or a clear refusal."""

import pytest
import torch

from opd_lightning.distributions import TokenDistribution
from opd_lightning.errors import ConfigError
from tests.objectives.cases import WEIGHTS, V, gradient_on_logits, inputs, served
from tests.objectives.reference import BATTERY, K, build

FULL = [n for n in BATTERY if build(n).needs == "full"]
SERVED = [n for n in BATTERY if n not in FULL]


def test_both_lists_hold_something():
    assert {
        "SampledTokenReverseKL",
        "SequenceReverseKL",
        "TopKReverseKL",
        "HeadTailReverseKL",
    } <= set(SERVED)
    assert {"ReverseKL", "ForwardKL", "JensenShannon", "topk-student"} <= set(FULL)


@pytest.mark.parametrize("given", [K, K + 3])
@pytest.mark.parametrize("name", [n for n in SERVED if n != "topk-all"])
def test_top_k_and_sampled_token_give_what_the_whole_teacher_gives(name: str, given: int):
    x, objective, w = inputs(), build(name), WEIGHTS["any"]
    whole, gradient = gradient_on_logits(objective, x.student_logits, x.teacher, x.rollout, w)
    teacher = served(x.teacher_logits, x.rollout, given)
    output, found = gradient_on_logits(objective, x.student_logits, teacher, x.rollout, w)
    torch.testing.assert_close(output.loss, whole.loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(output.token_loss, whole.token_loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-12)
    for key, value in whole.metrics.items():
        torch.testing.assert_close(output.metrics[key], value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in SERVED if build(n).needs == "sampled"])
def test_sampled_objectives_look_at_nothing_but_the_sampled_token(name: str):
    x, w = inputs(), WEIGHTS["any"]
    t = x.teacher_logits.log_softmax(1)
    other = torch.full_like(t, -torch.inf)  # everything else: the rest of the mass on one id
    n, y = torch.arange(len(t)), x.rollout.token_ids
    other[n, y] = t[n, y]
    other[n, (y + 1) % V] = torch.log1p(-t[n, y].exp())
    first = gradient_on_logits(build(name), x.student_logits, x.teacher, x.rollout, w)[1]
    teacher = TokenDistribution.from_logits(other)
    second = gradient_on_logits(build(name), x.student_logits, teacher, x.rollout, w)[1]
    torch.testing.assert_close(second, first, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FULL)
def test_needing_the_whole_vocabulary_is_refused_with_the_ways_out(name: str):
    x = inputs()
    with pytest.raises(ConfigError, match=r"(topk|top 4).*(TopKReverseKL|SampledTokenReverseKL)"):
        gradient_on_logits(
            build(name),
            x.student_logits,
            served(x.teacher_logits, x.rollout, K),
            x.rollout,
            WEIGHTS["ones"],
        )


@pytest.mark.parametrize("name", ["TopKReverseKL", "HeadTailReverseKL"])
def test_a_larger_k_than_the_teacher_gives_is_refused(name: str):
    x = inputs()
    with pytest.raises(ConfigError, match=r"top 4 .*gives 3.*Lower the objective's k"):
        gradient_on_logits(
            build(name),
            x.student_logits,
            served(x.teacher_logits, x.rollout, 3),
            x.rollout,
            WEIGHTS["ones"],
        )
