"""Every known objective and many settings: value and gradient by definition, in every form."""

import re

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from opd_lightning.distributions import TokenDistribution
from opd_lightning.objectives import Objective, known_objectives, known_terms
from tests.objectives.cases import WEIGHTS, D, N, V, expected, gradient_on_logits, inputs
from tests.objectives.reference import BATTERY, CONFIGURED, build

# no sampled quantity and nothing detached: their gradient is the derivative of their value
DIFFERENTIABLE = [n for n in CONFIGURED if not build(n).on_policy_estimator]


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


def test_every_objective_of_the_package_has_a_reference():
    known = known_objectives() | known_terms()
    own = {n for n, c in known.items() if c.__module__.startswith("opd_lightning.")}
    assert own == own & set(CONFIGURED)


def test_the_inputs_reach_every_branch_of_ppo():
    x = inputs()
    ids = x.rollout.token_ids
    log_p = x.student_logits.log_softmax(1)[torch.arange(N), ids]
    ratio = (log_p - x.rollout.flat_old_logprobs).exp()
    advantage = x.teacher_logits.log_softmax(1)[torch.arange(N), ids] - x.rollout.flat_old_logprobs
    negative = advantage < 0
    assert (negative & (ratio > 1.5)).any() and (negative & (ratio < 0.8)).any()
    assert (negative & (ratio > 0.8) & (ratio < 1.5)).any() and (~negative).any()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", CONFIGURED)
def test_value_and_gradient_of_a_dense_student(name: str, weights: str):
    x, w = inputs(), WEIGHTS[weights]
    losses, gradients = expected(name, x.student_logits, x.teacher_logits, x.rollout)
    output, found = gradient_on_logits(build(name), x.student_logits, x.teacher, x.rollout, w)
    assert_close(output.token_loss, losses)
    assert_close(output.loss.detach(), (w * losses).sum())
    assert_close(found, w[:, None] * gradients)
    assert not output.token_loss.requires_grad
    for key, value in output.metrics.items():
        assert value.shape == (N,) and not value.requires_grad, key


@pytest.mark.parametrize("chunk", [3, 4])
@pytest.mark.parametrize("weights", ["any", "ones"])
@pytest.mark.parametrize("name", CONFIGURED)
def test_value_and_gradient_of_a_chunked_student(name: str, weights: str, chunk: int):
    assert N % chunk and chunk < N
    x, w = inputs(), WEIGHTS[weights]
    losses, gradients = expected(name, x.student_logits, x.teacher_logits, x.rollout)
    on_logits = w[:, None] * gradients
    leaves = [a.clone().requires_grad_() for a in (x.hidden, x.weight, x.bias)]
    student = TokenDistribution.from_hidden(*leaves, chunk_size=chunk)
    output = build(name)(student, x.teacher, x.rollout, w)
    assert_close(output.loss.detach(), (w * losses).sum())
    assert_close(output.token_loss, losses)
    found = torch.autograd.grad(output.loss, leaves)
    wanted = [on_logits @ x.weight, on_logits.T @ x.hidden, on_logits.sum(0)]
    for actual, truth in zip(found, wanted, strict=True):
        assert_close(actual, truth)


@pytest.mark.parametrize("name", CONFIGURED)
def test_gradient_of_a_tied_head(name: str):
    x, w = inputs(), WEIGHTS["any"]
    previous = torch.arange(N) % V
    body = torch.linspace(-1, 1, D * D, dtype=torch.float64).reshape(D, D)

    def hidden_of(table: Tensor) -> Tensor:
        return torch.tanh(table[previous] @ body)

    reference = x.weight.clone().requires_grad_()
    z = hidden_of(reference) @ reference.T
    losses, gradients = expected(name, z.detach(), x.teacher_logits, x.rollout)
    z.backward(w[:, None] * gradients)

    table = x.weight.clone().requires_grad_()
    student = TokenDistribution.from_hidden(hidden_of(table), table, chunk_size=3)
    output = build(name)(student, x.teacher, x.rollout, w)
    output.loss.backward()
    assert_close(output.loss.detach(), (w * losses).sum())
    assert_close(table.grad, reference.grad)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("form", ["dense", "chunked"])
@pytest.mark.parametrize("name", BATTERY)
def test_call_equals_the_sum_of_weights_times_token_loss(name: str, form: str, weights: str):
    x, w, objective = inputs(), WEIGHTS[weights], build(name)

    def loss_and_gradients(fused: bool) -> list[Tensor]:
        leaves = [a.clone().requires_grad_() for a in (x.hidden, x.weight, x.bias)]
        if form == "chunked":
            student = TokenDistribution.from_hidden(*leaves, chunk_size=4)
        else:
            student = TokenDistribution.from_logits(leaves[0] @ leaves[1].T + leaves[2])
        if fused:
            loss = objective(student, x.teacher, x.rollout, w).loss
        else:
            loss = (w * objective.token_loss(student, x.teacher, x.rollout).loss).sum()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    for fused, plain in zip(loss_and_gradients(True), loss_and_gradients(False), strict=True):
        assert_close(fused, plain)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck_of_what_is_differentiable_as_it_stands(name: str):
    x, objective = inputs(), build(name)

    def function(hidden: Tensor, bias: Tensor) -> Tensor:
        student = TokenDistribution.from_hidden(hidden, x.weight, bias, chunk_size=3)
        return objective.token_loss(student, x.teacher, x.rollout).loss

    leaves = [x.hidden.clone().requires_grad_(), x.bias.clone().requires_grad_()]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["SampledTokenReverseKL", "HeadTailReverseKL"])
def test_gradcheck_refuses_what_is_a_score_function(name: str):
    x, objective = inputs(), build(name)

    def function(z: Tensor) -> Tensor:
        student = TokenDistribution.from_logits(z)
        return objective.token_loss(student, x.teacher, x.rollout).loss

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(function, [x.student_logits.requires_grad_()])


@pytest.mark.parametrize("name", BATTERY)
def test_loss_stays_in_the_precision_of_the_student(name: str):
    for dtype in (torch.float32, torch.float64):
        x = inputs(dtype=dtype)
        w = torch.ones(N, dtype=dtype)
        student = TokenDistribution.from_hidden(
            x.hidden.requires_grad_(), x.weight, x.bias, chunk_size=3
        )
        output = build(name)(student, x.teacher, x.rollout, w)
        assert output.loss.dtype == output.token_loss.dtype == dtype


@pytest.mark.parametrize("name", known_objectives() | known_terms())
def test_docstring_states_loss_gradient_source_detached_and_needs(name: str):
    text = (known_objectives() | known_terms())[name].__doc__
    for word in ("loss", "gradient"):
        assert re.search(rf"\b{word}\b", text, re.IGNORECASE), word
    for heading in ("Source:", "Detached:", "Needs:", "Choose:"):
        assert heading in text, heading


@pytest.mark.parametrize("name", known_objectives())
def test_needs_is_one_of_the_three_words(name: str):
    objective: Objective = build(name)
    assert objective.needs in ("sampled", "topk", "full")
    assert isinstance(objective.on_policy_estimator, bool)


@pytest.mark.parametrize("name", BATTERY)
def test_describe_names_the_class_and_its_settings(name: str):
    text = build(name).describe()
    assert text.startswith(type(build(name)).__name__ + "(")
    for setting, value in (CONFIGURED[name][1] if name in CONFIGURED else {}).items():
        assert f"{setting}={value!r}" in text
