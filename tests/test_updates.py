"""plan_updates and micro_batch_rows: what is packed with what, and the counts of all ranks."""

import itertools

import pytest
import torch
from torch import Tensor

from opd_lightning.errors import ConfigError
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.updates import micro_batch_rows, plan_updates
from opd_lightning.weighting import UpdateSize


def rollout(lengths: list[int], prompt_length: int = 2) -> Rollout:
    """Token i of row r is 100 * r + i + 1: no two tokens are alike."""
    prompts = PromptBatch.from_token_ids([[0] * prompt_length for _ in lengths])
    completions = [[100 * r + i + 1 for i in range(n)] for r, n in enumerate(lengths)]
    return Rollout.from_completions(prompts, completions, [False] * len(lengths))


def heavy_tailed(rows: int = 200, limit: int = 1000) -> list[int]:
    g = torch.Generator().manual_seed(0)
    return (8 / torch.rand(rows, generator=g)).long().clamp(1, limit).tolist()


@pytest.mark.parametrize("budget", [1, 50, 400, 1002, 5000, 10**9])
def test_every_row_is_packed_once_and_within_the_budget(budget: int):
    batch = rollout(heavy_tailed())
    packs = micro_batch_rows(batch, budget)
    assert sorted(torch.cat(packs).tolist()) == list(range(batch.num_rows))
    real = batch.attention_mask.sum(1)
    for pack in packs:
        part = batch.select_rows(pack)
        assert part.input_ids.numel() == len(pack) * int(real[pack].max())
        assert part.input_ids.numel() <= budget or len(pack) == 1
    # no pack could have taken the first row of the next one
    for pack, following in itertools.pairwise(packs):
        assert (len(pack) + 1) * int(real[pack].max()) > budget
        assert int(real[pack].min()) >= int(real[following].max())


def test_little_padding_is_computed():
    batch = rollout(heavy_tailed())
    real = int(batch.attention_mask.sum())

    def computed(packs: list[Tensor]) -> int:
        return sum(batch.select_rows(pack).input_ids.numel() for pack in packs)

    packs = micro_batch_rows(batch, 2048)
    as_they_come = list(torch.arange(batch.num_rows).split(-(-batch.num_rows // len(packs))))
    assert computed([torch.arange(batch.num_rows)]) > 10 * real, "the premise: padding dominates"
    assert computed(as_they_come) > 5 * real
    assert computed(packs) < 1.3 * real


def test_without_a_budget_the_rows_stay_together_in_their_order():
    batch = rollout([3, 5, 1])
    assert [pack.tolist() for pack in micro_batch_rows(batch, None)] == [[0, 1, 2]]
    chosen = torch.tensor([2, 0])
    assert [pack.tolist() for pack in micro_batch_rows(batch, None, chosen)] == [[2, 0]]
    assert [pack.tolist() for pack in micro_batch_rows(batch, 10, chosen)] == [[0, 2]]
    assert [pack.tolist() for pack in micro_batch_rows(batch, 9, chosen)] == [[0], [2]]


@pytest.mark.parametrize("budget", [None, 1, 9, 10**6])
@pytest.mark.parametrize("mini_batches", [1, 2, 3, 6])
def test_updates_hold_each_token_once_and_know_their_size(mini_batches: int, budget: int | None):
    lengths = [4, 0, 7, 1, 2, 2]
    updates = plan_updates(rollout(lengths), mini_batches, budget)
    assert len(updates) == mini_batches
    rows = 6 // mini_batches
    for number, update in enumerate(updates):
        mine = lengths[number * rows : (number + 1) * rows]
        assert update.size == UpdateSize(sum(mine), sum(n > 0 for n in mine), max(mine))
        tokens = torch.cat([part.token_ids for part in update.micro_batches]).tolist()
        first = number * rows
        assert sorted(tokens) == [
            100 * (first + r) + i + 1 for r, n in enumerate(mine) for i in range(n)
        ]


def together(rollouts: list[Rollout], mini_batches: int, budget: int | None):
    """The plans of ranks that hold these rollouts; `all_gather` really gathers their tables."""
    tables: list[Tensor] = []

    def note(table: Tensor) -> Tensor:
        tables.append(table)
        return table[None]

    for part in rollouts:
        plan_updates(part, mini_batches, budget, note)
    return [plan_updates(p, mini_batches, budget, lambda _: torch.stack(tables)) for p in rollouts]


@pytest.mark.parametrize("budget", [None, 6, 12])
def test_all_ranks_have_as_many_micro_batches_and_one_size(budget: int | None):
    lengths = [[4, 9, 7, 1], [2, 2, 0, 0], [1, 1, 1, 1]]
    plans = together([rollout(ranks) for ranks in lengths], 2, budget)
    for number, updates in enumerate(zip(*plans, strict=True)):
        assert len({len(update.micro_batches) for update in updates}) == 1
        mine = [n for ranks in lengths for n in ranks[2 * number : 2 * number + 2]]
        size = UpdateSize(sum(mine), sum(n > 0 for n in mine), max(mine))
        assert [update.size for update in updates] == [size] * 3
    if budget == 6:
        assert [len(update.micro_batches) for update in plans[2]] == [2, 2]


def test_a_micro_batch_added_for_other_ranks_is_empty():
    plans = together([rollout([30, 30]), rollout([3, 2])], 1, 10)
    ((mine,), (others,)) = plans
    assert len(mine.micro_batches) == len(others.micro_batches) == 2
    filled, empty = others.micro_batches
    assert filled.num_tokens == 5
    assert (empty.num_rows, empty.num_tokens) == (1, 0)
    assert empty.input_ids.shape == empty.completion_mask.shape


@pytest.mark.parametrize(("rows", "mini_batches"), [(4, 3), (2, 4), (0, 1)])
def test_a_number_of_updates_that_does_not_divide_the_rows_is_refused(rows: int, mini_batches: int):
    prompts = PromptBatch.from_token_ids([[0]] * rows)
    batch = Rollout.from_completions(prompts, [[1]] * rows, [False] * rows)
    with pytest.raises(ConfigError) as error:
        plan_updates(batch, mini_batches)
    assert f"mini_batches={mini_batches} must divide the {rows} completions" in str(error.value)
    assert "Change one" in str(error.value)
