"""How one sampled token compares with a top-K: the shape of the advantages at random prefixes.

The finding of arXiv 2603.25562 that sampled-token rewards are mostly negative and carried by few
tokens, on a vocabulary of Zipf's shape: base logits -1.6 log(rank), student softmax(base + sigma
noise), teacher softmax(base / tau), sharper for tau < 1.

P prefixes, n samples a prefix, V vocabulary, A = log q(y) - log pi(y).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from opd_lightning.objectives import Objective, ReverseKL, SampledTokenReverseKL, TopKReverseKL
from opd_lightning.records import Rollout
from opd_lightning.study.tables import Row

SETTINGS = ((1.0, 0.5), (1.0, 1.0), (0.6, 1.0))  # tau, sigma
VOCABULARY, SLOPE, K = 2000, 1.6, 32


@dataclass(frozen=True)
class Draw:
    """One setting's student and teacher, and what the student sampled.

    Attributes:
        student: [P, V] logits.
        teacher: [P, V] logits, the same at every prefix.
        samples: [P, n] token ids.
    """

    student: Tensor
    teacher: Tensor
    samples: Tensor


def draws(
    settings: Sequence[tuple[float, float]] = SETTINGS,
    num_prefixes: int = 200,
    num_samples: int = 200,
    seed: int = 0,
) -> list[Draw]:
    """Draw each setting (tau, sigma); all share one noise, the samples follow in their order.

    Args:
        settings: Pairs of tau and sigma.
        num_prefixes: P.
        num_samples: n.
        seed: Of the torch generator that draws the noise [P, V], then the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    base = -SLOPE * torch.arange(1, VOCABULARY + 1, dtype=torch.float64).log()
    noise = torch.randn(num_prefixes, VOCABULARY, dtype=torch.float64, generator=generator)
    drawn = []
    for tau, sigma in settings:
        student = base + sigma * noise
        samples = torch.multinomial(
            student.softmax(1), num_samples, replacement=True, generator=generator
        )
        drawn.append(Draw(student, (base / tau).expand_as(student), samples))
    return drawn


def advantages(draw: Draw) -> Tensor:
    """Return A of every sampled token, [P, n] nats, as SampledTokenReverseKL reports it."""
    num_samples = draw.samples.shape[1]
    found = []
    for student, teacher, ids in zip(draw.student, draw.teacher, draw.samples, strict=True):
        rollout = Rollout.from_flat(ids, torch.arange(num_samples))
        sides = [
            TokenDistribution.from_logits(z.expand(num_samples, -1)) for z in (student, teacher)
        ]
        metrics = SampledTokenReverseKL().token_loss(*sides, rollout).metrics
        found.append(metrics["advantage/mean"])
    return torch.stack(found)


def gradients(objective: Objective, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the gradient on the logits at each prefix, [P, V], and the metrics, each [P].

    The rollout holds the first sample of each prefix.
    """
    leaf = draw.student.clone().requires_grad_()
    rollout = Rollout.from_flat(draw.samples[:, 0], torch.arange(len(leaf)))
    output = objective(
        TokenDistribution.from_logits(leaf),
        TokenDistribution.from_logits(draw.teacher),
        rollout,
        torch.ones(len(leaf), dtype=leaf.dtype),
    )
    return torch.autograd.grad(output.loss, leaf)[0], output.metrics


def negative_probability(draw: Draw) -> Tensor:
    """Return P_pi(A < 0) of each prefix, [P]: exact, summed over the vocabulary."""
    log_p, log_q = draw.student.log_softmax(1), draw.teacher.log_softmax(1)
    return (log_p.exp() * (log_q < log_p)).sum(1)


def one_sample_variance(draw: Draw, mean: Tensor) -> Tensor:
    """Return E_y |g_y|^2 - |E_y g_y|^2 of each prefix, [P]; `mean` [P, V] is E_y g_y.

    Exact, over all V tokens y, from |A (pi - e_y)|^2 = A^2 (|pi|^2 - 2 pi_y + 1).
    """
    log_p = draw.student.log_softmax(1)
    p, a = log_p.exp(), draw.teacher.log_softmax(1) - log_p
    squared = a.square() * (p.square().sum(1, keepdim=True) - 2 * p + 1)
    return (p * squared).sum(1) - mean.square().sum(1)


def top_share(values: Tensor, share: float) -> float:
    """Return the part of the sum of |values| that the largest `share` of them holds."""
    ordered = values.abs().flatten().sort(descending=True).values
    return float(ordered[: round(share * len(ordered))].sum() / ordered.sum())


def push_ratio(gradient: Tensor) -> Tensor:
    """Return sum of |g| over g < 0 (up) divided by that over g > 0 (down), by row of [P, V]."""
    return gradient.clamp(max=0).abs().sum(1) / gradient.clamp(min=0).sum(1)


def imbalance_rows(num_prefixes: int = 200, num_samples: int = 200, seed: int = 0) -> list[Row]:
    """Return one row a setting: the sampled advantages, their gradients, and top-K matching beside.

    `negative_probability`, the gradient's variance and norm and the columns of top-K matching are
    exact given the prefixes; `mean_advantage`, `positive_share` and the top shares are of the
    samples.
    """
    rows: list[Row] = []
    for (tau, sigma), draw in zip(
        SETTINGS, draws(SETTINGS, num_prefixes, num_samples, seed), strict=True
    ):
        sampled = advantages(draw)
        exact, _ = gradients(ReverseKL(), draw)
        matching, masses = gradients(TopKReverseKL(k=K), draw)
        log_p = draw.student.log_softmax(1)
        support = draw.teacher.topk(K).indices
        ratio = push_ratio(matching)
        rows.append({
            "tau": tau,
            "sigma": sigma,
            "negative_probability": float(negative_probability(draw).mean()),
            "mean_advantage": float(sampled.mean()),
            "positive_share": float(sampled.clamp(min=0).sum() / sampled.abs().sum()),
            "top_1_percent_share": top_share(sampled, 0.01),
            "top_10_percent_share": top_share(sampled, 0.1),
            "one_sample_variance": float(one_sample_variance(draw, exact).mean()),
            "squared_gradient": float(exact.square().sum(1).mean()),
            "topk_push_ratio": float(ratio[(ratio - 1).abs().argmax()]),
            "teacher_topk_mass": float(masses["teacher/support_mass"].mean()),
            "student_topk_mass": float(log_p.gather(1, support).exp().sum(1).mean()),
        })  # fmt: skip
    return rows
