"""No N x V numbers exist at any moment, forward or backward: counted, not believed."""

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from opd_lightning.distributions import TokenDistribution
from tests.distributions.reference import READS, kl

N, D, V, CHUNK = 210, 3, 96, 4


class Ledger(TorchDispatchMode):
    """Records the largest tensor made and the most numbers alive at once, in float64 units."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                self._alive[ref.cdata] = (ref, storage.nbytes() // 8)
                self.largest = max(self.largest, tensor.numel())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(numbers for _, numbers in self._alive.values()))
        return out


def measure(form: str, read: str, differentiable: bool = True) -> Ledger:
    g = torch.Generator().manual_seed(0)
    hidden, weight, teacher_weight = (
        torch.randn(*s, generator=g, dtype=torch.float64) for s in [(N, D), (V, D), (V, D)]
    )
    extra = torch.randn(N, generator=g, dtype=torch.float64)
    ids = torch.randint(V, (N, 3), generator=g)
    leaves = [hidden.requires_grad_(differentiable), weight.requires_grad_(differentiable)]
    call = {**{k: v[0] for k, v in READS.items()}, **VIEWS}[read]
    with Ledger() as ledger:
        if form == "dense":
            student = TokenDistribution.from_logits(hidden @ weight.T)
            teacher = TokenDistribution.from_logits(hidden.detach() @ teacher_weight.T)
        else:
            student = TokenDistribution.from_hidden(*leaves, chunk_size=CHUNK)
            teacher = TokenDistribution.from_hidden(
                hidden.detach(), teacher_weight, chunk_size=CHUNK
            )
        value = call(student, teacher, ids, extra)
        if differentiable and value.requires_grad:
            torch.autograd.grad(value.sum(), leaves)
    return ledger


# reads whose values are views of a chunk's logits, and those that ask for ids only
VIEWS = {
    "topk_ids": lambda s, q, i, e: s.topk_ids(3),
    "first_logit": lambda s, q, i, e: s.read(lambda logits: logits[:, 0]),
    "first_logits": lambda s, q, i, e: s.read(lambda logits: logits[:, :2]),
}


@pytest.mark.parametrize("differentiable", [True, False], ids=["student", "teacher"])
@pytest.mark.parametrize("read", [*READS, *VIEWS])
def test_no_tensor_and_no_moment_holds_n_times_v_numbers(read: str, differentiable: bool):
    assert N > 50 * CHUNK, "the number of positions is to be much larger than a chunk"
    ledger = measure("hidden", read, differentiable)
    assert 0 < ledger.largest <= max(CHUNK * V, N * 4, V * D)
    assert ledger.peak < N * V / 2


@pytest.mark.parametrize("read", READS)
def test_the_dense_form_exceeds_that_bound(read: str):
    ledger = measure("dense", read)
    assert ledger.largest >= N * V
    assert ledger.peak >= N * V


def test_nothing_of_size_n_times_v_is_saved_for_backward():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=g, requires_grad=True)
    weight = torch.randn(V, D, generator=g)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    teacher = TokenDistribution.from_hidden(hidden.detach(), weight.flip(0), chunk_size=CHUNK)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        student = TokenDistribution.from_hidden(hidden, weight, chunk_size=CHUNK)
        student.reverse_kl(teacher)
        student.weighted_sum(kl, torch.ones(N), teacher)
        student.logprobs(torch.zeros(N, dtype=torch.long))
        assert max(saved) < N * V
        saved.clear()
        TokenDistribution.from_logits(hidden @ weight.T).reverse_kl(teacher)
        assert max(saved) >= N * V, "the dense form is caught by the same hook"


def test_logits_at_reads_only_the_rows_asked_for():
    weight = torch.full((V, D), torch.nan, dtype=torch.float64)
    ids = torch.tensor([[3, 5], [5, 7]])
    weight[[3, 5, 7]] = 1.0
    hidden = torch.ones(2, D, dtype=torch.float64, requires_grad=True)
    logits = TokenDistribution.from_hidden(hidden, weight).logits_at(ids)
    logits.sum().backward()
    assert torch.equal(logits, torch.full((2, 2), float(D), dtype=torch.float64))
    assert hidden.grad.isfinite().all()


def test_a_low_precision_head_is_not_copied_by_a_read_of_some_rows():
    # the stand-in that receives its gradient in fp32 has the shape of the head and no memory
    n, d, v = 2, 32, 500
    hidden = torch.ones(n, d, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(v, d, dtype=torch.bfloat16, requires_grad=True)
    with Ledger() as ledger:
        TokenDistribution.from_hidden(hidden, weight).logits_at(torch.tensor([[3, 5], [5, 7]]))
    assert 0 < ledger.peak < v * d * 2 / 8 / 10, "a tenth of the head's bytes"


def test_the_chunk_follows_from_the_byte_budget_when_not_given():
    n, v = 3, 10_000_000  # one row of fp32 logits takes 40 MB, so two rows fill the budget
    hidden, weight = torch.ones(n, 1), torch.ones(v, 1)
    student = TokenDistribution.from_hidden(hidden, weight)
    seen = []
    student.read(lambda logits: seen.append(len(logits)) or logits[:, 0])
    assert sum(seen) == n
    assert max(seen) == 1, "a block of one row"
