"""`opd study bigram`: bias and variance of sequence-level gradients, by length and discount.

A language model of three tokens whose student and teacher see only the previous token. Up to eight
tokens all 3^T completions are enumerated, so bias and variance are exact; beyond, they are sampled.
The study of arXiv 2603.25562's claim that the discount gamma trades bias for variance;
docs/mathematics.md, section 2.

C completions of T tokens each, 4 states (the previous token, or the start), 3 tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from opd_lightning.objectives import Objective, SampledTokenReverseKL, SequenceReverseKL
from opd_lightning.objectives.base import check_at_least
from opd_lightning.records import Rollout
from opd_lightning.study.bigram_figure import draw
from opd_lightning.study.tables import Row, write_csv

TOKENS, START = 3, 3
GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
ENUMERATED_LENGTHS = (1, 2, 4, 6, 8)
SAMPLED_LENGTHS = (4, 8, 16, 32, 64, 128)
_TOKENS_AT_ONCE = 2**18  # about 100 MB in the backward pass

# tokens [C, T] -> the gradient on the student's logits of each completion, [C, 4, 3]
Estimator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Bigram:
    """Logits of the next token after each token and at the start.

    Attributes:
        student: [4, 3] float64, row 3 the start.
        teacher: [4, 3].
    """

    student: Tensor
    teacher: Tensor

    @classmethod
    def draw(cls, seed: int = 0) -> "Bigram":
        """Draw both from a standard normal of numpy's default generator, the student first."""
        rng = np.random.default_rng(seed)
        return cls(*[torch.from_numpy(rng.standard_normal((4, TOKENS))) for _ in range(2)])

    def sequence_kl(self, length: int, student: Tensor | None = None) -> Tensor:
        """Return KL(student || teacher) of whole completions in nats, exact and differentiable.

        Carries the distribution of the state along: no completion is enumerated or sampled, so
        that its gradient is independent of every estimator.
        """
        log_p = (self.student if student is None else student).log_softmax(1)
        cost = (log_p.exp() * (log_p - self.teacher.log_softmax(1))).sum(1)
        state = torch.eye(4, dtype=cost.dtype)[START]
        total = cost.new_zeros(())
        for _ in range(length):
            total = total + state @ cost
            state = torch.cat([state @ log_p.exp(), state.new_zeros(1)])
        return total

    def exact_gradient(self, length: int) -> Tensor:
        """Return the gradient of `sequence_kl` on the student's logits, [4, 3]."""
        leaf = self.student.clone().requires_grad_()
        return torch.autograd.grad(self.sequence_kl(length, leaf), leaf)[0]

    def probabilities(self, tokens: Tensor) -> Tensor:
        """Return the student's probability of each completion, [C]."""
        return self.student.log_softmax(1)[states(tokens), tokens].sum(1).exp()

    def sample(self, length: int, count: int, rng: np.random.Generator) -> Tensor:
        """Draw [count, length] tokens from the student: one uniform number each, step by step."""
        cumulative = self.student.softmax(1).cumsum(1).numpy()
        state, tokens = np.full(count, START), np.empty((count, length), dtype=np.int64)
        for t in range(length):
            above = rng.random(count)[:, None] > cumulative[state]
            # the last cumulative sum may round to just below 1
            state = tokens[:, t] = np.minimum(above.sum(1), TOKENS - 1)
        return torch.from_numpy(tokens)

    def estimator(self, objective: Objective) -> Estimator:
        """Return the estimator that sums an objective's token losses over each completion."""

        def gradients(tokens: Tensor) -> Tensor:
            seen = states(tokens).flatten()
            leaf = self.student[seen].requires_grad_()
            row = torch.arange(len(tokens)).repeat_interleave(tokens.shape[1])
            loss = objective(
                TokenDistribution.from_logits(leaf),
                TokenDistribution.from_logits(self.teacher[seen]),
                Rollout.from_flat(tokens.flatten(), row),
                torch.ones(tokens.numel(), dtype=leaf.dtype),
            ).loss
            return _by_state(torch.autograd.grad(loss, leaf)[0], tokens)

        return gradients

    def non_causal(self, tokens: Tensor) -> Tensor:
        """Return R S of each completion, [C, 4, 3]: every token answers for the whole cost R."""
        seen = states(tokens)
        log_ratio = self.student.log_softmax(1) - self.teacher.log_softmax(1)
        total = log_ratio[seen, tokens].sum(1)
        score = torch.eye(TOKENS, dtype=total.dtype)[tokens] - self.student.softmax(1)[seen]
        return _by_state((total[:, None, None] * score).flatten(0, 1), tokens)


def states(tokens: Tensor) -> Tensor:
    """Return the state in which each of the tokens [C, T] was chosen, [C, T]."""
    start = torch.full((len(tokens), 1), START)
    return torch.cat([start, tokens[:, :-1]], dim=1)


