"""Impossible tokens, tied heads, kept values, wrong arguments."""

import pytest
import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution, rows
from tests.distributions.reference import entropy, head_logits, jensen_shannon, kl

N, D, V = 5, 4, 6
CUT = 2  # the last CUT ids are impossible


def cut_bias() -> Tensor:
    bias = torch.zeros(V, dtype=torch.float64)
    bias[-CUT:] = -torch.inf
    return bias


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(form: str, hidden: Tensor, weight: Tensor, bias: Tensor) -> TokenDistribution:
    if form == "hidden":
        return TokenDistribution.from_hidden(hidden, weight, bias, chunk_size=2)
    return TokenDistribution.from_logits(head_logits(hidden, weight, bias))


READS = {
    "entropy": (lambda s, q: s.entropy(), lambda z, t: entropy(z)),
    "reverse_kl": (lambda s, q: s.reverse_kl(q), kl),
    "forward_kl": (lambda s, q: s.forward_kl(q), lambda z, t: kl(t, z)),
    "jensen_shannon": (
        lambda s, q: s.jensen_shannon(q, 0.4),
        lambda z, t: jensen_shannon(z, t, 0.4),
    ),
}


@pytest.mark.parametrize("form", ["dense", "hidden"])
@pytest.mark.parametrize("read", READS)
def test_both_sides_impossible_is_the_smaller_vocabulary(read: str, form: str):
    call, definition = READS[read]
    hidden, weight = normal(N, D).requires_grad_(), normal(V, D, seed=1).requires_grad_()
    teacher = TokenDistribution.from_logits(2 * normal(N, V, seed=2) + cut_bias())
    value = call(build(form, hidden, weight, cut_bias()), teacher)
    z = head_logits(hidden, weight[:-CUT])
    expected = definition(z, 2 * normal(N, V, seed=2)[:, :-CUT])
    torch.testing.assert_close(value, expected)
    up = torch.arange(1.0, N + 1, dtype=torch.float64)
    found = torch.autograd.grad((up * value).sum(), [hidden, weight])
    wanted = torch.autograd.grad((up * expected).sum(), [hidden, weight])
    for actual, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, truth)


@pytest.mark.parametrize("form", ["dense", "hidden"])
def test_student_impossible_tokens_add_nothing_where_the_divergence_is_finite(form: str):
    hidden, weight = normal(N, D).requires_grad_(), normal(V, D, seed=1)
    t = normal(N, V, seed=2)
    student = build(form, hidden, weight, cut_bias())
    teacher = TokenDistribution.from_logits(t)
    p = torch.softmax(head_logits(hidden, weight[:-CUT]), 1)
    q = torch.softmax(t, 1)
    m = 0.4 * q[:, :-CUT] + 0.6 * p
    # sum_v 0 * log(0 / q_v) = 0, and in the mixture m_v = beta q_v where the student gives nothing
    reverse = (p * (p / q[:, :-CUT]).log()).sum(1)
    from_teacher = (q[:, :-CUT] * (q[:, :-CUT] / m).log()).sum(1)
    from_teacher = from_teacher - q[:, -CUT:].sum(1) * torch.tensor(0.4, dtype=torch.float64).log()
    mixed = 0.4 * from_teacher + 0.6 * (p * (p / m).log()).sum(1)
    for value, expected in [
        (student.reverse_kl(teacher), reverse),
        (student.jensen_shannon(teacher, 0.4), mixed),
    ]:
        torch.testing.assert_close(value, expected)
        # a factor above 1 must not carry the stand-in for log 0 over the largest number
        found = torch.autograd.grad(64 * value.sum(), hidden, retain_graph=True)[0]
        wanted = torch.autograd.grad(64 * expected.sum(), hidden, retain_graph=True)[0]
        torch.testing.assert_close(found, wanted)
    assert (student.forward_kl(teacher) == torch.inf).all()


@pytest.mark.parametrize("form", ["dense", "hidden"])
def test_teacher_impossible_tokens(form: str):
    hidden, weight = normal(N, D).requires_grad_(), normal(V, D, seed=1)
    t = normal(N, V, seed=2)
    student = build(form, hidden, weight, torch.zeros(V, dtype=torch.float64))
    teacher = TokenDistribution.from_logits(t + cut_bias())
    assert (student.reverse_kl(teacher) == torch.inf).all()
    p = torch.softmax(head_logits(hidden, weight), 1)
    q = torch.softmax(t[:, :-CUT], 1)
    forward = (q * (q / p[:, :-CUT]).log()).sum(1)
    torch.testing.assert_close(student.forward_kl(teacher), forward)
    found = torch.autograd.grad(student.forward_kl(teacher).sum(), hidden, retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(forward.sum(), hidden)[0])
    jensen = student.jensen_shannon(teacher, 0.5)
    assert jensen.isfinite().all() and (jensen <= torch.log(torch.tensor(2.0))).all()
    assert torch.autograd.grad(jensen.sum(), hidden, retain_graph=True)[0].isfinite().all()


