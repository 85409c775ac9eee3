"""Divergences over the whole vocabulary: no sampling variance at a given prefix."""

from abc import abstractmethod
from functools import partial

from torch import Tensor

from opd_lightning.distributions import Distribution, TokenDistribution, rows
from opd_lightning.distributions.head import RowFunction
from opd_lightning.errors import ConfigError
from opd_lightning.objectives.base import (
    Objective,
    ObjectiveOutput,
    TokenLoss,
    check_at_least,
    whole,
)
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
        return TokenLoss(student.read(self.row_function(), whole(teacher, self)))

    def weighted_loss(
        self,
        student: TokenDistribution,
        teacher: Distribution,
        rollout: Rollout,
        weights: Tensor,
    ) -> ObjectiveOutput:
        """Return sum_n weights_n * divergence_n, computed with its gradient in one pass."""
        row_fn = self.row_function()
        loss, values = student.weighted_sum(row_fn, weights, whole(teacher, self))
        return ObjectiveOutput(loss, values)


class ReverseKL(FullVocabularyDivergence):
    """KL(student || teacher) over the whole vocabulary: mode-seeking.

    Loss: sum_v pi_v log(pi_v / q_v).
    Gradient on z_v: pi_v (log(pi_v / q_v) - loss), the expectation of SampledTokenReverseKL's
    without its variance; 0 at pi = q.
    Detached: the teacher and the prefix, which the student sampled.
    Source: docs/mathematics.md, section 5; the expectation of arXiv 2603.25562's sampled-token OPD.
    Needs: the teacher's whole vocabulary.
    Choose: where the teacher is local and its head affordable: no bias, no sampling noise.
    """

    target = "reverse_kl"

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
    Choose: to keep the teacher's alternatives (diversity, pass@k); it is lenient on tokens that the
    teacher would not write.
    """

    target = "forward_kl"

    def row_function(self) -> RowFunction:
        """Return `rows.forward_kl`."""
        return rows.forward_kl


class JensenShannon(FullVocabularyDivergence):
    """Generalised Jensen-Shannon divergence, between forward and reverse KL.

    Loss: beta KL(q || m) + (1 - beta) KL(pi || m), m = beta q + (1 - beta) pi; `scaled`: divided by
    beta (1 - beta).
    Gradient on z_v: (1 - beta) pi_v (log(pi_v / m_v) - E_pi log(pi / m)); 0 at pi = q. loss / beta
    tends to the forward KL for beta -> 0, loss / (1 - beta) to the reverse KL for beta -> 1, so
    that the scaled loss is the one and the other at its ends.
    Detached: the teacher and the prefix.
    Source: docs/mathematics.md, section 5; GKD's generalised JSD (arXiv 2306.13649).
    Needs: the teacher's whole vocabulary.
    Choose: between ReverseKL and ForwardKL; bounded by the entropy of (beta, 1 - beta).

    Args:
        beta: Weight of the teacher in the mixture; 0.5 is symmetric. Strictly between 0 and 1;
            `scaled` takes the ends too. Within 0.01 of an end fp32 loses digits.
        scaled: Divide by beta (1 - beta), which keeps the loss's size while beta is swept.

    Raises:
        ConfigError: If `beta` is not inside (0, 1), `scaled` [0, 1].
    """

    target = "jensen_shannon"
    variants = ({"beta": 0.1}, {"beta": 0.1, "scaled": True})

    def __init__(self, beta: float = 0.5, scaled: bool = False) -> None:
        if scaled and not 0 <= beta <= 1:
            raise ConfigError(f"JensenShannon's beta must lie within 0 and 1; got {beta}.")
        if not scaled and not 0 < beta < 1:
            raise ConfigError(
                f"JensenShannon's beta must lie strictly between 0 and 1; got {beta}. The ends are "
                "other objectives: ForwardKL (beta -> 0) and ReverseKL (beta -> 1); scaled=True "
                "meets them."
            )
        self.beta = beta
        self.scaled = scaled

    def row_function(self) -> RowFunction:
        """Return `rows.jensen_shannon` at this beta."""
        if self.beta == 0:
            return rows.forward_kl
        if self.beta == 1:
            return rows.reverse_kl
        return partial(rows.jensen_shannon, beta=self.beta, scaled=self.scaled)


class SkewReverseKL(FullVocabularyDivergence):
    """Reverse KL to a teacher that is mixed with the student: bounded, where ReverseKL is not.

    Loss: KL(pi || m), m = alpha pi + (1 - alpha) q; at most -log alpha, and finite where the
    teacher excludes a token.
    Gradient on z_v: pi_v (h_v - E_pi h), h = log(pi / m) - alpha pi / m; 0 at pi = q.
    Detached: the teacher and the prefix; m moves with the student.
    Source: DistiLLM's skew reverse KL (arXiv 2402.03898, eq. 6); docs/mathematics.md, section 5.
    Needs: the teacher's whole vocabulary.
    Choose: for a reverse KL that one excluded token cannot blow up.

    Args:
        alpha: Share of the student in the mixture, strictly between 0 and 1.

    Raises:
        ConfigError: If `alpha` is not inside (0, 1).
    """

    target = "skew_reverse_kl"

    def __init__(self, alpha: float = 0.1) -> None:
        if not 0 < alpha < 1:
            raise ConfigError(
                f"SkewReverseKL's alpha must lie strictly between 0 and 1; got {alpha}. At 0 it is "
                "ReverseKL, at 1 it is identically zero."
            )
        self.alpha = alpha

    def row_function(self) -> RowFunction:
        """Return `rows.skew_reverse_kl` at this alpha."""
        return partial(rows.skew_reverse_kl, alpha=self.alpha)


class EntropyAware(FullVocabularyDivergence):
    """Forward KL where the teacher is undecided, reverse KL where it is sure.

    Loss: w KL(q || pi) + (1 - w) KL(pi || q), w = sigmoid((H(q) - threshold) / width), a step for
    width 0: covering modes where there are several, seeking the one where there is one.
    Gradient on z_v: w (pi_v - q_v) + (1 - w) pi_v (log(pi_v / q_v) - KL(pi || q)); 0 at pi = q.
    Detached: w, the teacher and the prefix.
    Source: Entropy-aware OPD (arXiv 2603.07079); docs/mathematics.md, section 5.
    Needs: the teacher's whole vocabulary.
    Choose: where the teacher branches at a few positions and is sure at the others.

    Args:
        threshold: Teacher entropy in nats at which the two change places, at least 0.
        width: Nats over which they do, at least 0; 0 is a step.

    Raises:
        ConfigError: If `threshold` or `width` is below 0.
    """

    target = "entropy_aware"
    variants = ({"width": 0.5},)

    def __init__(self, threshold: float = 1.0, width: float = 0.0) -> None:
        check_at_least("threshold", threshold, 0.0, "It is an entropy in nats.")
        check_at_least("width", width, 0.0, "0 is a step.")
        self.threshold = threshold
        self.width = width

    def row_function(self) -> RowFunction:
        """Return `rows.entropy_aware` with these settings."""
        return partial(rows.entropy_aware, threshold=self.threshold, width=self.width)
