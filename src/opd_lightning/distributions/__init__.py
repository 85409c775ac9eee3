"""Next-token distributions at N positions over a vocabulary of V, read lazily and in chunks."""

from opd_lightning.distributions.base import Distribution, TokenDistribution
from opd_lightning.distributions.topk import TopKDistribution

__all__ = ["Distribution", "TokenDistribution", "TopKDistribution"]