@pytest.mark.parametrize("divergence", [rows.reverse_kl, rows.forward_kl])
def test_weighted_sum_ignores_a_row_of_weight_zero_whose_value_is_infinite(divergence):  # noqa: ANN001
    hidden, weight = normal(N, D).requires_grad_(), normal(V, D, seed=1).requires_grad_()
    t = normal(N, V, seed=2)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)

    def gradients(teacher_logits: Tensor, bias: Tensor) -> tuple[Tensor, list[Tensor]]:
        student = TokenDistribution.from_hidden(hidden, weight, bias, chunk_size=2)
        teacher = TokenDistribution.from_logits(teacher_logits)
        loss, values = student.weighted_sum(divergence, weights, teacher)
        return values, [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]

    zeros = torch.zeros(V, dtype=torch.float64)
    bias = zeros
    infinite = t.clone()
    if divergence is rows.reverse_kl:
        infinite[1, 0] = -torch.inf
    else:  # the student excludes the last id; so must the teacher, except where it is ignored
        bias = zeros.clone()
        bias[-1] = -torch.inf
        t[:, -1] = infinite[:, -1] = -torch.inf
        infinite[1, -1] = 0.0
    values, ours = gradients(infinite, bias)
    assert values[1] == torch.inf
    for actual, expected in zip(ours, gradients(t, bias)[1], strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["reverse_kl", "logprobs", "weighted_sum", "topk"])
def test_tied_weight_receives_both_gradients(name: str):
    previous = torch.tensor([0, 3, 3, 5, 1])
    t = normal(N, V, seed=2)
    body = normal(D, D, seed=3)
    teacher = TokenDistribution.from_logits(t)
    call, definition = {
        "reverse_kl": (lambda s: s.reverse_kl(teacher).sum(), lambda z: kl(z, t).sum()),
        "weighted_sum": (
            lambda s: s.weighted_sum(kl, torch.ones(N), teacher)[0],
            lambda z: kl(z, t).sum(),
        ),
        "logprobs": (
            lambda s: s.logprobs(previous).sum(),
            lambda z: z.log_softmax(1)[range(N), previous].sum(),
        ),
        "topk": (
            lambda s: s.topk(2)[1].sum(),
            lambda z: z.log_softmax(1).sort(descending=True).values[:, :2].sum(),
        ),
    }[name]

    def gradient(dense: bool, part: str = "both") -> Tensor:
        table = normal(V, D, seed=1).requires_grad_()
        inner = table.detach() if part == "head" else table
        outer = table.detach() if part == "lookup" else table
        hidden = torch.tanh(inner[previous] @ body)
        if dense:
            definition(hidden @ outer.T).backward()
        else:
            call(TokenDistribution.from_hidden(hidden, outer, chunk_size=2)).backward()
        return table.grad

    total = gradient(dense=True)
    torch.testing.assert_close(gradient(dense=False), total)
    for part in ("head", "lookup"):
        assert (gradient(dense=True, part=part) - total).abs().max() > 1e-2, "both parts count"


@pytest.mark.parametrize("form", ["dense", "hidden"])
@pytest.mark.parametrize("first", ["logprobs", "topk", "topk_ids", "logsumexp"])
def test_a_read_without_gradient_does_not_take_it_from_a_later_one(form: str, first: str):
    hidden, weight = normal(N, D).requires_grad_(), normal(V, D, seed=1)
    ids = torch.tensor([0, 1, 2, 3, 4])
    argument = {"logprobs": (ids,), "topk": (2,), "topk_ids": (2,), "logsumexp": ()}[first]
    student = build(form, hidden, weight, torch.zeros(V, dtype=torch.float64))
    with torch.no_grad():
        getattr(student, first)(*argument)
    found = torch.autograd.grad(student.logprobs(ids).sum(), hidden)[0]
    expected = head_logits(hidden, weight).log_softmax(1)[range(N), ids].sum()
    torch.testing.assert_close(found, torch.autograd.grad(expected, hidden)[0])


def test_arguments_are_not_changed():
    inputs = [normal(N, D), normal(V, D, seed=1), normal(V, seed=3), normal(N, V, seed=2)]
    before = [x.clone() for x in inputs]
    hidden, weight, bias, t = inputs
    student = TokenDistribution.from_hidden(
        hidden.requires_grad_(), weight, bias, softcap=2.0, scale=0.5, temperature=2.0, chunk_size=2
    )
    teacher = TokenDistribution.from_logits(t, temperature=2.0)
    weights = torch.ones(N, dtype=torch.float64)
    loss = student.weighted_sum(rows.reverse_kl, weights, teacher)[0] + student.entropy().sum()
    (loss + student.topk(2)[1].sum()).backward()
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("form", ["dense", "hidden"])
def test_a_temperature_not_above_zero_is_refused(form: str, temperature: float):
    with pytest.raises(
        ValueError, match=rf"temperature must be above 0; got {temperature}.*temperature 1"
    ):
        if form == "dense":
            TokenDistribution.from_logits(normal(N, V), temperature=temperature)
        else:
            TokenDistribution.from_hidden(normal(N, D), normal(V, D), temperature=temperature)


def test_shapes_that_do_not_agree_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"hidden must be \[N, D\].*\(5, 4\) and \(6, 3\)"):
        TokenDistribution.from_hidden(normal(N, D), normal(V, D - 1))
    with pytest.raises(ValueError, match=r"logits must be \[N, V\]; got shape \(2, 5, 6\)"):
        TokenDistribution.from_logits(normal(2, N, V))
