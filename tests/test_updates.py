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
    for pack, following in itertools.pairwise(packs):
        assert int(real[pack].min()) >= int(real[following].max())
        # no two neighbours could be one pack, unless that would waste a 32nd of the budget more
        together = (len(pack) + len(following)) * int(real[pack].max())
        apart = len(pack) * int(real[pack].max()) + len(following) * int(real[following].max())
        assert together > budget or together - apart >= budget / 32


def cheapest(lengths: list[int], budget: int) -> float:
    """Positions computed by the best cut of falling lengths; a pack is 1/32 of the budget more."""
    found = []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        packs = [[lengths[0]]]
        for cut, length in zip(cuts, lengths[1:], strict=True):
            if cut:
                packs.append([])
            packs[-1].append(length)
        if all(len(pack) == 1 or len(pack) * pack[0] <= budget for pack in packs):
            found.append(sum(len(pack) * pack[0] + budget / 32 for pack in packs))
    return min(found)


@pytest.mark.parametrize("budget", [20, 64, 200, 640])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_cut_is_cheaper(seed: int, budget: int):
    g = torch.Generator().manual_seed(seed)
    lengths = (20 * torch.randn(9, generator=g).exp()).long().clamp(1, 100).tolist()
    batch = rollout(lengths)
    packs = micro_batch_rows(batch, budget)
    cost = sum(batch.select_rows(pack).input_ids.numel() + budget / 32 for pack in packs)
    falling = sorted((length + 2 for length in lengths), reverse=True)
    assert cost == pytest.approx(cheapest(falling, budget))


def lognormal(seed: int, rows: int = 64, limit: int = 256) -> list[int]:
    """Completion lengths whose median is a quarter of the limit, which some rows reach."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.randn(rows, generator=g).exp()
    lengths = (limit / 4 * spread / spread.median()).long().clamp(1, limit)
    assert lengths.median() == limit / 4
    assert (lengths == limit).sum() >= 2
    return lengths.tolist()


@pytest.mark.parametrize("long_rows", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(8))
def test_little_padding_is_computed(seed: int, long_rows: int):
    """Budgets of one to eight of the longest rows; without one, padding dominates."""
    batch = rollout(lognormal(seed), prompt_length=16)
    budget = long_rows * batch.input_ids.shape[1]
    (update,) = plan_updates(batch, 1, budget)
    computed = sum(part.input_ids.numel() for part in update.micro_batches)
    real = int(batch.attention_mask.sum())
    assert update.padding_fraction == pytest.approx(1 - real / computed)
    assert update.padding_fraction < 0.1
    (whole,) = plan_updates(batch, 1, None)
    assert whole.padding_fraction == pytest.approx(1 - real / batch.input_ids.numel())
    assert whole.padding_fraction > 0.5
    (packed,) = plan_updates(batch, 1, None, packed=True)
    assert packed.padding_fraction == 0


def test_few_micro_batches_are_made_for_that():
    """Against as many rows as fit, longest first: at most 8 packs more for 64 rows."""
    for seed in range(8):
        batch = rollout(lognormal(seed), prompt_length=16)
        lengths = sorted(batch.attention_mask.sum(1).tolist(), reverse=True)
        for long_rows in (1, 2, 4, 8):
            budget, full = long_rows * batch.input_ids.shape[1], [[lengths[0]]]
            for length in lengths[1:]:
                if (len(full[-1]) + 1) * full[-1][0] > budget:
                    full.append([])
                full[-1].append(length)
            assert len(micro_batch_rows(batch, budget)) <= len(full) + 8


def test_without_a_budget_the_rows_stay_together_in_their_order():
    batch = rollout([3, 5, 1])
    assert [pack.tolist() for pack in micro_batch_rows(batch, None)] == [[0, 1, 2]]
    chosen = torch.tensor([2, 0])
    assert [pack.tolist() for pack in micro_batch_rows(batch, None, chosen)] == [[2, 0]]
    alike = rollout([5, 3, 5])
    assert [pack.tolist() for pack in micro_batch_rows(alike, 14, chosen)] == [[2, 0]]
    assert [pack.tolist() for pack in micro_batch_rows(alike, 13, chosen)] == [[2], [0]]


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
    plans = together([rollout([30, 20]), rollout([3, 3])], 1, 10)
    ((mine,), (others,)) = plans
    assert len(mine.micro_batches) == len(others.micro_batches) == 2
    filled, empty = others.micro_batches
    assert filled.num_tokens == 6
    assert (empty.num_rows, empty.num_tokens) == (1, 0)
    assert empty.input_ids.shape == empty.attention_mask.shape == empty.completion_mask.shape
    assert empty.input_ids.shape == (1, 1), "it costs one position and not a whole row"
    real = 32 + 22 + 5 + 5
    assert mine.padding_fraction == others.padding_fraction == pytest.approx(1 / (real + 1))


def test_an_empty_micro_batch_has_one_token_for_the_teacher_too():
    batch = rollout([3, 4])
    ids = torch.cat([torch.full((2, 3), 9), batch.input_ids], dim=1)
    batch.teacher_input_ids = ids
    batch.teacher_attention_mask = torch.cat(
        [torch.ones(2, 3, dtype=torch.long), batch.attention_mask], dim=1
    )
    more = torch.tensor([[[0, 0, 0, 2, 0, 0]]])
    (update,) = plan_updates(batch, 1, None, lambda table: torch.cat([table[None], more]))
    whole, empty = update.micro_batches
    assert whole.num_tokens == 7
    view = empty.seen_by_teacher()
    assert [part.shape for part in view] == [(1, 1)] * 3
    assert not view[2].any()


@pytest.mark.parametrize(("rows", "mini_batches"), [(4, 3), (2, 4), (0, 1)])
def test_a_number_of_updates_that_does_not_divide_the_rows_is_refused(rows: int, mini_batches: int):
    prompts = PromptBatch.from_token_ids([[0]] * rows)
    batch = Rollout.from_completions(prompts, [[1]] * rows, [False] * rows)
    with pytest.raises(ConfigError) as error:
        plan_updates(batch, mini_batches)
    assert f"mini_batches={mini_batches} must divide the {rows} completions" in str(error.value)
    assert "Change one" in str(error.value)
