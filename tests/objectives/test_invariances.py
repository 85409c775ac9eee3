"""Two calls that must agree: weights, order, splits, constants, what is ignored."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from opd_lightning.objectives import known_objectives
from opd_lightning.records import Rollout
from opd_lightning.weighting import Reduction, UpdateSize
from tests.objectives.cases import ROW, WEIGHTS, N, V, gradient_on_logits, inputs, served
from tests.objectives.reference import BATTERY, CONFIGURED, K, build

REDUCTIONS = [
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
]
# its minimiser is not the teacher: docs/mathematics.md, sections 4 and 8
NOT_ZERO_AT_THE_TEACHER = [n for n in CONFIGURED if n.startswith("head-")] + [
    "tail-published",
    "SupportMass",
    "OutcomeReward",
    "sampled-mixture",
]


def assert_close(actual: Tensor, wanted: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-10 if atol < 1e-9 else 1e-5, atol=atol)


def shares_cost_within_a_row(name: str) -> bool:
    return hasattr(build(name), "gamma")


def reads_the_row(name: str) -> bool:
    return shares_cost_within_a_row(name) or name in ("OutcomeReward", "sampled-mixture")


@pytest.mark.parametrize("name", BATTERY)
def test_loss_and_gradient_are_linear_in_the_weights(name: str):
    x, objective = inputs(), build(name)
    a, b = WEIGHTS["any"], torch.linspace(0.1, 1, N, dtype=torch.float64)

    def run(w: Tensor) -> list[Tensor]:
        output, gradient = gradient_on_logits(objective, x.student_logits, x.teacher, x.rollout, w)
        return [output.loss.detach(), gradient]

    for both, one, other in zip(run(2 * a + 3 * b), run(a), run(b), strict=True):
        assert_close(both, 2 * one + 3 * other)


@pytest.mark.parametrize("name", BATTERY)
def test_permuting_the_rows_permutes_losses_and_gradients(name: str):
    x, objective, w = inputs(), build(name), WEIGHTS["any"]
    order = torch.tensor([3, 1, 4, 2, 0])
    tokens = torch.cat([(x.rollout.row == r).nonzero()[:, 0] for r in order])
    assert not torch.equal(tokens, torch.arange(N))
    output, gradient = gradient_on_logits(objective, x.student_logits, x.teacher, x.rollout, w)
    teacher = TokenDistribution.from_logits(x.teacher_logits[tokens])
    moved, moved_gradient = gradient_on_logits(
        objective, x.student_logits[tokens], teacher, x.rollout.select_rows(order), w[tokens]
    )
    assert_close(moved.loss.detach(), output.loss.detach())
    assert_close(moved.token_loss, output.token_loss[tokens])
    assert_close(moved_gradient, gradient[tokens])


@pytest.mark.parametrize("name", [n for n in BATTERY if not reads_the_row(n)])
def test_tokens_of_a_row_do_not_depend_on_one_another(name: str):
    x, objective, w = inputs(), build(name), WEIGHTS["any"]
    flipped = torch.arange(N).flip(0)
    flat = Rollout.from_flat(
        x.rollout.token_ids[flipped],
        torch.zeros(N, dtype=torch.long),
        old_logprobs=x.rollout.flat_old_logprobs[flipped],
        sampling_logprobs=x.rollout.flat_sampling_logprobs[flipped],
    )
    output, gradient = gradient_on_logits(objective, x.student_logits, x.teacher, x.rollout, w)
    teacher = TokenDistribution.from_logits(x.teacher_logits[flipped])
    moved, moved_gradient = gradient_on_logits(
        objective, x.student_logits[flipped], teacher, flat, w[flipped]
    )
    assert_close(moved.token_loss, output.token_loss[flipped])
    assert_close(moved_gradient, gradient[flipped])


@settings(max_examples=12, deadline=None)
@given(order=st.permutations(range(V)), seed=st.integers(0, 50))
@pytest.mark.parametrize("name", BATTERY)
def test_renaming_the_vocabulary_changes_nothing(name: str, order: list[int], seed: int):
    x, objective, w = inputs(seed=seed), build(name), WEIGHTS["any"]
    new_of_old = torch.argsort(torch.tensor(order))
    renamed = replace(x.rollout, input_ids=new_of_old[x.rollout.input_ids])
    output, gradient = gradient_on_logits(objective, x.student_logits, x.teacher, x.rollout, w)
    teacher = TokenDistribution.from_logits(x.teacher_logits[:, order])
    other, other_gradient = gradient_on_logits(
        objective, x.student_logits[:, order], teacher, renamed, w
    )
    assert_close(other.token_loss, output.token_loss)
    assert_close(other_gradient, gradient[:, order])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", known_objectives())
def test_splitting_the_update_into_micro_batches_keeps_the_gradient(
    name: str, reduction: str, dtype: torch.dtype
):
    x, objective = inputs(dtype=dtype), build(name)
    size = UpdateSize(num_tokens=N, num_rows=4, longest=4)
    z = x.student_logits

    def total(parts: list[list[int]]) -> Tensor:
        gradient = torch.zeros_like(z)
        for rows in parts:
            part = x.rollout.select_rows(torch.tensor(rows))
            tokens = torch.cat([(r == ROW).nonzero()[:, 0] for r in rows])
            weights = Reduction(reduction).scale(part, size).to(dtype)
            teacher = TokenDistribution.from_logits(x.teacher_logits[tokens])
            gradient[tokens] += gradient_on_logits(objective, z[tokens], teacher, part, weights)[1]
        return gradient

    whole = total([[0, 1, 2, 3, 4]])
    assert whole.abs().max() > 1e-3
    # the empty row 2 stands alone once: a micro-batch without a single completion token
    for parts in ([[3, 0], [4, 2, 1]], [[2], [4, 3], [0], [1]]):
        assert_close(total(parts), whole, atol=1e-12 if dtype == torch.float64 else 1e-6)


def poisoned(logits: Tensor, value: float) -> Tensor:
    """Put `value` at two tokens that the weights `some_zero` leave out."""
    poison = logits.clone()
    poison[4] = value  # a whole position
    poison[9, ::2] = value  # some ids of the last token of row 4
    return poison


# every form of the teacher that the objective works with; k = 50 is more than one can serve here
TEACHERS = [
    (name, kind)
    for name in BATTERY
    for kind in ("dense", "chunked", "served")
    if kind != "served" or (build(name).needs != "full" and name != "topk-all")
]


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), float("inf")])
@pytest.mark.parametrize(("name", "kind"), TEACHERS)
def test_teacher_at_tokens_of_weight_zero_leaks_nowhere(name: str, kind: str, value: float):
    x, objective, w = inputs(), build(name), WEIGHTS["some_zero"]
    assert w[4] == w[9] == 0
    if shares_cost_within_a_row(name):
        w = w.clone()
        w[8] = w[9] = 0  # so that no counted token stands before the poisoned one of row 4
    clean = served(x.teacher_logits, x.rollout, K) if kind == "served" else x.teacher
    if kind == "served":
        logprobs, sampled = clean._logprobs.clone(), clean.sampled_logprobs.clone()
        logprobs[4] = logprobs[9, 1] = sampled[4] = sampled[9] = value
        teacher = type(clean)(clean.ids, logprobs, sampled)
    else:
        teacher = TokenDistribution.from_logits(poisoned(x.teacher_logits, value))
    leaves = [a.clone().requires_grad_() for a in (x.hidden, x.weight, x.bias)]

    def run(given_teacher: object) -> list[Tensor]:
        if kind == "chunked":
            student = TokenDistribution.from_hidden(*leaves, chunk_size=3)
        else:
            student = TokenDistribution.from_logits(leaves[0] @ leaves[1].T + leaves[2])
        loss = objective(student, given_teacher, x.rollout, w).loss
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    for seen, wanted in zip(run(teacher), run(clean), strict=True):
        assert seen.isfinite().all()
        assert_close(seen, wanted)


@pytest.mark.parametrize("kind", ["dense", "chunked"])
@pytest.mark.parametrize("name", BATTERY)
def test_teacher_hidden_states_at_tokens_of_weight_zero_leak_nowhere(name: str, kind: str):
    x, objective = inputs(), build(name)
    w = WEIGHTS["some_zero"].clone()
    w[8] = 0
    hidden = x.hidden.flip(0).contiguous()
    bad = hidden.clone()
    bad[9, 2], bad[4] = torch.nan, torch.inf
    results = []
    for h in (hidden, bad):
        teacher = TokenDistribution.from_hidden(h, x.weight.flip(0), chunk_size=4)
        output, gradient = gradient_on_logits(objective, x.student_logits, teacher, x.rollout, w)
        results.append([output.loss.detach(), gradient])
    for wanted, seen in zip(*results, strict=True):
        assert_close(seen, wanted)


@pytest.mark.parametrize("form", ["dense", "chunked"])
@pytest.mark.parametrize("name", BATTERY)
def test_no_tokens_give_loss_zero_and_zero_gradients(name: str, form: str):
    x = inputs(row=torch.zeros(0, dtype=torch.long))
    leaves = [a.requires_grad_() for a in (x.hidden, x.weight, x.bias)]
    if form == "chunked":
        student = TokenDistribution.from_hidden(*leaves, chunk_size=3)
    else:
        student = TokenDistribution.from_logits(leaves[0] @ leaves[1].T + leaves[2])
    output = build(name)(student, x.teacher, x.rollout, torch.zeros(0, dtype=torch.float64))
    assert output.loss == 0 and output.token_loss.shape == (0,)
    for gradient in torch.autograd.grad(output.loss, leaves):
        assert gradient.isfinite().all() and not gradient.any()


@pytest.mark.parametrize("name", [n for n in BATTERY if n not in NOT_ZERO_AT_THE_TEACHER])
def test_21_gradient_vanishes_for_every_sample_where_student_is_teacher(name: str):
    x = inputs()
    # rho = 1: the student has not moved since it sampled
    rollout = replace(x.rollout, old_logprobs=None)
    output, gradient = gradient_on_logits(
        build(name), x.teacher_logits, x.teacher, rollout, WEIGHTS["any"]
    )
    assert gradient.abs().max() < 1e-14
    assert output.token_loss.abs().max() < 1e-14


@pytest.mark.parametrize("name", BATTERY)
def test_22_adding_a_constant_to_all_logits_changes_nothing(name: str):
    x, objective, w = inputs(), build(name), WEIGHTS["any"]
    z, t = x.student_logits, x.teacher_logits
    output, gradient = gradient_on_logits(objective, z, x.teacher, x.rollout, w)
    shift = torch.linspace(-30, 20, N, dtype=torch.float64)[:, None]
    teacher = TokenDistribution.from_logits(t - 2 * shift)
    moved, moved_gradient = gradient_on_logits(objective, z + shift, teacher, x.rollout, w)
    assert_close(moved.token_loss, output.token_loss, atol=1e-13)
    assert_close(moved_gradient, gradient, atol=1e-13)


@pytest.mark.parametrize("name", BATTERY)
def test_gradients_sum_to_zero_over_the_vocabulary(name: str):
    x = inputs()
    gradient = gradient_on_logits(
        build(name), x.student_logits, x.teacher, x.rollout, WEIGHTS["any"]
    )[1]
    assert gradient.sum(1).abs().max() < 1e-13


@pytest.mark.parametrize("name", BATTERY)
def test_numbers_of_tokens_that_do_not_agree_are_refused_with_all_four(name: str):
    x = inputs()
    student = TokenDistribution.from_logits(x.student_logits[:-1])
    with pytest.raises(ValueError, match=r"one number of completion tokens; got 9, 10, 8 and 10"):
        build(name)(student, x.teacher, x.rollout, torch.ones(8))
