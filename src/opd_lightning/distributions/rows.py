"""The mathematics of a chunk of positions, on plain logits: what every distribution evaluates.

C positions, V vocabulary. Each function takes the student's logits [C, V] first and returns [C]
values in nats; it is differentiable in the student's logits by autograd and never changes its
arguments. The logits may be -inf (a token that cannot occur): 0 * log 0 counts as 0.
"""

import math

import torch
from torch import Tensor


def floored(logprobs: Tensor) -> Tensor:
    """Replace -inf by a very negative number, so that 0 * log 0 is 0 and not NaN.

    The root of the largest number leaves room for the factor that a backward pass multiplies in.
    """
    return logprobs.clamp(min=-math.sqrt(torch.finfo(logprobs.dtype).max))


def entropy(logits: Tensor) -> Tensor:
    """-sum_v p_v log p_v."""
    return entropy_of_logprobs(logits.log_softmax(-1))


def entropy_of_logprobs(logprobs: Tensor) -> Tensor:
    """The same from log-probabilities."""
    return -(logprobs.exp() * floored(logprobs)).sum(-1)


def kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v); infinite where q excludes what p allows."""
    log_p, log_q = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
    p = log_p.exp()
    # where p is 0 the term is 0 even if log q is -inf
    return (p * (floored(log_p) - torch.where(p > 0, log_q, floored(log_q)))).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher); gradient pi_v (log(pi_v / q_v) - KL)."""
    return kl(student, teacher)


def reverse_kl_with_gradient(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher) [C] and its gradient [C, V], in a third of autograd's passes.

    Not finite where a token cannot occur; `reverse_kl` knows those cases.
    """
    log_p = student.log_softmax(-1)
    gradient = log_p - teacher.log_softmax(-1)
    p = log_p.exp_()
    values = torch.linalg.vecdot(p, gradient)
    return values, gradient.sub_(values[:, None]).mul_(p)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student); gradient pi_v - q_v."""
    return kl(teacher, student)


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float, scaled: bool = False) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(pi || m), m = beta q + (1 - beta) pi.

    `scaled` divides by beta (1 - beta), so that the ends are forward and reverse KL.
    """
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = _log_mixture(log_q, log_p, beta)
    from_teacher = (log_q.exp() * (floored(log_q) - log_m)).sum(-1)
    from_student = (log_p.exp() * (floored(log_p) - log_m)).sum(-1)
    if scaled:
        return from_teacher / (1 - beta) + from_student / beta
    return beta * from_teacher + (1 - beta) * from_student


def skew_reverse_kl(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """KL(pi || m), m = alpha pi + (1 - alpha) q; at most -log alpha."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_p.exp() * (floored(log_p) - _log_mixture(log_p, log_q, alpha))).sum(-1)


def entropy_aware(student: Tensor, teacher: Tensor, threshold: float, width: float) -> Tensor:
    """w KL(q || pi) + (1 - w) KL(pi || q), w rising with the teacher's entropy.

    w = sigmoid((H(q) - threshold) / width); for width 0 a step, 1 from the threshold on.
    """
    above = entropy(teacher) - threshold
    weight = torch.sigmoid(above / width) if width > 0 else (above >= 0).to(teacher.dtype)
    # where a divergence has no weight it is that of the student to itself: 0, never 0 * infinity
    same = student.detach()
    forward = forward_kl(student, torch.where(weight[:, None] > 0, teacher, same))
    reverse = reverse_kl(student, torch.where(weight[:, None] < 1, teacher, same))
    return weight * forward + (1 - weight) * reverse


def _log_mixture(logprobs: Tensor, others: Tensor, share: float) -> Tensor:
    """log(share exp(logprobs) + (1 - share) exp(others)), finite."""
    return torch.logaddexp(
        floored(logprobs) + math.log(share), floored(others) + math.log1p(-share)
    )


# row function -> (student, teacher) -> values and gradient, for finite logits
WITH_GRADIENT = {reverse_kl: reverse_kl_with_gradient}
