"""Reads on drawn shapes, dtypes and chunks, by definition; ids may repeat, k may exceed V."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from tests.distributions.reference import best_ids, head_logits, logprobs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def leaves_of(n: int, d: int, v: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(n, d), (v, d), (v,)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def student_of(form: str, leaves: list[Tensor], chunk: int) -> TokenDistribution:
    if form == "hidden":
        return TokenDistribution.from_hidden(*leaves, chunk_size=chunk)
    wide = torch.float64 if leaves[0].dtype == torch.float64 else torch.float32
    return TokenDistribution.from_logits(head_logits(*[leaf.to(wide) for leaf in leaves]))


def assert_value_and_gradients(
    value: Tensor, leaves: list[Tensor], wanted: Tensor, wide: list[Tensor]
) -> None:
    dtype = leaves[0].dtype
    read = 1e-11 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(value.double(), wanted, rtol=read, atol=read)
    up = torch.linspace(-1, 2, max(1, value.numel()), dtype=torch.float64)[: value.numel()]
    up = up.reshape(value.shape)
    found = torch.autograd.grad((value * up).sum(), leaves)
    truth = torch.autograd.grad((wanted * up).sum(), wide)
    for actual, true in zip(found, truth, strict=True):
        assert actual.dtype == dtype
        bound = TOLERANCE[dtype] * max(1.0, float(true.abs().max()) if true.numel() else 0.0)
        torch.testing.assert_close(actual.double(), true, rtol=0, atol=bound)


SHAPES = {
    "n": st.integers(0, 6),
    "d": st.integers(1, 4),
    "v": st.integers(2, 9),
    "chunk": st.integers(1, 8),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 999),
}


@settings(max_examples=60, deadline=None)
@given(**SHAPES, k=st.integers(1, 5), same=st.booleans())
@example(n=0, d=1, v=2, chunk=1, dtype=torch.bfloat16, seed=0, k=3, same=True)
@example(n=1, d=1, v=2, chunk=1, dtype=torch.float16, seed=0, k=5, same=True)
@pytest.mark.parametrize("form", ["dense", "hidden"])
def test_logprobs_of_ids_that_may_repeat(
    form: str, n: int, d: int, v: int, chunk: int, dtype: torch.dtype, seed: int, k: int, same: bool
):
    leaves = [leaf.requires_grad_() for leaf in leaves_of(n, d, v, dtype, seed)]
    ids = torch.randint(v, (n, k), generator=torch.Generator().manual_seed(seed))
    if same:
        ids = ids[:, :1].repeat(1, k)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    value = student_of(form, leaves, chunk).logprobs(ids)
    assert value.shape == (n, k)
    assert_value_and_gradients(value, leaves, logprobs(head_logits(*wide), ids), wide)


@settings(max_examples=60, deadline=None)
@given(**SHAPES, k=st.sampled_from(["1", "2", "V-1", "V", "V+3"]))
@example(n=0, d=1, v=2, chunk=1, dtype=torch.bfloat16, seed=0, k="V+3")
@pytest.mark.parametrize("form", ["dense", "hidden"])
def test_topk_at_the_limits_of_k(
    form: str, n: int, d: int, v: int, chunk: int, dtype: torch.dtype, seed: int, k: str
):
    leaves = [leaf.requires_grad_() for leaf in leaves_of(n, d, v, dtype, seed)]
    size = {"1": 1, "2": 2, "V-1": v - 1, "V": v, "V+3": v + 3}[k]
    ids, value = student_of(form, leaves, chunk).topk(size)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    z = head_logits(*wide)
    assert ids.shape == value.shape == (n, min(size, v))
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    # equal logits may come in either order, so the values are compared and not the ids
    if n:
        best = logprobs(z, best_ids(z, min(size, v)))
        torch.testing.assert_close(value.detach().double(), best.detach(), rtol=2e-5, atol=2e-5)
    assert_value_and_gradients(value, leaves, logprobs(z, ids), wide)
