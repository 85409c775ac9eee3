"""A loss or gradient that is not finite stops the run before it reaches the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from opd_lightning.errors import RunError
from opd_lightning.module import OPDModule
from opd_lightning.objectives import Objective, ReverseKL, TokenLoss, TopKReverseKL
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.teachers import LocalTeacher
from opd_lightning.weighting import SpecialTokenMask
from tests.module.harness import (
    Gradients,
    answered,
    csv_logger,
    distance,
    fit,
    logged,
    module,
    weights,
)
from tests.tiny import tiny_tokenizer

BAD = 290
"""A token whose embedding is NaN in the broken teacher: so is all it says of that row.

Of earlier tokens too: attention weighs their values with 0, and 0 times NaN is NaN.
"""


@pytest.fixture(scope="module")
def broken_teacher(models: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("broken")
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher")
    with torch.no_grad():
        teacher.get_input_embeddings().weight[BAD] = torch.nan
    teacher.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


class BadTokens(Objective):
    """A plain loss, but for the token BAD: there infinite, or finite with an infinite gradient."""

    needs = "sampled"

    def __init__(self, where: str) -> None:
        self.where = where

    def token_loss(self, student: Any, teacher: Any, rollout: Any) -> TokenLoss:
        logprobs = student.logprobs(rollout.token_ids)
        bad = rollout.token_ids == BAD
        if self.where == "loss":
            return TokenLoss(torch.where(bad, torch.inf, -logprobs))
        zero = torch.where(bad, logprobs - logprobs.detach(), 1.0)
        return TokenLoss(torch.where(bad, zero.sqrt(), -logprobs))


def with_bad_token(row: int, position: int, lengths: tuple[int, ...] = (5, 2, 7, 1)) -> PromptBatch:
    batch = answered(lengths)
    ids = batch.rollout.input_ids
    ids[ids == BAD] = BAD - 1
    column = int(batch.rollout.completion_mask[row].nonzero()[position])
    ids[row, column] = BAD
    return batch


def stopped(model: OPDModule, bad: PromptBatch, folder: Path) -> str:
    """Train on a good round and a bad one; return the message of the error."""
    good = answered(seed=8)
    good.rollout.input_ids[good.rollout.input_ids == BAD] = BAD - 1
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    with pytest.raises(RunError) as error:
        fit(
            model,
            [good, bad, good],
            saving,
            enable_checkpointing=True,
            logger=csv_logger(folder),
        )
    checkpoints = sorted(path.name for path in folder.glob("*.ckpt"))
    assert checkpoints == ["last.ckpt", "step=1.ckpt"]
    state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in weights(model).items():
        assert torch.equal(state[f"student.model.{name}"], value), name
        assert bool(torch.isfinite(value).all())
    assert [line["step"] for line in logged(folder)] == [1]
    return str(error.value)


def saved(folder: Path) -> list[Rollout]:
    parts = torch.load(folder / "non_finite_rollout.pt", weights_only=True)
    return [Rollout(**fields) for fields in parts]


def test_a_teacher_with_nan_stops_the_run(models: Path, tmp_path: Path, broken_teacher: str):
    model = module(models, teacher=LocalTeacher(broken_teacher))
    batch = with_bad_token(row=2, position=3)
    message = stopped(model, batch, tmp_path)
    row = batch.rollout.input_ids[2][batch.rollout.completion_mask[2]]
    assert message.startswith("the loss is nan at 7 of 15 tokens: ")
    for position, token in enumerate(row[:5].tolist()):
        spelled = repr(tiny_tokenizer().decode([token]))
        assert f"row 2 position {position} {spelled} (nan)" in message
    assert str(tmp_path / "non_finite_rollout.pt") in message
    assert "the weights and the last checkpoint are as they were" in message
    assert "Mask those tokens (SpecialTokenMask) or bound the loss" in message
    (part,) = saved(tmp_path)
    assert torch.equal(part.input_ids, batch.rollout.input_ids)
    assert torch.equal(part.token_ids, batch.rollout.token_ids)


def test_an_infinite_loss_names_its_token(models: Path, tmp_path: Path):
    batch = with_bad_token(row=1, position=1)
    message = stopped(module(models, BadTokens("loss")), batch, tmp_path)
    spelled = repr(tiny_tokenizer().decode([BAD]))
    assert f"the loss is inf at 1 of 15 tokens: row 1 position 1 {spelled} (inf)" in message


def test_rows_are_those_of_the_saved_micro_batch(models: Path, tmp_path: Path):
    batch = with_bad_token(row=1, position=1)
    model = module(models, BadTokens("loss"), micro_batch_tokens=12)
    message = stopped(model, batch, tmp_path)
    row = int(message.split("row ")[1].split()[0])
    (part,) = saved(tmp_path)
    assert part.num_rows < 4
    assert int(part.input_ids[row][part.completion_mask[row]][1]) == BAD


def test_at_most_five_tokens_are_named(models: Path, tmp_path: Path):
    batch = with_bad_token(row=2, position=0)
    batch.rollout.input_ids[2][batch.rollout.completion_mask[2]] = BAD
    ids = batch.rollout.input_ids[2]
    ids[batch.rollout.completion_mask[2]] = BAD
    message = stopped(module(models, BadTokens("loss")), batch, tmp_path)
    assert "at 7 of 15 tokens" in message
    assert message.count("row 2 position") == 5


@pytest.mark.parametrize("limit", [1.0, None])
@pytest.mark.parametrize("budget", [None, 6])
def test_a_gradient_that_is_not_finite_stops_the_run(
    models: Path, tmp_path: Path, limit: float | None, budget: int | None
):
    model = module(models, BadTokens("gradient"), max_grad_norm=limit, micro_batch_tokens=budget)
    batch = with_bad_token(row=1, position=0)
    message = stopped(model, batch, tmp_path)
    assert message.startswith("the gradient's norm is ")
    assert message.split()[4] in ("nan", "inf")
    assert "although the loss is finite" in message
    assert str(tmp_path / "non_finite_rollout.pt") in message
    assert "the weights and the last checkpoint are as they were" in message
    assert "Lower the learning rate" in message
    tokens = [part.token_ids for part in saved(tmp_path)]
    assert len(tokens) == (1 if budget is None else 4), "all micro-batches: any may have done it"
    assert sorted(torch.cat(tokens).tolist()) == sorted(batch.rollout.token_ids.tolist())


@pytest.mark.parametrize("objective", [ReverseKL(), TopKReverseKL(4)])
def test_a_teachers_nan_at_a_masked_token_changes_nothing(
    models: Path, tmp_path: Path, broken_teacher: str, objective: Objective
):
    """Row 3 has BAD in its prompt and one token in its completion, which is masked."""
    batch = answered((5, 2, 7, 1))
    ids = batch.rollout.input_ids
    ids[ids == BAD] = BAD - 1
    ids[3, 0] = BAD
    mask = SpecialTokenMask(ids[3][batch.rollout.completion_mask[3]].tolist())
    steps = []
    for teacher in (broken_teacher, str(models / "teacher")):
        gradients = Gradients()
        folder = tmp_path / str(len(steps))
        model = module(models, objective, teacher=LocalTeacher(teacher), weights=[mask])
        fit(model, [batch], gradients, logger=csv_logger(folder))
        (line,) = logged(folder)
        assert 0 < line["weights/masked_frac"] <= 2 / 15
        assert all(value == value for value in line.values()), line
        steps.append(gradients.steps[0])
    assert distance(steps[0], steps[1]) == 0
