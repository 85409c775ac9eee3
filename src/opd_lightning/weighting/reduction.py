"""How token losses become one scalar: the only place that divides."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.errors import ConfigError, nearest
from opd_lightning.records import Rollout

ReductionName = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]


@dataclass(frozen=True)
class UpdateSize:
    """What one optimiser update covers, over all micro-batches and ranks.

    Attributes:
        num_tokens: Completion tokens.
        num_rows: Rows with at least one completion token.
        longest: Completion tokens of the longest row.
    """

    num_tokens: int
    num_rows: int
    longest: int


class Reduction:
    """Gives each token the factor that turns a sum of token losses into the named mean.

    Names and meanings are verl's (`loss_agg_mode`). The denominators are those of the WHOLE update,
    so the factors do not depend on how it is split into micro-batches and ranks:

    - `token-mean`: 1 / num_tokens. All completion tokens count alike (arXiv 2603.25562, eq. 8).
    - `seq-mean-token-mean`: 1 / (num_rows * tokens of the row). What that paper's code ran.
    - `seq-mean-token-sum`: 1 / num_rows. The estimator of the sequence-level theory.
    - `seq-mean-token-sum-norm`: 1 / (num_rows * horizon). Dr. GRPO's, without a length bias.

    Rows without completion tokens count nowhere. Tokens that a TokenWeight silences stay in the
    denominators: weights may depend on the models, denominators are known before the first forward.

    Args:
        name: One of the four.
        horizon: The constant of `seq-mean-token-sum-norm` in tokens, usually the completion limit;
            default the longest completion of the update.

    Raises:
        ConfigError: If the name is not known, or `horizon` is given to another reduction or < 1.
    """

    def __init__(self, name: ReductionName = "token-mean", horizon: int | None = None) -> None:
        known = ReductionName.__args__
        if name not in known:
            raise ConfigError(
                f"reduction {name!r} is not known.{nearest(name, known)} Known: {', '.join(known)}."
            )
        if horizon is not None and (name != "seq-mean-token-sum-norm" or horizon < 1):
            raise ConfigError(
                f"horizon={horizon} must be at least 1 and goes with seq-mean-token-sum-norm; the "
                f"reduction is {name!r}. Leave horizon out or change the reduction."
            )
        self.name = name
        self.horizon = horizon

    def scale(self, rollout: Rollout, size: UpdateSize) -> Tensor:
        """Return the factor of each completion token, [N] float64 (fp32 where there is none).

        Args:
            rollout: A micro-batch of the update, whole rows.
            size: The whole update, over all micro-batches and ranks.
        """
        row = rollout.row
        dtype = torch.float32 if row.device.type == "mps" else torch.float64
        ones = torch.ones(row.shape, dtype=dtype, device=row.device)
        if self.name == "token-mean":
            return ones / max(1, size.num_tokens)
        per_row = ones / max(1, size.num_rows)
        if self.name == "seq-mean-token-mean":
            return per_row / rollout.completion_lengths[row]
        if self.name == "seq-mean-token-sum":
            return per_row
        return per_row / (self.horizon or max(1, size.longest))
