"""What a served teacher gives: the K likeliest tokens of each position and the sampled token."""

import torch
from torch import Tensor

from opd_lightning.distributions.base import Distribution
from opd_lightning.errors import ConfigError

_WHO_WORKS = (
    "Objectives that work with it: SampledTokenReverseKL, SequenceReverseKL, TopKReverseKL and "
    "HeadTailReverseKL (all on the teacher's support, with k at most that of the teacher)."
)


class TopKDistribution(Distribution):
    """N distributions of which K log-probabilities each are known, and the sampled token's.

    Args:
        ids: [N, K] int64, likeliest first, without repetitions in a row.
        logprobs: [N, K] nats, of the full softmax (not renormalised on the K).
        sampled_logprobs: [N] nats, log-probability of the completion's own token.

    Raises:
        ConfigError: If the shapes do not agree; and by any read that needs more than this.
    """

    provides = "topk"

    def __init__(self, ids: Tensor, logprobs: Tensor, sampled_logprobs: Tensor) -> None:
        if ids.dim() != 2 or ids.shape != logprobs.shape or sampled_logprobs.shape != ids.shape[:1]:
            raise ConfigError(
                "ids and logprobs must be [N, K] and sampled_logprobs [N]; got "
                f"{tuple(ids.shape)}, {tuple(logprobs.shape)} and {tuple(sampled_logprobs.shape)}."
            )
        self.ids, self._logprobs, self.sampled_logprobs = ids, logprobs, sampled_logprobs

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.ids.shape[0]

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the first k ids and log-probabilities, [N, k].

        Raises:
            ConfigError: If k is above the K that the teacher gave.
        """
        if k > self.ids.shape[1]:
            raise ConfigError(
                f"the top {k} tokens were asked of a teacher that gives {self.ids.shape[1]}. "
                "Lower the objective's k or have the teacher return more log-probabilities."
            )
        return self.ids[:, :k], self._logprobs[:, :k]

    def logprobs(self, ids: Tensor) -> Tensor:
        """Return the sampled tokens' log-probabilities [N]; `ids` must be those tokens, [N].

        Raises:
            ConfigError: If `ids` is [N, K]: log-probabilities of chosen ids are not known.
        """
        if ids.dim() != 1:
            raise ConfigError(
                f"a teacher that gives only its top {self.ids.shape[1]} cannot give "
                f"log-probabilities of chosen ids {tuple(ids.shape)}. {_WHO_WORKS}"
            )
        return self.sampled_logprobs

    def finite_where_ignored(self, ignored: Tensor) -> "TopKDistribution":
        """Return a copy with 0 for non-finite log-probabilities at `ignored` [N]."""
        logprobs = torch.where(ignored[:, None] & ~self._logprobs.isfinite(), 0.0, self._logprobs)
        sampled = torch.where(
            ignored & ~self.sampled_logprobs.isfinite(), 0.0, self.sampled_logprobs
        )
        return TopKDistribution(self.ids, logprobs, sampled)

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(name)
        raise ConfigError(
            f"{name!r} needs the whole vocabulary of the teacher, which gives its top "
            f"{self.ids.shape[1]} only. {_WHO_WORKS}"
        )
