"""How one rollout becomes optimiser updates, and each update micro-batches.

B rows, L tokens with padding, M updates.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_lightning.errors import ConfigError
from opd_lightning.records import Rollout
from opd_lightning.weighting import UpdateSize

# One more micro-batch is worth it where it saves this share of the budget in padding. A forward and
# backward has fixed costs (the head's gradient is written once more, kernels are launched, sharded
# weights are gathered); they are worth far fewer tokens than a thirty-second of a usual budget.
_WORTH_A_PACK = 1 / 32


@dataclass
class Update:
    """One optimiser step.

    Attributes:
        micro_batches: Whole rows each; as many on every rank, empty ones (one prompt token) where
            a rank has fewer.
        size: Tokens and rows over all micro-batches and ranks: the denominators of the loss.
        padding_fraction: Share of the positions that the student computes, over all micro-batches
            and ranks, that hold no token of a row; empty micro-batches are such positions.
    """

    micro_batches: list[Rollout]
    size: UpdateSize
    padding_fraction: float


def plan_updates(
    rollout: Rollout,
    mini_batches: int = 1,
    micro_batch_tokens: int | None = None,
    all_gather: Callable[[Tensor], Tensor] = lambda table: table[None],
    packed: bool = False,
) -> list[Update]:
    """Split a rollout into `mini_batches` updates of equal rows, each into micro-batches.

    Args:
        rollout: This rank's B rows.
        mini_batches: Optimiser steps on this rollout; divides B.
        micro_batch_tokens: Largest rows x padded length of a micro-batch (a longer row stands
            alone); None: one micro-batch.
        all_gather: Returns the tables [W, M, 6] of all W ranks for this rank's [M, 6].
        packed: Whether the student's forward leaves padding out (see `CausalPolicy`): then none is
            counted.

    Raises:
        ConfigError: If `mini_batches` does not divide B.
    """
    if rollout.num_rows == 0 or rollout.num_rows % mini_batches:
        raise ConfigError(
            f"mini_batches={mini_batches} must divide the {rollout.num_rows} completions that each "
            "rank has in a round (data.prompts_per_step * num_generations / ranks). Change one."
        )
    parts = [
        [rollout.select_rows(rows) for rows in micro_batch_rows(rollout, micro_batch_tokens, part)]
        for part in torch.arange(rollout.num_rows).chunk(mini_batches)
    ]
    table = torch.tensor([_counts(part) for part in parts], device=rollout.input_ids.device)
    tables = all_gather(table)
    updates = []
    for part, sums, maxima in zip(
        parts, tables.sum(0).tolist(), tables.amax(0).tolist(), strict=True
    ):
        num_tokens, num_rows, _, micro_batches, real, positions = sums
        _, _, longest, most, _, _ = maxima
        computed = (real if packed else positions) + len(tables) * most - micro_batches
        updates.append(
            Update(
                micro_batches=part + [_empty(rollout)] * (most - len(part)),
                size=UpdateSize(num_tokens=num_tokens, num_rows=num_rows, longest=longest),
                padding_fraction=1 - real / computed,
            )
        )
    return updates


def micro_batch_rows(
    rollout: Rollout, micro_batch_tokens: int | None, rows: Tensor | None = None
) -> list[Tensor]:
    """Pack rows of like length into micro-batches, longest first, so that little is padding.

    Among all ways to cut the rows, sorted by length, into packs within the budget, the one that
    computes the fewest positions, where each pack counts as 1/32 of the budget on top.

    Args:
        rollout: B rows.
        micro_batch_tokens: Largest rows x padded length of one; None: all rows together.
        rows: Indices of the rows to pack; default all.

    Returns:
        Row indices of each micro-batch.
    """
    rows = torch.arange(rollout.num_rows) if rows is None else rows
    if micro_batch_tokens is None:
        return [rows]
    lengths = rollout.attention_mask.sum(1).cpu()[rows]
    order = lengths.argsort(descending=True, stable=True)
    sizes = _pack_sizes(lengths[order], micro_batch_tokens)
    return list(rows[order].split(sizes))


def _pack_sizes(lengths: Tensor, budget: int) -> list[int]:
    """Return the number of rows of each pack, for falling `lengths` [B]."""
    lengths = lengths.double()
    # cost[e]: of the first e rows, packed at their best; first[e]: where the last of those begins
    cost = torch.zeros(len(lengths) + 1, dtype=torch.float64)
    first = [0]
    for end in range(1, len(lengths) + 1):
        # a pack's first row is its longest
        positions = torch.arange(end, 0, -1) * lengths[:end]
        fits = positions <= budget
        fits[-1] = True  # a longer row stands alone
        costs = torch.where(fits, cost[:end] + positions + _WORTH_A_PACK * budget, torch.inf)
        first.append(int(costs.argmin()))
        cost[end] = costs[first[-1]]
    sizes, end = [], len(lengths)
    while end:
        sizes.append(end - first[end])
        end = first[end]
    return sizes[::-1]


def _counts(micro_batches: list[Rollout]) -> list[int]:
    lengths = torch.cat([part.completion_lengths for part in micro_batches])
    return [
        int(lengths.sum()),
        int((lengths > 0).sum()),
        int(lengths.max()),
        len(micro_batches),
        sum(int(part.attention_mask.sum()) for part in micro_batches),
        sum(part.input_ids.numel() for part in micro_batches),
    ]


def _empty(rollout: Rollout) -> Rollout:
    """Return the first token of one row: its forward runs, its loss is a sum of nothing."""
    row = rollout.select_rows(torch.tensor([0]))
    first = {
        name: value[:, :1]
        for name, value in vars(row).items()
        if isinstance(value, Tensor) and value.dim() == 2
    }
    row = replace(row, **first)
    return replace(row, completion_mask=torch.zeros_like(row.completion_mask))
