"""An objective of one's own: the reverse KL to a teacher that is mixed with the student."""

import math
from functools import partial

import torch
from torch import Tensor

from opd_lightning.objectives.full_vocabulary import FullVocabularyDivergence


class SkewedReverseKL(FullVocabularyDivergence):
    """KL(pi || m), m = (1 - alpha) q + alpha pi: bounded by log(1 / alpha) where q is 0.

    Loss: sum_v pi_v log(pi_v / m_v).
    Gradient on z_v: by autograd, through both pi and m; 0 at pi = q.
    Detached: the teacher and the prefix.
    Source: skewed KL divergence, DistiLLM (arXiv 2402.03898).
    Needs: the teacher's whole vocabulary.

    Args:
        alpha: Share of the student in the mixture, strictly between 0 and 1.
    """

    def __init__(self, alpha: float = 0.1) -> None:
        self.alpha = alpha

    def row_function(self) -> partial:
        """Return the divergence of a chunk of positions, logits [C, V] -> [C]."""
        return partial(skewed_reverse_kl, alpha=self.alpha)


def skewed_reverse_kl(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """Return KL(pi || (1 - alpha) q + alpha pi), [C] nats."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = torch.logaddexp(log_q + math.log1p(-alpha), log_p + math.log(alpha))
    return (log_p.exp() * (log_p - log_m)).sum(-1)
