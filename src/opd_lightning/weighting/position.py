"""Weights by a token's place among the completion tokens of its row, counted from 0."""

import math

import torch
from torch import Tensor

from opd_lightning.distributions import Distribution, TokenDistribution
from opd_lightning.errors import ConfigError
from opd_lightning.records import Rollout
from opd_lightning.weighting.base import TokenWeight


class PositionWindow(TokenWeight):
    """Weight 1 for the tokens at positions start <= position < end of a row, 0 for the others.

    `PositionWindow(end=m)` trains on prefixes, the idea of arXiv 2602.15260, with the prefix given
    in tokens. Unlike a lower completion limit it leaves the rollout and its reward whole.

    Args:
        start: First position that counts, in tokens, at least 0.
        end: First position that does not count any more, in tokens, above `start`; None: no end.

    Raises:
        ConfigError: If a bound is no whole number, `start` < 0 or `end` <= `start`.
    """

    def __init__(self, start: int = 0, end: int | None = None) -> None:
        whole = isinstance(start, int) and (end is None or isinstance(end, int))
        if not whole or start < 0 or (end is not None and end <= start):
            raise ConfigError(
                f"a window needs whole numbers of tokens, 0 <= start < end; got start={start}, "
                f"end={end}. Leave end out for a window that reaches to the end of the row."
            )
        self.start = start
        self.end = end

    def weight(self, rollout: Rollout, student: TokenDistribution, teacher: Distribution) -> Tensor:
        """Return 1 inside the window and 0 outside, [N]."""
        position = rollout.position
        inside = position >= self.start
        if self.end is not None:
            inside &= position < self.end
        return inside.to(torch.get_default_dtype())


class PositionDecay(TokenWeight):
    """Weight 2 ** (-position / half_life): 1 for the first token of a row, falling from there.

    Args:
        half_life: Tokens over which the weight halves, above 0.

    Raises:
        ConfigError: If `half_life` is not above 0, or infinite.
    """

    def __init__(self, half_life: float) -> None:
        if not 0 < half_life < math.inf:
            raise ConfigError(
                f"half_life must be a number of tokens above 0; got {half_life}. To weigh all "
                "tokens alike leave PositionDecay out."
            )
        self.half_life = half_life

    def weight(self, rollout: Rollout, student: TokenDistribution, teacher: Distribution) -> Tensor:
        """Return the weight of each token, [N]."""
        return torch.exp2(-rollout.position.to(torch.get_default_dtype()) / self.half_life)
