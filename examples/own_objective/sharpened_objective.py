"""An objective of one's own: the reverse KL to a teacher that is sharper than it says."""

from functools import partial

import torch
from torch import Tensor

from opd_lightning.distributions import rows
from opd_lightning.objectives.full_vocabulary import FullVocabularyDivergence


class SharpenedReverseKL(FullVocabularyDivergence):
    """KL(pi || q^s / Z): the teacher's distribution raised to a power, so that s > 1 sharpens it.

    Loss: sum_v pi_v log(pi_v Z / q_v^s).
    Gradient on z_v: pi_v (log(pi_v Z / q_v^s) - loss); 0 at pi = q^s / Z.
    Detached: the teacher and the prefix.
    Source: reward extrapolation, ExOPD (arXiv 2602.12125), with a uniform reference.
    Needs: the teacher's whole vocabulary.
    Choose: where the teacher is right but undecided.

    Args:
        sharpness: The power s, > 0; 1 is ReverseKL.
    """

    def __init__(self, sharpness: float = 1.25) -> None:
        self.sharpness = sharpness

    def row_function(self) -> partial:
        """Return the divergence of a chunk of positions, logits [C, V] -> [C]."""
        return partial(sharpened_reverse_kl, sharpness=self.sharpness)

    def target(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the divergence of two distributions [V], which `opd audit` holds it to."""
        sharpened = teacher**self.sharpness
        return (student * torch.log(student * sharpened.sum() / sharpened)).sum()


def sharpened_reverse_kl(student: Tensor, teacher: Tensor, sharpness: float) -> Tensor:
    """Return KL(pi || q^s / Z), [C] nats."""
    return rows.reverse_kl(student, sharpness * teacher)
