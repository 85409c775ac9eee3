"""Rollouts and prompt batches: flat views, joining, the teacher's view, picking rows."""

import doctest

import pytest
import torch
from torch import Tensor

from opd_lightning import records
from opd_lightning.errors import ConfigError
from opd_lightning.records import PromptBatch, Rollout, pad_right


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def example() -> Rollout:
    prompts = PromptBatch.from_token_ids([[5, 6], [5]])
    return Rollout.from_completions(prompts, [[7, 8], [9]], [False, True])


def test_the_example_of_the_docstring_holds():
    rollout = example()
    assert rollout.input_ids.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert rollout.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert rollout.completion_mask.tolist() == [
        [False, False, True, True],
        [False, True, False, False],
    ]
    assert rollout.token_ids.tolist() == [7, 8, 9]
    assert rollout.row.tolist() == [0, 0, 1]
    assert rollout.position.tolist() == [0, 1, 0]
    assert rollout.truncated.tolist() == [False, True]
    assert (rollout.num_rows, rollout.num_tokens) == (2, 3)
    assert rollout.completion_lengths.tolist() == [2, 1]
    for text in ("[[5, 6, 7, 8], [5, 9, 0, 0]]", "`token_ids = [7, 8, 9]`", "`row = [0, 0, 1]`"):
        assert text in Rollout.__doc__
    assert doctest.testmod(records).failed == 0


FLAT_IDS, FLAT_ROW = ints(3, 0, 7, 5, 5), ints(0, 0, 2, 2, 2)


def test_flat_views_return_what_from_flat_was_given():
    numbers = torch.tensor([-0.5, -1.0, -2.0, 0.0, -4.0], dtype=torch.float64)
    rollout = Rollout.from_flat(
        FLAT_IDS,
        FLAT_ROW,
        sampling_logprobs=numbers,
        old_logprobs=2 * numbers,
        reward=torch.tensor([1.0, 0.0, 0.5, 0.0]),
        truncated=torch.tensor([True, False, False, True]),
        task=["a", "b", "c", "d"],
    )
    assert torch.equal(rollout.token_ids, FLAT_IDS)
    assert torch.equal(rollout.row, FLAT_ROW)
    assert rollout.position.tolist() == [0, 1, 0, 1, 2]
    assert torch.equal(rollout.flat_sampling_logprobs, numbers)
    assert torch.equal(rollout.flat_old_logprobs, 2 * numbers)
    assert rollout.completion_lengths.tolist() == [2, 0, 3, 0]
    assert (rollout.num_rows, rollout.num_tokens) == (4, 5)
    assert rollout.task == ["a", "b", "c", "d"]
    assert rollout.truncated.tolist() == [True, False, False, True]
    assert rollout.reward.tolist() == [1.0, 0.0, 0.5, 0.0]
    assert rollout.attention_mask.sum(1).tolist() == [3, 1, 4, 1]  # the prompt is one token


def test_from_flat_fills_in_what_is_left_out():
    rollout = Rollout.from_flat(FLAT_IDS, FLAT_ROW)
    assert rollout.num_rows == 3 and rollout.task == ["default"] * 3
    assert not rollout.truncated.any() and rollout.truncated.shape == (3,)
    assert rollout.flat_sampling_logprobs is None and rollout.flat_old_logprobs is None
    assert rollout.reward is None


@pytest.mark.parametrize("task", [None, [], ["a", "b"]])
def test_from_flat_of_no_tokens(task: list[str] | None):
    rollout = Rollout.from_flat(ints(), ints(), task=task)
    assert rollout.num_tokens == 0 and rollout.num_rows == len(task or [])
    assert rollout.token_ids.shape == rollout.row.shape == rollout.position.shape == (0,)


