"""Losses that circulate under the name of reverse KL and are not: the audit has to convict them."""

import torch

from opd_lightning.distributions import Distribution, TokenDistribution
from opd_lightning.objectives import Objective, SampledTokenReverseKL, TokenLoss, TopKReverseKL
from opd_lightning.records import Rollout


class Declares(Objective):
    needs = "sampled"
    target = "reverse_kl"

    def log_ratio(self, student: TokenDistribution, teacher: Distribution, rollout: Rollout):
        ids = rollout.token_ids
        return teacher.logprobs(ids) - student.logprobs(ids)


class K1Backpropagated(Declares):
    """log pi - log q as a loss: expected gradient 0."""

    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        return TokenLoss(-self.log_ratio(student, teacher, rollout))


class K3Backpropagated(Declares):
    """q / pi - 1 - log(q / pi) as a loss: the gradient of forward KL."""

    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        d = self.log_ratio(student, teacher, rollout)
        return TokenLoss(d.exp() - d - 1)


class KLAsAdvantage(Declares):
    """The divergence itself times the score: it does not depend on y, so the expectation is 0."""

    needs = "full"
    on_policy_estimator = True

    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        divergence = student.reverse_kl(teacher).detach()
        return TokenLoss(divergence * student.logprobs(rollout.token_ids))


class PublishedHeadTail(TopKReverseKL):
    """The head differentiated through its log-ratio: off by the gradient of pi(S)."""

    target = "reverse_kl"
    target_reason = ""

    def __init__(self, k: int = 3) -> None:
        super().__init__(k, tail="sampled", detach_log_ratio=False, biased_ok=True)


class ClampOne(SampledTokenReverseKL):
    """The advantage clamped to +-1."""

    target = "reverse_kl"
    target_reason = ""

    def __init__(self) -> None:
        super().__init__(log_ratio_clamp=1.0)


class WrongOnlyWhenChunked(Declares):
    """Tells the two kinds of head apart."""

    needs = "full"

    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        factor = 1.0 if not hasattr(student, "_head") else 1.001
        return TokenLoss(factor * student.reverse_kl(teacher))


class Undeclared(Declares):
    """Says nothing of what it follows."""

    needs = "full"
    target = None

    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        return TokenLoss(student.reverse_kl(teacher))


class DetachedValue(Undeclared):
    """Right in its gradient, which is not that of its value."""

    target = "reverse_kl"

    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        loss = student.reverse_kl(teacher)
        return TokenLoss(loss - 0.5 * loss.detach() + torch.ones_like(loss))


class HalfReverseKL(Undeclared):
    """Right up to a factor."""

    target = "reverse_kl"

    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        return TokenLoss(0.5 * student.reverse_kl(teacher))


class Misspelt(Undeclared):
    target = "revers_kl"
