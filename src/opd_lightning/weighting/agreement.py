"""A weight that trusts the teacher less the further a row has gone from what it would write."""

import torch
from torch import Tensor

from opd_lightning.distributions import Distribution, TokenDistribution
from opd_lightning.errors import ConfigError
from opd_lightning.records import Rollout
from opd_lightning.weighting.base import TokenWeight, by_row


class AgreementSoFar(TokenWeight):
    """Weight exp(-rate * mean |A_u| over the earlier tokens u < t of the row); 1 for the first.

    A_u = log q(y_u) - log pi(y_u) in nats, detached: the gap between teacher and student on the
    sampled token. Source: the idea of arXiv 2605.07725 (SOD), in this form a token at a time.

    A token that the teacher rules out (log q = -inf) is a gap without limit: all later tokens of
    the row weigh 0. A gap that is NaN is not known and is left out of the mean.

    Args:
        rate: How fast the weight falls, per nat, above 0.

    Raises:
        ConfigError: If `rate` is not above 0.
    """

    def __init__(self, rate: float = 1.0) -> None:
        if not rate > 0:
            raise ConfigError(
                f"rate must be above 0; got {rate}. To weigh all tokens alike leave "
                "AgreementSoFar out."
            )
        self.rate = rate

    def weight(self, rollout: Rollout, student: TokenDistribution, teacher: Distribution) -> Tensor:
        """Return the weight of each token, [N]; reads the sampled tokens' log-probabilities."""
        # detached and not under no_grad: the student keeps its logsumexp for the objective
        student_logprobs = student.logprobs(rollout.token_ids).detach()
        gaps = (teacher.logprobs(rollout.token_ids).detach() - student_logprobs).abs()
        known = ~gaps.isnan()
        before = _sum_of_earlier(torch.where(known, gaps, 0.0), rollout)
        num_before = _sum_of_earlier(known.to(gaps.dtype), rollout)
        mean = before / num_before.clamp(min=1)
        return torch.exp(-self.rate * mean).to(student_logprobs.dtype)


def _sum_of_earlier(values: Tensor, rollout: Rollout) -> Tensor:
    """Return the sum over the earlier tokens of the row, [N]."""
    sums = by_row(values, rollout, fill=0.0).cumsum(dim=1)
    # moved by a column and not `sums - values`, which is NaN after an infinite value
    earlier = torch.nn.functional.pad(sums, (1, 0))[:, :-1]
    return earlier[rollout.completion_mask]
