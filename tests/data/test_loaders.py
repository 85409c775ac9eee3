"""Batches and the place in the data."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lightning.data import EvalLoader, TrainLoader
from opd_lightning.data.encoding import EncodedPrompt
from opd_lightning.data.rounds import EvalRounds, TrainRounds
from opd_lightning.data.table import PromptTable
from opd_lightning.errors import ConfigError
from opd_lightning.records import PromptBatch


def _table(count: int, completions: bool = False, teacher: bool = False) -> PromptTable:
    """Prompt i is [10 + i] * (i % 3 + 1), its completion [20 + i], its teacher prompt [30 + i]."""
    return PromptTable(
        [
            EncodedPrompt(
                index=i,
                where=f"a.jsonl:{i + 1}",
                task="even" if i % 2 == 0 else "odd",
                answer=str(i),
                prompt_ids=[10 + i] * (i % 3 + 1),
                teacher_prompt_ids=[30 + i] if teacher and i == 1 else None,
                completion_ids=[20 + i] if completions else None,
                truncated=completions and i == 1,
            )
            for i in range(count)
        ]
    )


def _train_loader(num_workers: int = 0, **changes: Any) -> TrainLoader:
    options = {"num_prompts": 10, "prompts_per_step": 3, "seed": 5, **changes}
    return TrainLoader(_table(options["num_prompts"]), TrainRounds(**options), num_workers)


def _indices(batches: Iterable[PromptBatch]) -> list[list[int]]:
    return [batch.index.tolist() for batch in batches]


def test_batch_fields():
    (batch,) = EvalLoader(_table(3), EvalRounds(3, 8))
    assert batch.input_ids.tolist() == [[10, 0, 0], [11, 11, 0], [12, 12, 12]]
    assert batch.attention_mask.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert (batch.task, batch.answer) == (["even", "odd", "even"], ["0", "1", "2"])
    assert batch.index.tolist() == [0, 1, 2]
    assert batch.rollout is None and batch.teacher_input_ids is None


def test_teacher_prompts_fill_up_with_the_students():
    (batch,) = EvalLoader(_table(3, teacher=True), EvalRounds(3, 8))
    assert batch.unpadded("teacher_") == [[10], [31], [12, 12, 12]]


def test_completions_become_a_rollout():
    (batch,) = EvalLoader(_table(3, completions=True, teacher=True), EvalRounds(3, 8))
    rollout = batch.rollout
    assert rollout.token_ids.tolist() == [20, 21, 22]
    assert rollout.truncated.tolist() == [False, True, False]
    assert rollout.input_ids[1].tolist() == [11, 11, 21, 0]
    ids, _, mask = rollout.seen_by_teacher()
    assert ids[1].tolist() == [31, 21, 0, 0]
    assert ids[mask].tolist() == [20, 21, 22]


def test_empty_batch_has_the_fields_of_the_others():
    loader = EvalLoader(_table(9, completions=True, teacher=True), EvalRounds(9, 8, 0, 2))
    full, empty = loader
    assert (full.num_prompts, empty.num_prompts, empty.rollout.num_rows) == (4, 0, 0)
    assert empty.input_ids.shape == empty.teacher_input_ids.shape == (0, 0)
    assert empty.to("cpu").rollout.select_rows(torch.tensor([], dtype=torch.long)).num_rows == 0
    for name, value in vars(full).items():
        if isinstance(value, Tensor):
            assert getattr(empty, name).dtype == value.dtype, name
    assert empty.rollout.completion_mask.dtype == torch.bool


def test_evaluation_starts_anew_each_time():
    loader = EvalLoader(_table(5), EvalRounds(5, 2))
    assert len(loader) == 3
    assert _indices(loader) == _indices(loader) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_continues_with_the_next_epoch(num_workers: int):
    rounds = TrainRounds(10, 3, seed=5)
    loader = _train_loader(num_workers)
    assert len(loader) == 3
    seen = _indices(loader) + _indices(loader)
    assert seen == [rounds.indices(position) for position in range(6)]
    assert loader.position == 6


@pytest.mark.parametrize("num_workers", [0, 2])
def test_place_is_what_was_handed_out(num_workers: int):
    loader = _train_loader(num_workers)
    iter(loader)  # made and never used, as Lightning does
    batches = iter(loader)
    seen = _indices([next(batches), next(batches)])
    state = loader.state_dict()
    assert state["position"] == 2
    assert all(type(value) is int for value in state.values())
    restored = _train_loader()
    restored.load_state_dict(state)
    rounds = TrainRounds(10, 3, seed=5)
    assert seen + _indices(restored) == [rounds.indices(position) for position in range(5)]


@pytest.mark.parametrize(
    "change", [{"num_prompts": 11}, {"prompts_per_step": 2}, {"seed": 6}, {"shuffle": False}]
)
def test_place_in_other_data_is_refused(change: dict):
    name, value = next(iter(change.items()))
    with pytest.raises(ConfigError, match=rf"belongs to {name}=.*this run has {name}={int(value)}"):
        _train_loader(**change).load_state_dict(_train_loader().state_dict())


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(_train_loader())
    assert torch.equal(torch.get_rng_state(), before)
