"""The base class of token weights."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opd_lightning.distributions import Distribution, TokenDistribution
from opd_lightning.records import Rollout


class TokenWeight(ABC):
    """A weight in [0, 1] for each completion token; several of them multiply."""

    def setup(self, tokenizer: Any) -> None:  # noqa: B027 - optional, most weights need none
        """Look up what depends on the student's tokenizer; called once before training."""

    @abstractmethod
    def weight(self, rollout: Rollout, student: TokenDistribution, teacher: Distribution) -> Tensor:
        """Return weights [N] in [0, 1], detached; 0 leaves a token out of the loss."""


def combined_weight(
    weights: Sequence[TokenWeight],
    rollout: Rollout,
    student: TokenDistribution,
    teacher: Distribution,
) -> Tensor:
    """Return the product of all weights, [N]; ones where there is none."""
    product = torch.ones(student.num_tokens, device=rollout.input_ids.device)
    for weight in weights:
        product = product * weight.weight(rollout, student, teacher)
    return product


def by_row(values: Tensor, rollout: Rollout, fill: float) -> Tensor:
    """Return `values` [N] in the rollout's layout, [B, L], with `fill` off the completions."""
    return values.new_full(rollout.completion_mask.shape, fill).masked_scatter(
        rollout.completion_mask, values
    )
