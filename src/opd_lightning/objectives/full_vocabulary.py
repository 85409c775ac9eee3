"""Divergences over the whole vocabulary: no sampling variance at a given prefix."""

from abc import abstractmethod
from functools import partial

from torch import Tensor

from opd_lightning.distributions import Distribution, TokenDistribution, rows
from opd_lightning.distributions.head import RowFunction
from opd_lightning.errors import ConfigError
from opd_lightning.objectives.base import Objective, ObjectiveOutput, TokenLoss
from opd_lightning.records import Rollout


class FullVocabularyDivergence(Objective):
    """A divergence of two whole distributions; `row_function` gives it for a chunk of positions.

    The weighted sum is fused: each product with the student's head runs once, and the gradient is
    computed in the forward pass, a chunk of positions at a time.
    """

    needs = "full"

    @abstractmethod
    def row_function(self) -> RowFunction:
        """Return f(student logits [C, V], teacher logits [C, V]) -> [C] nats."""

    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        """Return the divergence at each completion token, [N] nats."""
        return TokenLoss(student.read(self.row_function(), _whole(teacher, self)))

    def weighted_loss(
        self,
        student: TokenDistribution,
        teacher: Distribution,
        rollout: Rollout,
        weights: Tensor,
    ) -> ObjectiveOutput:
        """Return sum_n weights_n * divergence_n, computed with its gradient in one pass."""
        row_fn = self.row_function()
        loss, values = student.weighted_sum(row_fn, weights, _whole(teacher, self))
        return ObjectiveOutput(loss, values)


def _whole(teacher: Distribution, objective: Objective) -> TokenDistribution:
    if not isinstance(teacher, TokenDistribution):
        raise ConfigError(
            f"{type(objective).__name__} needs the teacher's whole vocabulary; this teacher gives "
            f"{teacher.provides!r}. Take TopKReverseKL, SampledTokenReverseKL or a local teacher."
        )
    return teacher


class ReverseKL(FullVocabularyDivergence):
    """KL(student || teacher) over the whole vocabulary: mode-seeking.

    Loss: sum_v pi_v log(pi_v / q_v).
    Gradient on z_v: pi_v (log(pi_v / q_v) - loss), the expectation of SampledTokenReverseKL's
    without its variance; 0 at pi = q.
    Detached: the teacher and the prefix, which the student sampled.
    Source: docs/mathematics.md, section 5; the expectation of arXiv 2603.25562's sampled-token OPD.
    Needs: the teacher's whole vocabulary.
    """

    def row_function(self) -> RowFunction:
        """Return `rows.reverse_kl`."""
        return rows.reverse_kl


class ForwardKL(FullVocabularyDivergence):
    """KL(teacher || student) over the whole vocabulary, on the student's prefixes: mode-covering.

    Loss: sum_v q_v log(q_v / pi_v).
    Gradient on z_v: pi_v - q_v, that of cross-entropy with soft labels; 0 at pi = q.
    Detached: the teacher and the prefix.
    Source: docs/mathematics.md, section 5.
    Needs: the teacher's whole vocabulary.
    """

    def row_function(self) -> RowFunction:
        """Return `rows.forward_kl`."""
        return rows.forward_kl


class JensenShannon(FullVocabularyDivergence):
    """Generalised Jensen-Shannon divergence, between forward and reverse KL.

    Loss: beta KL(q || m) + (1 - beta) KL(pi || m), m = beta q + (1 - beta) pi.
    Gradient on z_v: (1 - beta) pi_v (log(pi_v / m_v) - E_pi log(pi / m)); 0 at pi = q. loss / beta
    tends to the forward KL for beta -> 0, loss / (1 - beta) to the reverse KL for beta -> 1.
    Detached: the teacher and the prefix.
    Source: docs/mathematics.md, section 5; GKD's generalised JSD (arXiv 2306.13649).
    Needs: the teacher's whole vocabulary.

    Args:
        beta: Weight of the teacher in the mixture, strictly between 0 and 1; 0.5 is symmetric.

    Raises:
        ConfigError: If `beta` is not inside (0, 1).
    """

    def __init__(self, beta: float = 0.5) -> None:
        if not 0 < beta < 1:
            raise ConfigError(
                f"JensenShannon's beta must lie strictly between 0 and 1; got {beta}. The ends are "
                "other objectives: ForwardKL (beta -> 0) and ReverseKL (beta -> 1)."
            )
        self.beta = beta

    def row_function(self) -> RowFunction:
        """Return `rows.jensen_shannon` at this beta."""
        return partial(rows.jensen_shannon, beta=self.beta)