@pytest.mark.parametrize(("ids", "row", "message"), [
    (ints(1, 2), ints(0), r"one length; got \(2,\) and \(1,\)"),
    (ints(1, 2).reshape(1, 2), ints(0, 0).reshape(1, 2), r"flat .*\(1, 2\) and \(1, 2\)"),
    (ints(1, 2), ints(1, 0), r"never fall.*got \[1, 0\]"),
    (ints(1, 2), ints(-1, 0), r"start at 0 or above.*got \[-1, 0\]"),
])  # fmt: skip
def test_from_flat_refuses_what_is_not_row_by_row(ids: Tensor, row: Tensor, message: str):
    with pytest.raises(ConfigError, match=message):
        Rollout.from_flat(ids, row)


def test_from_completions_repeats_prompts_and_tasks_for_siblings():
    prompts = PromptBatch.from_token_ids([[5, 6, 6], [4]], task=["math", "chat"])
    rollout = Rollout.from_completions(
        prompts,
        [[7], [], [8, 9], [1, 1, 1]],
        [False, False, True, False],
        sampling_logprobs=[[-1.0], [], [-2.0, -3.0], [-4.0, -5.0, -6.0]],
    )
    assert rollout.task == ["math", "math", "chat", "chat"]
    assert rollout.input_ids.tolist() == [[5, 6, 6, 7], [5, 6, 6, 0], [4, 8, 9, 0], [4, 1, 1, 1]]
    assert rollout.attention_mask.sum(1).tolist() == [4, 3, 3, 4]
    assert rollout.row.tolist() == [0, 2, 2, 3, 3, 3]
    assert rollout.flat_sampling_logprobs.tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    assert rollout.sampling_logprobs[~rollout.completion_mask].abs().sum() == 0
    assert rollout.truncated.tolist() == [False, False, True, False]
    assert rollout.teacher_input_ids is None


def test_a_token_zero_in_prompt_or_completion_is_no_padding():
    prompts = PromptBatch.from_token_ids([[0, 0], [3]])
    rollout = Rollout.from_completions(prompts, [[0, 4], [0]], [False, False])
    assert rollout.token_ids.tolist() == [0, 4, 0]
    assert rollout.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def with_teacher_prompts(teacher_prompts: list[list[int]]) -> Rollout:
    prompts = PromptBatch.from_token_ids([[5, 6], [5], [4, 4, 4]])
    prompts.teacher_input_ids, prompts.teacher_attention_mask = pad_right(teacher_prompts)
    return Rollout.from_completions(prompts, [[7, 8, 9], [9], []], [False] * 3)


@pytest.mark.parametrize("teacher_prompts", [
    [[1, 1, 1, 1, 1], [1, 2], [3, 3, 3, 3]],
    [[1], [2], [3]],
    [[1], [2, 2, 2, 2, 2, 2], [3, 3, 3]],
])  # fmt: skip
def test_the_teacher_sees_the_same_tokens_behind_longer_and_shorter_prompts(
    teacher_prompts: list[list[int]],
):
    rollout = with_teacher_prompts(teacher_prompts)
    ids, attention, mask = rollout.seen_by_teacher()
    for row, prompt in enumerate(teacher_prompts):
        length = int(attention[row].sum())
        completion = [[7, 8, 9], [9], []][row]
        assert ids[row, :length].tolist() == prompt + completion
        assert mask[row].nonzero()[:, 0].tolist() == list(range(len(prompt), length))
    assert torch.equal(ids[mask], rollout.token_ids)


def test_the_teacher_sees_several_spans():
    rollout = with_teacher_prompts([[1, 1, 1, 1, 1], [2, 2], [3]])
    rollout.completion_mask[0, 3] = False  # the 8 belongs to another speaker
    ids, _, mask = rollout.seen_by_teacher()
    assert ids[mask].tolist() == rollout.token_ids.tolist() == [7, 9, 9]
    assert mask[0].nonzero()[:, 0].tolist() == [5, 7]


def test_without_prompts_of_its_own_the_teacher_sees_the_student_rows():
    rollout = example()
    ids, attention, mask = rollout.seen_by_teacher()
    assert ids is rollout.input_ids and attention is rollout.attention_mask
    assert mask is rollout.completion_mask


