"""Low-precision inputs: fp32 inside, no worse than plain fp32 code on the same rounded numbers."""

import pytest
import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from tests.distributions.reference import READS, head_logits

N, D, V = 9, 16, 40
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def rounded_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    shapes = {"hidden": (N, D), "weight": (V, D), "bias": (V,), "teacher": (N, V)}
    x = {k: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for k, s in shapes.items()}
    x["ids"] = torch.randint(V, (N, 3), generator=g)
    x["extra"] = torch.randn(N, generator=g)
    return x


def run(x: dict[str, Tensor], form: str, reads: list[str]) -> tuple[Tensor, list[Tensor]]:
    """Return the values that `form` reads one after the other, and the gradients of their sum."""
    leaves = [x[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")]
    if form == "ours":
        student = TokenDistribution.from_hidden(*leaves, chunk_size=4)
        teacher = TokenDistribution.from_logits(x["teacher"])
        values = [READS[read][0](student, teacher, x["ids"], x["extra"]) for read in reads]
    else:
        dtype = torch.float64 if form == "truth" else torch.float32
        z, t = head_logits(*[leaf.to(dtype) for leaf in leaves]), x["teacher"].to(dtype)
        values = [READS[read][1](z, t, x["ids"], x["extra"].to(dtype)) for read in reads]
    value = torch.cat([v.flatten() for v in values])
    # a fixed upstream gradient, so that the sum does not cancel
    total = (value * torch.linspace(0.5, 1.5, value.numel()).to(value)).sum()
    return value.detach(), list(torch.autograd.grad(total, leaves))


def assert_no_worse_than_plain_fp32_code(reads: list[str], dtype: torch.dtype) -> None:
    x = rounded_inputs(dtype)
    ours, our_gradients = run(x, "ours", reads)
    plain, plain_gradients = run(x, "plain", reads)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    truth, true_gradients = run(wide, "truth", reads)
    assert ours.dtype == torch.float32

    def error(value: Tensor, true: Tensor) -> float:
        return float((value.double() - true).abs().max())

    scale = max(1.0, float(truth.abs().max()))
    assert error(ours, truth) <= error(plain, truth) + 1e-6 * scale
    for name, a, b, t in zip(
        ("hidden", "weight", "bias"), our_gradients, plain_gradients, true_gradients, strict=True
    ):
        assert a.dtype == dtype, name
        allowed = error(b, t) + 1e-6 * max(1.0, float(t.abs().max()))
        worst = (a.double() - t).abs().argmax()
        seen = [float(m.flatten()[worst]) for m in (a, b, t)]
        assert error(a, t) <= allowed, f"{name}: ours, plain, truth at the worst place: {seen}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("read", READS)
def test_error_is_no_worse_than_that_of_plain_fp32_code(read: str, dtype: torch.dtype):
    assert_no_worse_than_plain_fp32_code([read], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reads", [
    ["logprobs_n", "logprobs_nk", "entropy"],
    ["reverse_kl", "logits_at"],
    ["weighted_sum", "logsumexp", "weighted_sum"],
    list(READS),
], ids=" ".join)  # fmt: skip
def test_several_reads_in_one_loss_are_rounded_once(reads: list[str], dtype: torch.dtype):
    assert_no_worse_than_plain_fp32_code(reads, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dense_logits_of_low_precision_are_read_in_fp32(dtype: torch.dtype):
    x = rounded_inputs(dtype)
    for read, (call, definition) in READS.items():
        student = TokenDistribution.from_logits(x["teacher"])
        teacher = TokenDistribution.from_logits(x["teacher"].flip(0))
        value = call(student, teacher, x["ids"], x["extra"])
        wide = x["teacher"].double()
        expected = definition(wide, wide.flip(0), x["ids"], x["extra"].double())
        assert value.dtype == torch.float32, read
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_dense_logits_of_low_precision_is_rounded_once(dtype: torch.dtype):
    x = rounded_inputs(dtype)
    teacher = x["teacher"].flip(0)

    def gradient(z: Tensor, values: list[Tensor]) -> Tensor:
        return torch.autograd.grad(sum(v.sum() for v in values), z)[0]

    z = x["teacher"].clone().requires_grad_()
    student, other = TokenDistribution.from_logits(z), TokenDistribution.from_logits(teacher)
    ours = gradient(z, [call(student, other, x["ids"], x["extra"]) for call, _ in READS.values()])
    wide = x["teacher"].double().requires_grad_()
    extra = x["extra"].double()
    truth = gradient(wide, [d(wide, teacher.double(), x["ids"], extra) for _, d in READS.values()])
    assert ours.dtype == dtype
    assert (ours.double() - truth.to(dtype).double()).abs().max() <= 2e-5 * truth.abs().max()


def test_float64_stays_float64():
    x = rounded_inputs(torch.float64)
    for read, (call, _) in READS.items():
        for student in (
            TokenDistribution.from_logits(x["teacher"]),
            TokenDistribution.from_hidden(x["hidden"], x["weight"], chunk_size=4),
        ):
            teacher = TokenDistribution.from_logits(x["teacher"])
            value = call(student, teacher, x["ids"], x["extra"].double())
            assert value.dtype == torch.float64, read


def test_fp32_bias_of_a_bf16_head_keeps_its_gradient_in_fp32():
    x = rounded_inputs(torch.bfloat16)
    bias = x["bias"].float().requires_grad_()
    student = TokenDistribution.from_hidden(x["hidden"], x["weight"], bias, chunk_size=4)
    student.entropy().sum().backward()
    reference = x["bias"].double().requires_grad_()
    z = head_logits(x["hidden"].double(), x["weight"].double(), reference)
    READS["entropy"][1](z, None, None, None).sum().backward()
    assert bias.grad.dtype == torch.float32
    torch.testing.assert_close(bias.grad.double(), reference.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("hidden", "weight", "bias"), [
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float64, torch.float32, torch.bfloat16),
    (torch.float32, torch.float64, torch.float64),
], ids=str)  # fmt: skip
def test_each_gradient_has_the_dtype_of_its_input(
    hidden: torch.dtype, weight: torch.dtype, bias: torch.dtype
):
    x = rounded_inputs(torch.bfloat16)
    dtypes = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = [x[name].to(dtype).requires_grad_() for name, dtype in dtypes.items()]
    student = TokenDistribution.from_hidden(*leaves, chunk_size=4)
    loss = student.logprobs(x["ids"]).sum() + student.entropy().sum()
    truth = [x[name].double().requires_grad_() for name in dtypes]
    z = head_logits(*truth)
    true_loss = sum(
        READS[read][1](z, None, x["ids"], None).sum() for read in ("logprobs_nk", "entropy")
    )
    for leaf, found, wanted in zip(
        leaves,
        torch.autograd.grad(loss, leaves),
        torch.autograd.grad(true_loss, truth),
        strict=True,
    ):
        assert found.dtype == leaf.dtype
        bound = max(1e-5, torch.finfo(leaf.dtype).eps) * float(wanted.abs().max())
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_of_one_distribution_can_be_differentiated_one_by_one(dtype: torch.dtype):
    x = rounded_inputs(dtype)
    leaves = [x[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")]
    student = TokenDistribution.from_hidden(*leaves, chunk_size=4)
    losses = [student.entropy().sum(), student.logits_at(x["ids"]).sum()]
    for loss in losses:
        fresh = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        alone = TokenDistribution.from_hidden(*fresh, chunk_size=4)
        wanted = alone.entropy() if loss is losses[0] else alone.logits_at(x["ids"])
        for found, truth in zip(
            torch.autograd.grad(loss, leaves, allow_unused=True),
            torch.autograd.grad(wanted.sum(), fresh, allow_unused=True),
            strict=True,
        ):
            assert torch.equal(found, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_distribution_made_without_a_gradient_gives_one_to_a_later_read(dtype: torch.dtype):
    x = rounded_inputs(dtype)
    leaves = [x[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")]
    with torch.no_grad():
        student = TokenDistribution.from_hidden(*leaves, chunk_size=4)
        assert not student.logprobs(x["ids"]).requires_grad
    for gradient in torch.autograd.grad(student.logprobs(x["ids"]).sum(), leaves):
        assert gradient.dtype == dtype and gradient.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_mode_gives_the_same_values(dtype: torch.dtype):
    x = rounded_inputs(dtype)
    leaves = [x[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")]
    teacher = TokenDistribution.from_logits(x["teacher"])
    for call, _ in READS.values():
        value = call(TokenDistribution.from_hidden(*leaves), teacher, x["ids"], x["extra"])
        with torch.inference_mode():
            student = TokenDistribution.from_hidden(*leaves)
            inside = call(student, teacher, x["ids"], x["extra"])
        torch.testing.assert_close(inside, value.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("read", READS)
def test_autocast_changes_neither_values_nor_gradients(read: str, dtype: torch.dtype):
    x = rounded_inputs(dtype)
    value, gradients = run(x, "ours", [read])
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16, "autocast is on"
        under, gradients_under = run(x, "ours", [read])
    assert torch.equal(value, under)
    for one, other in zip(gradients, gradients_under, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("read", READS)
def test_autocast_leaves_the_dense_form_alone(read: str):
    x = rounded_inputs(torch.float32)
    student = TokenDistribution.from_logits(x["teacher"])
    teacher = TokenDistribution.from_logits(x["teacher"].flip(1))
    value = READS[read][0](student, teacher, x["ids"], x["extra"])
    with torch.autocast("cpu", torch.bfloat16):
        student = TokenDistribution.from_logits(x["teacher"])
        assert torch.equal(READS[read][0](student, teacher, x["ids"], x["extra"]), value)
