"""How far the student is from the teacher at each completion token."""

import torch
from torch import Tensor

from opd_lightning.distributions import Distribution, TokenDistribution, rows
from opd_lightning.records import Rollout


@torch.no_grad()
def on_policy_measures(
    student: TokenDistribution, teacher: Distribution, rollout: Rollout
) -> dict[str, Tensor]:
    """Return measures of each completion token, [N] nats each, in one pass over the vocabulary.

    Keys: `kl/reverse` KL(student || teacher), `entropy` and `teacher/entropy`. A teacher that gives
    only some log-probabilities allows `kl/reverse_k1`, log pi(y) - log q(y), whose mean over the
    student's own samples estimates the same divergence, and `entropy`.
    """
    if not isinstance(teacher, TokenDistribution):
        costs = student.logprobs(rollout.token_ids) - teacher.logprobs(rollout.token_ids)
        return {"kl/reverse_k1": costs, "entropy": student.entropy()}
    values = student.read(_divergence_and_entropies, teacher)
    names = ("kl/reverse", "entropy", "teacher/entropy")
    return dict(zip(names, values.unbind(-1), strict=True))


def _divergence_and_entropies(student: Tensor, teacher: Tensor) -> Tensor:
    measures = [rows.reverse_kl(student, teacher), rows.entropy(student), rows.entropy(teacher)]
    return torch.stack(measures, dim=-1)
