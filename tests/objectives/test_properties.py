"""Every objective on drawn shapes, dtypes, supports, masks and impossible tokens."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from opd_lightning.objectives import Objective, ObjectiveOutput
from opd_lightning.records import Rollout
from tests.objectives.cases import V, inputs
from tests.objectives.reference import BATTERY, build

# what two ways to the same number may differ by, relative to the largest number and at least 1
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 2e-4}
FORMS = ("dense", "chunked")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What hypothesis draws; the numbers follow from the seed.

    Attributes:
        lengths: Completion tokens of each row.
        vocab: Ids of the vocabulary, 2 to 12.
        k: Support size: "2", or with respect to the vocabulary.
        chunk: Positions of a chunk.
        dtype: Of the hidden states; the head is fp32 at least.
        counts: For each token in turn, whether it has a weight.
        sharp: Factor on both models' logits; 30 makes them nearly deterministic.
        seed: Of all numbers.
    """

    lengths: tuple[int, ...]
    vocab: int
    k: str
    chunk: int
    dtype: torch.dtype
    counts: tuple[bool, ...]
    sharp: float
    seed: int

    @property
    def row(self) -> Tensor:
        return torch.repeat_interleave(
            torch.arange(len(self.lengths)), torch.tensor(self.lengths, dtype=torch.long)
        )

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1000)

    def objective(self, name: str, vocab: int | None = None) -> Objective:
        """The objective with every k it has, also in the terms of a mixture, set to the drawn."""
        vocab = vocab or self.vocab
        k = {"2": 2, "V-1": max(2, vocab - 1), "V": vocab, "V+3": vocab + 3}[self.k]
        made = copy.deepcopy(build(name))
        for part in [made, *getattr(made, "objectives", [])]:
            for setting in ("k", "baseline_k"):
                if getattr(part, setting, None) is not None:
                    setattr(part, setting, k)
        return made


DRAWN = st.builds(
    Drawn,
    lengths=st.lists(st.integers(0, 3), max_size=4).map(tuple),
    vocab=st.integers(2, V),
    k=st.sampled_from(["2", "V-1", "V", "V+3"]),
    chunk=st.integers(1, 5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    counts=st.lists(st.booleans(), min_size=12, max_size=12).map(tuple),
    sharp=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 99),
)
NO_TOKENS = Drawn((0, 0), 5, "2", 2, torch.float32, (True,) * 12, 1.0, 0)
TWO_IDS = Drawn((2,), 2, "2", 1, torch.float64, (True,) * 12, 1.0, 0)
ONE_TOKEN = Drawn((0, 1), 2, "V+3", 1, torch.bfloat16, (True,) * 12, 1.0, 1)


@dataclasses.dataclass
class Problem:
    """One set of numbers: N tokens, ids below `vocab`."""

    leaves: list[Tensor]
    teacher_logits: Tensor
    rollout: Rollout
    weights: Tensor


def problem(drawn: Drawn) -> Problem:
    """Cut the battery's inputs to the drawn vocabulary; a token that does not count weighs 0."""
    wide = torch.float64 if drawn.dtype == torch.float64 else torch.float32
    x = inputs(drawn.row, drawn.seed, wide)
    ids = x.rollout.input_ids % drawn.vocab
    n = len(drawn.row)
    counts = torch.tensor(drawn.counts[:n], dtype=torch.bool)
    weights = torch.rand(n, generator=drawn.generator, dtype=torch.float64) + 0.1
    return Problem(
        [
            (drawn.sharp * x.hidden).to(drawn.dtype),
            x.weight[: drawn.vocab],
            x.bias[: drawn.vocab],
        ],
        drawn.sharp * x.teacher_logits[:, : drawn.vocab],
        dataclasses.replace(x.rollout, input_ids=ids),
        torch.where(counts, weights, 0.0),
    )


def run(
    objective: Objective, form: str, x: Problem, chunk: int
) -> tuple[ObjectiveOutput, list[Tensor]]:
    """Return the output and the gradients of hidden, weight and bias."""
    leaves = [leaf.clone().requires_grad_() for leaf in x.leaves]
    if form == "chunked":
        student = TokenDistribution.from_hidden(*leaves, chunk_size=chunk)
    else:
        hidden, weight, bias = leaves
        student = TokenDistribution.from_logits(hidden.to(weight.dtype) @ weight.T + bias)
    teacher = TokenDistribution.from_logits(x.teacher_logits)
    output = objective(student, teacher, x.rollout, x.weights)
    return output, list(torch.autograd.grad(output.loss, leaves))


def assert_same(actual: Tensor, wanted: Tensor, drawn: Drawn, what: str) -> None:
    assert actual.dtype == wanted.dtype and actual.shape == wanted.shape, what
    assert actual.isfinite().all(), f"{what}: {actual}"
    if not wanted.numel():
        return
    # logits of size s round by s * eps, and their gradient is multiplied by hidden states of size s
    bound = TOLERANCE[drawn.dtype] * drawn.sharp**2
    if actual.dtype == torch.bfloat16:
        bound += torch.finfo(torch.bfloat16).eps  # a rounding the one way or the other
    difference = float((actual.double() - wanted.double()).abs().max())
    assert difference <= bound * max(1.0, float(wanted.abs().max())), f"{what}: {actual}, {wanted}"


def assert_same_runs(seen: tuple, wanted: tuple, drawn: Drawn, what: str) -> None:
    assert_same(seen[0].loss.detach(), wanted[0].loss.detach(), drawn, f"loss, {what}")
    for leaf, a, b in zip(("hidden", "weight", "bias"), seen[1], wanted[1], strict=True):
        assert_same(a, b, drawn, f"gradient of {leaf}, {what}")


