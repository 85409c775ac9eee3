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
    logprobs = logits.log_softmax(-1)
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


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student); gradient pi_v - q_v."""
    return kl(teacher, student)


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(pi || m), m = beta q + (1 - beta) pi."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = torch.logaddexp(floored(log_q) + math.log(beta), floored(log_p) + math.log1p(-beta))
    from_teacher = (log_q.exp() * (floored(log_q) - log_m)).sum(-1)
    from_student = (log_p.exp() * (floored(log_p) - log_m)).sum(-1)
    return beta * from_teacher + (1 - beta) * from_student
