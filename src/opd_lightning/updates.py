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


@dataclass
class Update:
    """One optimiser step.

    Attributes:
        micro_batches: Whole rows each; as many on every rank, empty ones (no completion token, one
            row of padding) where a rank has fewer.
        size: Tokens and rows over all micro-batches and ranks: the denominators of the loss.
    """

    micro_batches: list[Rollout]
    size: UpdateSize


def plan_updates(
    rollout: Rollout,
    mini_batches: int = 1,
    micro_batch_tokens: int | None = None,
    all_gather: Callable[[Tensor], Tensor] = lambda table: table[None],
) -> list[Update]:
    """Split a rollout into `mini_batches` updates of equal rows, each into micro-batches.

    Args:
        rollout: This rank's B rows.
        mini_batches: Optimiser steps on this rollout; divides B.
        micro_batch_tokens: Largest rows x padded length of a micro-batch (a longer row stands
            alone); None: one micro-batch.
        all_gather: Returns the tables [W, M, 4] of all W ranks for this rank's [M, 4].

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
    sums, maxima = tables.sum(0).tolist(), tables.amax(0).tolist()
    return [
        Update(
            micro_batches=part + [_empty(rollout)] * (most - len(part)),
            size=UpdateSize(num_tokens=num_tokens, num_rows=num_rows, longest=longest),
        )
        for part, (num_tokens, num_rows, _, _), (_, _, longest, most) in zip(
            parts, sums, maxima, strict=True
        )
    ]


def micro_batch_rows(
    rollout: Rollout, micro_batch_tokens: int | None, rows: Tensor | None = None
) -> list[Tensor]:
    """Pack rows into micro-batches, longest first, so that little padding is computed.

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
    lengths = rollout.attention_mask.sum(1).cpu()
    rows = rows[lengths[rows].argsort(descending=True, stable=True)]
    packs: list[list[int]] = []
    for row in rows.tolist():
        # a pack's first row is its longest: rows x its length is what the pack costs
        if not packs or (len(packs[-1]) + 1) * int(lengths[packs[-1][0]]) > micro_batch_tokens:
            packs.append([])
        packs[-1].append(row)
    return [torch.tensor(pack) for pack in packs]


def _counts(micro_batches: list[Rollout]) -> list[int]:
    lengths = torch.cat([part.completion_lengths for part in micro_batches])
    return [
        int(lengths.sum()),
        int((lengths > 0).sum()),
        int(lengths.max()),
        len(micro_batches),
    ]


def _empty(rollout: Rollout) -> Rollout:
    """Return one row without completion tokens: its forward runs, its loss is a sum of nothing."""
    row = rollout.select_rows(torch.tensor([0]))
    return replace(row, completion_mask=torch.zeros_like(row.completion_mask))
