"""What one objective does, found by listing everything that can happen."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from opd_lightning.objectives import Objective
from opd_lightning.tools.audit.cost import head_rows_and_teacher_numbers
from opd_lightning.tools.audit.names import SMALL_K, label
from opd_lightning.tools.audit.targets import target_gradient
from opd_lightning.tools.audit.world import World

# (tokens of the vocabulary, tokens of a completion): 8 completions, and 125
SIZES = ((8, 1), (5, 3))
SEEDS = (0, 1, 2)
# Float64 sums of a few hundred terms agree to 1e-14; the smallest real bias seen is above 1e-3.
EXACT = 1e-8
_STEP = 1e-5  # of the finite differences


@dataclass(frozen=True)
class Finding:
    """What the audit found of one objective; gradients are on logits, a completion's tokens summed.

    Attributes:
        name: Class and settings.
        target: The divergence that it declares, None where it gives a reason instead.
        follows: What its expected gradient is: a divergence, a multiple of one, "nothing", or the
            nearest one with its cosine.
        bias: Largest relative distance of the expected gradient from that of the target (or of the
            nearest divergence), over all sizes and seeds.
        variance: Trace of the covariance of one completion's gradient, mean over seeds, by size.
        norm_at_teacher: Largest norm of the expected gradient where the student is the teacher.
        pull: What a step does to the mass off the teacher's top 3, "in" (it falls), "out" (it
            grows) or "0": where the student is the teacher, and where half the mass of those 3 was
            moved off them.
        needs: Of the teacher: "sampled", "topk" or "full".
        head_rows: Rows of the student's head read a token.
        teacher_numbers: Numbers read of the teacher a token.
        chunked_error: Largest relative difference between a chunked and a dense head, loss and
            gradients.
        difference_error: Relative difference between the gradient and finite differences of the
            loss; None for an estimator, whose gradient is not its value's.
        complaint: What is wrong with it; empty if nothing is.
    """

    name: str
    target: str | None
    target_reason: str
    follows: str
    bias: float
    variance: tuple[float, ...]
    norm_at_teacher: float
    pull: tuple[str, str]
    needs: str
    head_rows: str
    teacher_numbers: str
    chunked_error: float
    difference_error: float | None
    complaint: str


def audit(objectives: Sequence[Objective]) -> list[Finding]:
    """Return a finding for each objective."""
    return [_examine(objective) for objective in objectives]


def _examine(objective: Objective) -> Finding:
    worlds = [World.random(*size, seed) for size in SIZES for seed in SEEDS]
    samples = [world.sample_gradients(objective) for world in worlds]
    pairs = list(zip(worlds, samples, strict=True))
    means = [torch.einsum("r,rsv->sv", w.probabilities, s) for w, s in pairs]
    spreads = [
        float((w.probabilities * (s - m).square().sum((1, 2))).sum())
        for (w, s), m in zip(pairs, means, strict=True)
    ]
    follows, nearest_bias = _followed(objective, worlds, means)
    target = _name_of(objective.target)
    bias = nearest_bias
    if objective.target is not None:
        wanted = [target_gradient(objective.target, objective, world) for world in worlds]
        bias = _relative_distance(means, wanted)
    at_teacher = [_expected_gradient(objective, w.with_student(w.teacher)) for w in worlds]
    chunked_error = _chunked_error(objective)
    return Finding(
        name=label(objective),
        target=target,
        target_reason=objective.target_reason,
        follows=follows,
        bias=bias,
        variance=tuple(
            math.fsum(spreads[i * len(SEEDS) : (i + 1) * len(SEEDS)]) / len(SEEDS)
            for i in range(len(SIZES))
        ),
        norm_at_teacher=max(float(gradient.norm()) for gradient in at_teacher),
        pull=(_pull(objective, moved_off=0.0), _pull(objective, moved_off=0.5)),
        needs=objective.needs,
        **head_rows_and_teacher_numbers(objective),
        chunked_error=chunked_error,
        difference_error=None if objective.on_policy_estimator else _difference_error(objective),
        complaint=_complaint(objective, target, follows, bias, chunked_error),
    )


def _complaint(
    objective: Objective, target: str | None, follows: str, bias: float, chunked_error: float
) -> str:
    if target is None and not objective.target_reason:
        return (
            f"declares neither a target nor a target_reason; it follows {follows}. Set target to "
            "the divergence it is meant to follow, or to None with the reason."
        )
    if target is not None and not bias < EXACT:
        return f"declares {target}, but follows {follows}; relative bias {bias:.2g}"
    if not chunked_error < EXACT:
        return f"is not the same on a chunked head: relative difference {chunked_error:.2g}"
    return ""


def _name_of(target: str | Callable | None) -> str | None:
    """Return a target's name; a function that an objective brings along is its own."""
    return "its own" if callable(target) else target


def _expected_gradient(objective: Objective, world: World) -> Tensor:
    return torch.einsum("r,rsv->sv", world.probabilities, world.sample_gradients(objective))


# ------------------------------------------------------------------------ what it follows