def test_position_counts_completion_tokens_over_several_spans():
    rollout = Rollout.from_flat(ints(1, 2, 3, 4), ints(0, 0, 0, 1))
    rollout.completion_mask[0, 2] = False
    assert rollout.token_ids.tolist() == [1, 3, 4]
    assert rollout.position.tolist() == [0, 1, 0]


def test_select_rows_keeps_the_order_asked_for_and_cuts_padding():
    rollout = with_teacher_prompts([[1] * 9, [2, 2], [3] * 5])
    rollout.reward = torch.tensor([0.0, 1.0, 2.0])
    rollout.task = ["a", "b", "c"]
    rollout.sampling_logprobs = -rollout.input_ids.float()
    rollout.old_logprobs = -2.0 * rollout.input_ids
    part = rollout.select_rows(ints(2, 1))
    assert part.task == ["c", "b"] and part.reward.tolist() == [2.0, 1.0]
    assert part.input_ids.tolist() == [[4, 4, 4], [5, 9, 0]]
    assert part.teacher_input_ids.tolist() == [[3, 3, 3, 3, 3], [2, 2, 9, 0, 0]]
    for name in ("attention_mask", "completion_mask", "sampling_logprobs", "old_logprobs"):
        assert getattr(part, name).shape == (2, 3), name
    assert part.teacher_attention_mask.shape == (2, 5)
    assert part.token_ids.tolist() == [9] and part.flat_sampling_logprobs.tolist() == [-9.0]
    ids, _, mask = part.seen_by_teacher()
    assert ids[mask].tolist() == [9]
    assert rollout.input_ids.shape == (3, 5), "the rollout itself is as it was"


def test_select_rows_may_repeat_rows_and_take_none():
    rollout = example()
    assert rollout.select_rows(ints(1, 0, 1)).token_ids.tolist() == [9, 7, 8, 9]
    none = rollout.select_rows(ints())
    assert none.num_rows == none.num_tokens == 0 and none.task == []
    assert none.token_ids.shape == (0,) and none.position.shape == (0,)


def test_picking_all_rows_in_parts_loses_nothing():
    rollout = Rollout.from_flat(FLAT_IDS, FLAT_ROW, sampling_logprobs=torch.arange(5.0))
    parts = [rollout.select_rows(ints(r)) for r in range(3)]
    assert torch.equal(torch.cat([p.token_ids for p in parts]), FLAT_IDS)
    assert torch.equal(torch.cat([p.flat_sampling_logprobs for p in parts]), torch.arange(5.0))


def test_to_moves_every_tensor_and_the_rollout_inside_a_batch():
    batch = PromptBatch.from_token_ids([[5, 6], [5]], task=["a", "b"])
    batch.rollout = example()
    moved = batch.to("meta")
    for record, old in ((moved, batch), (moved.rollout, batch.rollout)):
        assert type(record) is type(old)
        for name, value in vars(record).items():
            was = getattr(old, name)
            if isinstance(value, Tensor):
                assert value.device.type == "meta" and was.device.type == "cpu", name
                assert value.shape == was.shape and value.dtype == was.dtype, name
            elif name != "rollout":
                assert value == was, name


def test_prompt_batch_from_token_ids_and_back():
    lists = [[5, 0, 6], [], [7]]
    batch = PromptBatch.from_token_ids(lists)
    assert batch.unpadded() == lists and batch.num_prompts == 3
    assert batch.index.tolist() == [0, 1, 2] and batch.task == ["default"] * 3
    batch.teacher_input_ids, batch.teacher_attention_mask = pad_right([[1], [2, 2], []])
    assert batch.unpadded("teacher_") == [[1], [2, 2], []]


def test_pad_right_of_nothing():
    ids, mask = pad_right([])
    assert ids.shape == mask.shape == (0, 0) and ids.dtype == torch.long
