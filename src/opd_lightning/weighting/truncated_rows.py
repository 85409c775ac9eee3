"""A weight for completions that the limit cut off."""

import torch
from torch import Tensor

from opd_lightning.distributions import Distribution, TokenDistribution
from opd_lightning.errors import ConfigError
from opd_lightning.records import Rollout
from opd_lightning.weighting.base import TokenWeight


class TruncatedRowWeight(TokenWeight):
    """One weight for all tokens of a row that the limit ended (`rollout.truncated`), 1 elsewhere.

    arXiv 2603.25562 keeps truncated rows in the loss, which is weight 1.

    Args:
        weight: Of a truncated row's tokens, from 0 (left out) to 1.

    Raises:
        ConfigError: If `weight` is not within [0, 1].
    """

    def __init__(self, weight: float = 0.0) -> None:
        if not 0 <= weight <= 1:
            raise ConfigError(
                f"the weight of truncated rows must lie within 0 and 1; got {weight}. 0 leaves "
                "them out, 1 keeps them like all others."
            )
        self.weight_of_truncated = weight

    def weight(self, rollout: Rollout, student: TokenDistribution, teacher: Distribution) -> Tensor:
        """Return the weight of each token's row, [N]."""
        ones = torch.ones(rollout.row.shape, device=rollout.row.device)
        return ones.masked_fill(rollout.truncated[rollout.row], self.weight_of_truncated)