def _followed(objective: Objective, worlds: list[World], means: list[Tensor]) -> tuple[str, float]:
    """Return the divergence that `means` are the gradients of (or the nearest), and the bias."""
    if max(float(mean.norm()) for mean in means) < EXACT:
        return "nothing: its expected gradient is 0", math.inf
    nearest_name, nearest_cosine, nearest_bias = "", -2.0, math.inf
    for name, gradients in _candidates(objective, worlds):
        bias = _relative_distance(means, gradients)
        if bias < EXACT:
            return name, bias
        factors = [
            float((m * g).sum() / g.square().sum()) for m, g in zip(means, gradients, strict=True)
        ]
        scaled = [f * g for f, g in zip(factors, gradients, strict=True)]
        if _relative_distance(means, scaled) < EXACT:
            constant = max(factors) - min(factors) < EXACT
            return f"{factors[0]:.3g} x {name}" if constant else f"a multiple of {name}", bias
        cosine = sum(
            float(torch.nn.functional.cosine_similarity(m.flatten(), g.flatten(), dim=0))
            for m, g in zip(means, gradients, strict=True)
        ) / len(means)
        if cosine > nearest_cosine:
            nearest_name, nearest_cosine, nearest_bias = name, cosine, bias
    return f"none; nearest {nearest_name}, cosine {nearest_cosine:.3f}", nearest_bias


def _candidates(objective: Objective, worlds: list[World]) -> list[tuple[str, list[Tensor]]]:
    """Return the divergences to compare with, the declared one first, and their gradients."""
    usual = SimpleNamespace(k=getattr(objective, "k", SMALL_K), beta=0.5, scaled=False)
    names = [
        "reverse_kl",
        "forward_kl",
        "sequence_reverse_kl",
        "support_reverse_kl",
        "bucketed_reverse_kl",
        "jensen_shannon",
        "expected_reward",
    ]
    found: list[tuple[str, list[Tensor]]] = []
    if objective.target is not None:
        own = [target_gradient(objective.target, objective, world) for world in worlds]
        found.append((_name_of(objective.target), own))
    for name in names:
        gradients: Any = [target_gradient(name, usual, world) for world in worlds]
        found.append((name, gradients))
    return found


def _relative_distance(means: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((m - w).norm() / w.norm()) for m, w in zip(means, wanted, strict=True))


# ------------------------------------------------------------------------ pull off the support


def _pull(objective: Objective, moved_off: float) -> str:
    """Return what a gradient step does to the mass off the teacher's top 3 (see `Finding.pull`)."""
    signs = set()
    for seed in SEEDS:
        world = World.random(*SIZES[0], seed)
        teacher = world.teacher.softmax(-1)
        kept = torch.zeros_like(teacher, dtype=torch.bool)
        kept.scatter_(1, teacher.topk(SMALL_K).indices, True)
        on, off = teacher * kept, teacher * ~kept
        mass = on.sum(-1, keepdim=True)
        grown = 1 + moved_off * mass / (1 - mass)
        moved = world.with_student((on * (1 - moved_off) + off * grown).log())
        gradient = _expected_gradient(objective, moved)[-1]
        student = moved.student.softmax(-1)[-1]
        # d mass_off = grad(mass_off) . step, step = -gradient; grad_v = pi_v (off_v - mass_off)
        off_mass = (student * ~kept[-1]).sum()
        change = -float((student * ((~kept[-1]).double() - off_mass) * gradient).sum())
        signs.add("0" if abs(change) < EXACT else "out" if change > 0 else "in")
    return signs.pop() if len(signs) == 1 else "varies"


# ------------------------------------------------------------------------ heads and differences


def _chunked_error(objective: Objective) -> float:
    """Return the largest relative difference between a chunked and a dense head."""
    world = World.random(*SIZES[1], seed=0)
    rollout, num_tokens = world.rollout, len(world.states)
    g = torch.Generator().manual_seed(1)
    width = world.student.shape[1] + 2
    hidden, weight = (
        torch.randn(n, width, generator=g, dtype=torch.float64) for n in (num_tokens, width - 2)
    )
    weights = torch.rand(num_tokens, generator=g, dtype=torch.float64)
    weights[::7] = 0.0
    teacher = TokenDistribution.from_logits(world.teacher[world.states])

    def run(chunk_size: int | None) -> list[Tensor]:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        if chunk_size is None:
            student = TokenDistribution.from_logits(leaves[0] @ leaves[1].T)
        else:
            student = TokenDistribution.from_hidden(*leaves, chunk_size=chunk_size)
        output = objective(student, teacher, rollout, weights)
        return [output.loss.detach(), output.token_loss, *torch.autograd.grad(output.loss, leaves)]

    pairs = zip(run(chunk_size=100), run(chunk_size=None), strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-300)) for a, b in pairs)


def _difference_error(objective: Objective) -> float:
    """Return the relative difference between the gradient and central differences of the loss."""
    world = World.random(*SIZES[1], seed=0)
    logits = world.student[world.states]
    teacher = TokenDistribution.from_logits(world.teacher[world.states])
    g = torch.Generator().manual_seed(2)
    direction = torch.randn(logits.shape, generator=g, dtype=torch.float64)
    # losses of single tokens, so that errors of different signs do not cancel
    leaf = logits.clone().requires_grad_()

    def losses(z: Tensor) -> Tensor:
        student = TokenDistribution.from_logits(z)
        return objective.token_loss(student, teacher, world.rollout).loss

    (gradient,) = torch.autograd.grad(losses(leaf).sum(), leaf)
    along = (gradient * direction).sum(1)
    ahead, behind = (losses(logits + s * _STEP * direction).detach() for s in (1, -1))
    difference = (ahead - behind) / (2 * _STEP)
    return float((along - difference).norm() / difference.norm())
