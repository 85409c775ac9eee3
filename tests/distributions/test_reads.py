"""Every read, value and gradient: from hidden states, from logits, and by definition."""

import pytest
import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from tests.distributions.reference import READS, best_ids, head_logits, kl, logprobs

N, D, V = 7, 5, 11
CHUNKS = [2, 3, 5]
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.4},
    "temperature": {"temperature": 0.7},
    "all": {"bias": True, "softcap": 2.0, "scale": 1.7, "temperature": 1.3},
}


def random_inputs(n: int = N, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "hidden": normal(n, D),
        "weight": normal(V, D),
        "bias": normal(V),
        "teacher": 1.5 * normal(n, V),
        "extra": normal(n),
        "ids": torch.randint(V, (n, 3), generator=g),
    }


def settings_of(head: str, inputs: dict[str, Tensor]) -> dict:
    settings = dict(HEADS[head])
    if settings.pop("bias", False):
        settings["bias"] = inputs["bias"]
    return settings


def gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    upstream = torch.linspace(-1, 2, max(1, value.numel()), dtype=value.dtype)[: value.numel()]
    total = (value * upstream.reshape(value.shape)).sum()
    return list(torch.autograd.grad(total, leaves))


def leaves_of(inputs: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    return {k: v.clone().requires_grad_() if k in names else v for k, v in inputs.items()}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk", [*CHUNKS, 1, 100, None])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("read", READS)
def test_read_from_hidden_equals_definition(read: str, head: str, chunk: int | None):
    if chunk in CHUNKS:
        assert N % chunk and chunk < N, "the grid is to hold chunk sizes that leave a rest"
    call, definition = READS[read]
    names = ["hidden", "weight", *(["bias"] if HEADS[head].get("bias") else [])]

    x = leaves_of(random_inputs(), names)
    settings = settings_of(head, x)
    student = TokenDistribution.from_hidden(x["hidden"], x["weight"], chunk_size=chunk, **settings)
    teacher = TokenDistribution.from_logits(x["teacher"])
    value = call(student, teacher, x["ids"], x["extra"])

    r = leaves_of(random_inputs(), names)
    z = head_logits(r["hidden"], r["weight"], **settings_of(head, r))
    expected = definition(z, r["teacher"], r["ids"], r["extra"])

    assert_close(value, expected)
    found = gradients(value, [x[n] for n in names])
    wanted = gradients(expected, [r[n] for n in names])
    for actual, truth in zip(found, wanted, strict=True):
        assert truth.abs().max() > 1e-3
        assert_close(actual, truth)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("read", READS)
def test_read_from_logits_equals_definition(read: str, temperature: float):
    call, definition = READS[read]
    x = random_inputs()
    z = head_logits(x["hidden"], x["weight"]).requires_grad_()
    teacher = TokenDistribution.from_logits(x["teacher"])
    student = TokenDistribution.from_logits(z, temperature)
    value = call(student, teacher, x["ids"], x["extra"])
    z_ref = z.detach().clone().requires_grad_()
    expected = definition(z_ref / temperature, x["teacher"], x["ids"], x["extra"])
    assert_close(value, expected)
    assert_close(gradients(value, [z])[0], gradients(expected, [z_ref])[0])


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("form", ["dense", "hidden"])
def test_no_gradient_reaches_the_teacher_of_a_divergence(name: str, form: str):
    x = random_inputs()
    leaf = x["teacher"].requires_grad_()
    teacher = TokenDistribution.from_logits(leaf)
    if form == "hidden":
        leaf = random_inputs(seed=1)["hidden"].requires_grad_()
        teacher = TokenDistribution.from_hidden(leaf, random_inputs(seed=2)["weight"], chunk_size=3)
    student = TokenDistribution.from_hidden(x["hidden"].requires_grad_(), x["weight"], chunk_size=2)
    args = (teacher, 0.5) if name == "jensen_shannon" else (teacher,)
    getattr(student, name)(*args).sum().backward()
    assert leaf.grad is None
    assert x["hidden"].grad.abs().max() > 0


@pytest.mark.parametrize("read", READS)
def test_teacher_from_hidden_gives_the_same_as_from_logits(read: str):
    call, _ = READS[read]
    x, other = random_inputs(), random_inputs(seed=3)
    student = TokenDistribution.from_hidden(x["hidden"], x["weight"], chunk_size=3)
    lazy = TokenDistribution.from_hidden(
        other["hidden"], other["weight"], other["bias"], softcap=2.0, temperature=0.8, chunk_size=5
    )
    z = head_logits(other["hidden"], other["weight"], other["bias"], softcap=2.0, temperature=0.8)
    dense = TokenDistribution.from_logits(z)
    assert_close(
        call(student, lazy, x["ids"], x["extra"]), call(student, dense, x["ids"], x["extra"])
    )


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("form", ["dense", "hidden"])
@pytest.mark.parametrize("read", READS)
def test_no_and_one_position(read: str, form: str, n: int):
    call, definition = READS[read]
    x = leaves_of(random_inputs(n), ["hidden", "weight"])
    z = head_logits(x["hidden"], x["weight"])
    student = (
        TokenDistribution.from_hidden(x["hidden"], x["weight"], chunk_size=2)
        if form == "hidden"
        else TokenDistribution.from_logits(z)
    )
    teacher = TokenDistribution.from_logits(x["teacher"])
    value = call(student, teacher, x["ids"], x["extra"])
    if n:
        expected = definition(z, x["teacher"], x["ids"], x["extra"])
        assert_close(value, expected)
    else:
        assert value.numel() == (1 if read == "weighted_sum" else 0)
        assert value.dim() == (
            2
            if read in ("logprobs_nk", "logits_at", "topk", "read_two_values")
            else 0
            if read == "weighted_sum"
            else 1
        )
        assert value.sum() == 0
    for gradient in torch.autograd.grad(value.sum(), [x["hidden"], x["weight"]]):
        assert gradient.isfinite().all()
        assert n or not gradient.any()


@pytest.mark.parametrize("k", [1, 3, V, V + 4])
@pytest.mark.parametrize("form", ["dense", "hidden"])
def test_topk_is_the_sorted_head_and_is_cut_to_the_vocabulary(form: str, k: int):
    x = random_inputs()
    z = head_logits(x["hidden"], x["weight"])
    student = (
        TokenDistribution.from_hidden(x["hidden"], x["weight"], chunk_size=3)
        if form == "hidden"
        else TokenDistribution.from_logits(z)
    )
    ids, values = student.topk(k)
    assert torch.equal(ids, best_ids(z, min(k, V)))
    assert torch.equal(ids, student.topk_ids(k))
    assert_close(values, logprobs(z, ids))


@pytest.mark.parametrize("form", ["dense", "hidden"])
def test_weighted_sum_also_returns_the_values_without_gradient(form: str):
    x = random_inputs()
    z = head_logits(x["hidden"], x["weight"]).requires_grad_()
    hidden = x["hidden"].requires_grad_()
    student = (
        TokenDistribution.from_hidden(hidden, x["weight"], chunk_size=2)
        if form == "hidden"
        else TokenDistribution.from_logits(z)
    )
    _, values = student.weighted_sum(kl, x["extra"], TokenDistribution.from_logits(x["teacher"]))
    assert not values.requires_grad
    assert_close(values, kl(z, x["teacher"]).detach())


@pytest.mark.parametrize("read", [r for r in READS if r != "weighted_sum"])
def test_gradcheck_of_reads_from_hidden(read: str):
    call, _ = READS[read]
    x = random_inputs(3)
    teacher = TokenDistribution.from_logits(x["teacher"])

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        student = TokenDistribution.from_hidden(
            hidden, weight, bias, softcap=3.0, scale=0.8, temperature=1.2, chunk_size=2
        )
        return call(student, teacher, x["ids"], x["extra"])

    leaves = [x[n].requires_grad_() for n in ("hidden", "weight", "bias")]
    assert torch.autograd.gradcheck(function, leaves)


def test_weighted_sum_gradient_agrees_with_finite_differences():
    x = random_inputs(3)
    teacher = TokenDistribution.from_logits(x["teacher"])
    hidden = x["hidden"].requires_grad_()

    def function(h: Tensor) -> Tensor:
        student = TokenDistribution.from_hidden(h, x["weight"], chunk_size=2)
        return student.weighted_sum(kl, x["extra"], teacher)[0]

    (gradient,) = torch.autograd.grad(function(hidden), hidden)
    for place in [(0, 0), (1, 3), (2, 4)]:
        step = torch.zeros_like(hidden)
        step[place] = 1e-6
        slope = (function(hidden.detach() + step) - function(hidden.detach() - step)) / 2e-6
        assert abs(float(slope - gradient[place])) < 1e-7


def test_weighted_sum_scales_its_gradient_by_what_arrives_from_above():
    x = leaves_of(random_inputs(), ["hidden", "weight"])
    teacher = TokenDistribution.from_logits(x["teacher"])

    def loss() -> Tensor:
        student = TokenDistribution.from_hidden(x["hidden"], x["weight"], chunk_size=2)
        return student.weighted_sum(kl, x["extra"], teacher)[0]

    once = torch.autograd.grad(loss(), [x["hidden"], x["weight"]])
    scaled = torch.autograd.grad(-2.5 * loss(), [x["hidden"], x["weight"]])
    for one, other in zip(once, scaled, strict=True):
        assert_close(other, -2.5 * one)


def test_second_backward_through_weighted_sum_says_what_to_do():
    x = leaves_of(random_inputs(), ["hidden"])
    student = TokenDistribution.from_hidden(x["hidden"], x["weight"], chunk_size=2)
    loss, _ = student.weighted_sum(kl, x["extra"], TokenDistribution.from_logits(x["teacher"]))
    loss.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match=r"already used.*once.*Call the objective again.*token_loss"
    ):
        loss.backward()