@settings(max_examples=4, deadline=None)
@given(drawn=DRAWN)
@example(drawn=NO_TOKENS)
@example(drawn=ONE_TOKEN)
@pytest.mark.parametrize("name", BATTERY)
def test_dense_and_chunked_agree_and_are_the_weighted_sum_of_token_losses(name: str, drawn: Drawn):
    objective, x = drawn.objective(name), problem(drawn)
    dense, chunked = (run(objective, form, x, drawn.chunk) for form in FORMS)
    assert_same_runs(chunked, dense, drawn, "chunked")
    assert_same(chunked[0].token_loss, dense[0].token_loss, drawn, "token losses")
    for output, _ in (dense, chunked):
        assert output.token_loss.shape == x.weights.shape and not output.token_loss.requires_grad
        total = (x.weights * output.token_loss).sum()
        assert_same(output.loss.detach().double(), total, drawn, "weighted sum")
        for key, value in output.metrics.items():
            assert value.shape == x.weights.shape and value.isfinite().all(), key


@settings(max_examples=4, deadline=None)
@given(drawn=DRAWN, value=st.sampled_from([torch.nan, -torch.inf, torch.inf]), whole=st.booleans())
@pytest.mark.parametrize("name", BATTERY)
def test_a_teacher_that_is_not_finite_where_nothing_counts(
    name: str, drawn: Drawn, value: float, whole: bool
):
    objective, x = drawn.objective(name), problem(drawn)
    ignored = x.weights == 0
    places = torch.rand(x.teacher_logits.shape, generator=drawn.generator) < (1.0 if whole else 0.5)
    bad = x.teacher_logits.masked_fill(ignored[:, None] & places, value)
    # a token may answer for the later ones of its row
    row, counted = x.rollout.row, ~ignored
    before = (row[:, None] == row) & torch.ones(len(row), len(row)).tril(-1).bool() & counted
    alone = not bool((ignored & before.any(1)).any())
    for form in FORMS:
        seen = run(objective, form, dataclasses.replace(x, teacher_logits=bad), drawn.chunk)
        assert_same_runs(seen, run(objective, form, x, drawn.chunk) if alone else seen, drawn, form)
        assert seen[0].token_loss[counted].isfinite().all()


@settings(max_examples=4, deadline=None)
@given(drawn=DRAWN)
@example(drawn=TWO_IDS)
@pytest.mark.parametrize("name", BATTERY)
def test_a_teacher_that_excludes_an_id_is_the_limit_of_unlikelier_and_unlikelier(
    name: str, drawn: Drawn
):
    # not so sharp that the student's own mass on the id hides whether there is a limit
    drawn = dataclasses.replace(drawn, dtype=torch.float64, sharp=1.0)
    objective, x = drawn.objective(name), problem(drawn)
    n = len(drawn.row)
    excluded = torch.randint(drawn.vocab, (n,), generator=drawn.generator)
    # never the sampled id: there the cost is infinite for good
    places = torch.nn.functional.one_hot(excluded, drawn.vocab).bool()
    places &= (excluded != x.rollout.token_ids)[:, None]

    def with_excluded(logit: float, weights: Tensor) -> Problem:
        teacher_logits = x.teacher_logits.masked_fill(places, logit)
        return dataclasses.replace(x, teacher_logits=teacher_logits, weights=weights)

    losses = [
        run(objective, "dense", with_excluded(logit, x.weights), 1)[0].token_loss
        for logit in (-200.0, -400.0)
    ]
    has_limit = (losses[0] - losses[1]).abs() < 1e-9
    weights = torch.where(has_limit, x.weights, 0.0)
    for form in FORMS:
        wanted = run(objective, form, with_excluded(-400.0, weights), drawn.chunk)
        seen = run(objective, form, with_excluded(-torch.inf, weights), drawn.chunk)
        assert_same_runs(seen, wanted, drawn, form)
        counted = weights != 0
        assert_same(seen[0].token_loss[counted], losses[1][counted], drawn, "token losses")


@settings(max_examples=4, deadline=None)
@given(drawn=DRAWN, added=st.integers(1, 3))
@pytest.mark.parametrize("name", BATTERY)
def test_ids_that_both_models_exclude_are_as_if_they_were_not_there(
    name: str, drawn: Drawn, added: int
):
    # all count: where nothing counts, the teacher's -inf becomes a logit that the student excludes
    drawn = dataclasses.replace(drawn, counts=(True,) * 12)
    small, vocab = problem(drawn), drawn.vocab + added
    objective = drawn.objective(name, vocab)
    kept = torch.randperm(vocab, generator=drawn.generator)[: drawn.vocab].sort().values
    hidden, weight, bias = small.leaves
    wide_weight = torch.randn(vocab, weight.shape[1], generator=drawn.generator).to(weight)
    wide_weight[kept] = weight
    wide_bias = torch.full((vocab,), -torch.inf, dtype=bias.dtype)
    wide_bias[kept] = bias
    wide_teacher = torch.full((len(hidden), vocab), -torch.inf, dtype=bias.dtype)
    wide_teacher[:, kept] = small.teacher_logits
    rollout = dataclasses.replace(small.rollout, input_ids=kept[small.rollout.input_ids])
    large = Problem([hidden, wide_weight, wide_bias], wide_teacher, rollout, small.weights)
    for form in FORMS:
        output, gradients = run(objective, form, large, drawn.chunk)
        for gradient in gradients:
            assert gradient.isfinite().all()
        on_kept = [gradients[0], gradients[1][kept], gradients[2][kept]]
        assert_same_runs((output, on_kept), run(objective, form, small, drawn.chunk), drawn, form)
        excluded = torch.ones(vocab, dtype=torch.bool).index_fill(0, kept, False)
        assert not gradients[1][excluded].any() and not gradients[2][excluded].any()
