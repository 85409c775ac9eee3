"""Low-precision inputs: fp32 inside, no worse than plain fp32 code on the same rounded numbers."""

import pytest
import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from tests.distributions.reference import READS, head_logits

N, D, V = 9, 16, 40
# a logit minus a logsumexp: autograd adds the two gradients in the inputs' own dtype
TWO_READS = ["logprobs_n", "logprobs_nk", "topk"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def rounded_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    shapes = {"hidden": (N, D), "weight": (V, D), "bias": (V,), "teacher": (N, V)}
    x = {k: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for k, s in shapes.items()}
    x["ids"] = torch.randint(V, (N, 3), generator=g)
    x["extra"] = torch.randn(N, generator=g)
    return x


def run(x: dict[str, Tensor], form: str, read: str) -> tuple[Tensor, list[Tensor]]:
    """Return the value and the gradients of hidden, weight and bias of `form`."""
    leaves = [x[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")]
    call, definition = READS[read]
    if form == "ours":
        student = TokenDistribution.from_hidden(*leaves, chunk_size=4)
        teacher = TokenDistribution.from_logits(x["teacher"])
        value = call(student, teacher, x["ids"], x["extra"])
    else:
        dtype = torch.float64 if form == "truth" else torch.float32
        z = head_logits(*[leaf.to(dtype) for leaf in leaves])
        value = definition(z, x["teacher"].to(dtype), x["ids"], x["extra"].to(dtype))
    # a fixed upstream gradient, so that the sum does not cancel
    total = (value * torch.linspace(0.5, 1.5, value.numel()).reshape(value.shape).to(value)).sum()
    return value.detach(), list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("read", READS)
def test_error_is_no_worse_than_that_of_plain_fp32_code(read: str, dtype: torch.dtype):
    x = rounded_inputs(dtype)
    ours, our_gradients = run(x, "ours", read)
    plain, plain_gradients = run(x, "plain", read)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    truth, true_gradients = run(wide, "truth", read)
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
        if read in TWO_READS:
            allowed += 3 * torch.finfo(dtype).eps * float(t.abs().max())
        worst = (a.double() - t).abs().argmax()
        seen = [float(m.flatten()[worst]) for m in (a, b, t)]
        assert error(a, t) <= allowed, f"{name}: ours, plain, truth at the worst place: {seen}"


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("read", READS)
def test_autocast_changes_neither_values_nor_gradients(read: str, dtype: torch.dtype):
    x = rounded_inputs(dtype)
    value, gradients = run(x, "ours", read)
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16, "autocast is on"
        under, gradients_under = run(x, "ours", read)
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