def all_completions(length: int) -> Tensor:
    """Return all 3^T completions, [3^T, T]."""
    return torch.cartesian_prod(*[torch.arange(TOKENS)] * length).reshape(-1, length)


def _by_state(on_logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum gradients of token positions [C * T, 3] over the positions of one state, [C, 4, 3]."""
    place = (4 * torch.arange(len(tokens))[:, None] + states(tokens)).flatten()
    summed = on_logits.new_zeros(4 * len(tokens), TOKENS).index_add_(0, place, on_logits)
    return summed.view(-1, 4, TOKENS)


def mean_and_variance(gradients: Tensor, probabilities: Tensor) -> tuple[Tensor, float]:
    """Return the mean [4, 3] and the total variance (trace of the covariance) of [C, 4, 3]."""
    mean = torch.einsum("c,csv->sv", probabilities, gradients)
    squared = (gradients - mean).square().sum((1, 2))
    return mean, float(probabilities @ squared)


def exact_rows(lengths: Sequence[int] = ENUMERATED_LENGTHS) -> list[Row]:
    """Return relative bias and variance of each estimator at each length, all enumerated.

    The bias is that of the mean against the gradient of the sequence-level reverse KL, as a share
    of that gradient's norm. `kl` is gamma 0 with the exact reverse KL of each state as baseline.
    """
    model = Bigram.draw()
    estimators: list[tuple[float, str, Objective]] = [
        (gamma, "none", SequenceReverseKL(gamma=gamma)) for gamma in GAMMAS
    ]
    estimators.append((0.0, "kl", SampledTokenReverseKL(baseline="kl")))
    rows: list[Row] = []
    for length in lengths:
        tokens, exact = all_completions(length), model.exact_gradient(length)
        probabilities = model.probabilities(tokens)
        for gamma, baseline, objective in estimators:
            gradients = model.estimator(objective)(tokens)
            mean, variance = mean_and_variance(gradients, probabilities)
            rows.append({
                "tokens": length,
                "sequence_kl": float(model.sequence_kl(length)),
                "gamma": gamma,
                "baseline": baseline,
                "relative_bias": float((mean - exact).norm() / exact.norm()),
                "variance": variance,
            })  # fmt: skip
    return rows


def sampled_rows(
    lengths: Sequence[int] = SAMPLED_LENGTHS, num_completions: int = 20_000, seed: int = 0
) -> list[Row]:
    """Return the total variance of each estimator by length, and the slope of its growth.

    Args:
        lengths: At least three; the slope is that of log variance over log length at the last
            three, by least squares.
        num_completions: Completions drawn at each length, at least 2; all estimators see the same.
        seed: Of the numpy generator that draws them, length after length.

    Raises:
        ConfigError: If there are fewer than three lengths or two completions.
    """
    check_at_least("lengths", len(lengths), 3, "The slope is over the last three.")
    check_at_least("num_completions", num_completions, 2, "One completion has no variance.")
    model, rng = Bigram.draw(), np.random.default_rng(seed)
    estimators: dict[str, Estimator] = {
        f"gamma {gamma:g}": model.estimator(SequenceReverseKL(gamma=gamma))
        for gamma in (0.0, 0.5, 1.0)
    }
    estimators["whole cost R S"] = model.non_causal
    variances: dict[str, list[float]] = {name: [] for name in estimators}
    uniform = torch.full((num_completions,), 1 / num_completions, dtype=torch.float64)
    for length in lengths:
        parts = model.sample(length, num_completions, rng).split(max(1, _TOKENS_AT_ONCE // length))
        for name, gradients in estimators.items():
            drawn = torch.cat([gradients(part) for part in parts])
            variances[name].append(mean_and_variance(drawn, uniform)[1])
    rows: list[Row] = []
    for name, values in variances.items():
        by_length = {f"variance_{n}": v for n, v in zip(lengths, values, strict=True)}
        slope = np.polyfit(np.log(lengths[-3:]), np.log(values[-3:]), 1)[0]
        rows.append({"estimator": name, **by_length, "slope": float(slope)})
    return rows


def bigram(out: Path, num_completions: int = 20_000, seed: int = 0) -> list[Path]:
    """Write `bigram.csv` (exact), `bigram_slopes.csv` (sampled) and `bigram.png` into `out`.

    Args:
        out: Folder; made if missing.
        num_completions: As in `sampled_rows`.
        seed: As in `sampled_rows`.

    Returns:
        The three files.
    """
    exact, sampled = exact_rows(), sampled_rows(num_completions=num_completions, seed=seed)
    return [
        write_csv(exact, out / "bigram.csv"),
        write_csv(sampled, out / "bigram_slopes.csv"),
        draw(exact, sampled, out / "bigram.png"),
    ]
