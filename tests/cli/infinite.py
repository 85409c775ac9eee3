"""An objective whose loss is not finite."""

from opd_lightning.distributions import Distribution, TokenDistribution
from opd_lightning.objectives import Objective, TokenLoss
from opd_lightning.records import Rollout


class Infinite(Objective):
    """Loss: infinite at the last token."""

    needs = "sampled"

    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        """Return the student's log-probabilities, divided by zero at the last."""
        loss = student.logprobs(rollout.token_ids).clone()
        loss[-1] = float("inf")
        return TokenLoss(loss)
