"""Exact gradients of the divergences that objectives may follow.

Written on probabilities, as a textbook does, and differentiated by autograd: nothing here is shared
with the objectives. V tokens, S states, R completions (see world.py).
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd_lightning.errors import ConfigError, nearest
from opd_lightning.objectives import Mixture, Objective
from opd_lightning.tools.audit.world import World


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(pi || q)."""
    return (student * (student / teacher).log()).sum()


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(q || pi)."""
    return reverse_kl(teacher, student)


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float, scaled: bool) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(pi || m), scaled: over beta (1 - beta)."""
    if scaled and beta in (0, 1):
        return (reverse_kl if beta == 1 else forward_kl)(student, teacher)
    m = beta * teacher + (1 - beta) * student
    value = beta * reverse_kl(teacher, m) + (1 - beta) * reverse_kl(student, m)
    return value / (beta * (1 - beta)) if scaled else value


def skew_reverse_kl(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """KL(pi || alpha pi + (1 - alpha) q)."""
    return reverse_kl(student, alpha * student + (1 - alpha) * teacher)


def entropy_aware(student: Tensor, teacher: Tensor, threshold: float, width: float) -> Tensor:
    """w KL(q || pi) + (1 - w) KL(pi || q), w by the teacher's entropy."""
    above = -(teacher * teacher.log()).sum() - threshold
    w = 1 / (1 + (-above / width).exp()) if width else (above >= 0).double()
    return w * forward_kl(student, teacher) + (1 - w) * reverse_kl(student, teacher)


def density_power(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """The density power divergence (Basu et al. 1998) of pi from q."""
    terms = student ** (alpha + 1) - (alpha + 1) * student * teacher**alpha
    return (terms + alpha * teacher ** (alpha + 1)).sum() / (alpha * (alpha + 1))


def support_reverse_kl(
    student: Tensor, teacher: Tensor, k: int, support: str = "teacher", p: float | None = None
) -> Tensor:
    """KL of both renormalised on the support."""
    kept = _support(student, teacher, k, support, p)
    return reverse_kl(student[kept] / student[kept].sum(), teacher[kept] / teacher[kept].sum())


def bucketed_reverse_kl(
    student: Tensor, teacher: Tensor, k: int, support: str = "teacher", p: float | None = None
) -> Tensor:
    """KL of the tokens of the support and one outcome for all others."""
    kept = _support(student, teacher, k, support, p)
    sides = [torch.cat([x[kept], x[~kept].sum()[None]]) for x in (student, teacher)]
    if kept.all():
        sides = [side[:-1] for side in sides]
    return reverse_kl(*sides)


def support_surprisal(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """-log pi(S) of the teacher's top k."""
    return -student[_support(student, teacher, k, "teacher", None)].sum().log()


def _support(student: Tensor, teacher: Tensor, k: int, support: str, p: float | None) -> Tensor:
    def largest(x: Tensor, size: int) -> list[int]:
        return x.detach().argsort(descending=True)[:size].tolist()

    size = k
    if support == "top-p":
        size = next((n for n in range(1, k) if teacher[largest(teacher, n)].sum() >= p), k)
    ids = largest(student if support == "student" else teacher, size)
    ids += largest(student, k) if support == "union" else []
    kept = torch.zeros_like(teacher, dtype=torch.bool)
    kept[ids] = True
    return kept


def sequence_reverse_kl(student: Tensor, teacher: Tensor, reward: Tensor) -> Tensor:
    """KL of whole completions, from their log-probabilities [R]."""
    return (student.exp() * (student - teacher)).sum()


def expected_reward(student: Tensor, teacher: Tensor, reward: Tensor) -> Tensor:
    """-E[R] of whole completions."""
    return -(student.exp() * reward).sum()


TOKEN_LEVEL: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        reverse_kl,
        forward_kl,
        jensen_shannon,
        skew_reverse_kl,
        entropy_aware,
        density_power,
        support_reverse_kl,
        bucketed_reverse_kl,
        support_surprisal,
    )
}
"""(student [V], teacher [V], settings of the objective by name) -> scalar, at one prefix."""
SEQUENCE_LEVEL: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (sequence_reverse_kl, expected_reward)
}
"""(student [R], teacher [R] log-probabilities, reward [R]) -> scalar."""


def target_gradient(target: str | Callable, objective: Objective, world: World) -> Tensor:
    """Return the gradient [S, V] of `target` on the student's logits, in `world`.

    That of a token-level divergence is taken at each prefix with the prefixes held fixed, and
    summed over those that the student visits; that of a sequence-level one goes through everything.

    Args:
        target: A name of the tables above, "mixture", or a function (p [V], q [V]) -> scalar.
        objective: Gives the divergence's settings (k, beta, ...) by their names.
        world: Where.

    Raises:
        ConfigError: If the name is not known, or the objective lacks one of its settings.
    """
    if target == "mixture" and isinstance(objective, Mixture):
        parts = [target_gradient(term.target, term, world) for term in objective.objectives]
        return sum(c * part for c, part in zip(objective.coefficients, parts, strict=True))
    leaf = world.student.clone().requires_grad_()
    if target in SEQUENCE_LEVEL:
        logprobs = [world.sequence_logprobs(logits) for logits in (leaf, world.teacher)]
        value = SEQUENCE_LEVEL[target](*logprobs, world.reward)
    else:
        divergence = _divergence(target, objective)
        teacher = world.teacher.softmax(-1)
        values = [divergence(p, q) for p, q in zip(leaf.softmax(-1), teacher, strict=True)]
        value = (world.occupancy * torch.stack(values)).sum()
    return torch.autograd.grad(value, leaf)[0]


def _divergence(target: str | Callable, objective: Objective) -> Callable[..., Tensor]:
    if callable(target):
        return target
    if target not in TOKEN_LEVEL:
        known = [*TOKEN_LEVEL, *SEQUENCE_LEVEL, "mixture"]
        raise ConfigError(
            f"{type(objective).__name__} declares the target {target!r}, which is not known."
            f"{nearest(str(target), known)} Known: {', '.join(known)}. A divergence of your own: a "
            "function (p [V], q [V]) -> scalar; none: target = None with a target_reason."
        )
    function = TOKEN_LEVEL[target]
    given = settings_of(function, objective)
    return lambda student, teacher: function(student, teacher, **given)


def settings_of(function: Callable, objective: Objective) -> dict[str, Any]:
    """Return the settings of `objective` that `function` takes beside the two distributions.

    Raises:
        ConfigError: If the objective lacks one that has no default.
    """
    given = {}
    for name, parameter in list(inspect.signature(function).parameters.items())[2:]:
        if hasattr(objective, name):
            given[name] = getattr(objective, name)
        elif parameter.default is inspect.Parameter.empty:
            raise ConfigError(
                f"{function.__name__} has the setting {name!r}, and {type(objective).__name__} has "
                "no attribute of that name. Store it in the constructor."
            )
    return given
