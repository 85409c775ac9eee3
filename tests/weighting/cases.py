"""Rollouts with empty rows and rows of one token, and two models' logits for them."""

import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution, TopKDistribution
from opd_lightning.records import Rollout

V, D = 7, 5
# tokens of each row; two rows have none
LENGTHS = {"several": [4, 0, 1, 10, 2, 0], "one_token": [1], "no_tokens": [0, 0], "no_rows": []}


def rollout_of(lengths: list[int], truncated: list[bool] | None = None) -> Rollout:
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths).long())
    ids = torch.randint(V, row.shape, generator=torch.Generator().manual_seed(4))
    return Rollout.from_flat(
        ids,
        row,
        truncated=None if truncated is None else torch.tensor(truncated, dtype=torch.bool),
        task=["default"] * len(lengths),
    )


def with_gap() -> Rollout:
    """Two rows, the first of two spans: 3 tokens, one of another speaker, 2 tokens."""
    rollout = rollout_of([6, 3])
    rollout.completion_mask[0, 4] = False
    return rollout


def logits(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(n, V, generator=g, dtype=torch.float64).to(dtype)


def dense(n: int, seed: int, dtype: torch.dtype = torch.float64) -> TokenDistribution:
    return TokenDistribution.from_logits(logits(n, seed, dtype))


def served(teacher_logits: Tensor, rollout: Rollout, k: int = 2) -> TopKDistribution:
    """What a teacher gives that knows its top k and the sampled token."""
    logprobs = teacher_logits.log_softmax(1)
    best = logprobs.topk(k)
    sampled = logprobs[torch.arange(len(logprobs)), rollout.token_ids]
    return TopKDistribution(best.indices, best.values, sampled)


def rows_of(rollout: Rollout) -> list[list[int]]:
    """The places among the N tokens of each row's completion tokens."""
    row = rollout.row.tolist()
    return [[n for n, r in enumerate(row) if r == b] for b in range(rollout.num_rows)]
