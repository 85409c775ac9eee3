"""Every refusal and warning by its words: the value seen and what to do."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from opd_lightning import checks
from opd_lightning.data import OPDDataModule
from opd_lightning.errors import ConfigError, RunError
from opd_lightning.objectives import (
    HeadTailReverseKL,
    Objective,
    ObjectiveOutput,
    ReverseKL,
    SampledTokenReverseKL,
    TopKReverseKL,
    known_objectives,
)
from opd_lightning.records import Rollout
from opd_lightning.rollout import RolloutCallback, SamplingConfig
from opd_lightning.teachers import LocalTeacher
from tests.module.harness import answered, fit, module, rollouts, save_pair, until, write_prompts
from tests.tiny import tiny_tokenizer


class TopKTeacher(LocalTeacher):
    provides = "topk"


class SampledTeacher(LocalTeacher):
    provides = "sampled"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Return f() -> the messages that the package logged; `opd` may have cut off its logger."""
    monkeypatch.setattr(logging.getLogger("opd_lightning"), "propagate", True)
    caplog.set_level(logging.WARNING, "opd_lightning")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "opd_lightning"]


@pytest.mark.parametrize(
    ("objective", "teacher", "needs", "gives"),
    [
        (ReverseKL(), TopKTeacher, "full", "topk"),
        (ReverseKL(), SampledTeacher, "full", "sampled"),
        (TopKReverseKL(k=8), SampledTeacher, "topk", "sampled"),
        (TopKReverseKL(k=8, support="student"), TopKTeacher, "full", "topk"),
        (HeadTailReverseKL(k=8), SampledTeacher, "topk", "sampled"),
    ],
)
def test_a_teacher_that_gives_too_little(
    objective: Objective, teacher: type, needs: str, gives: str
):
    with pytest.raises(ConfigError) as error:
        checks.check_objective(objective, teacher("nowhere"), 300)
    message = str(error.value)
    assert message.startswith(f"{objective.describe()} needs {needs!r} of the teacher")
    assert f"{teacher.__name__} gives {gives!r}" in message
    assert "SampledTokenReverseKL), or a LocalTeacher" in message


def test_a_teacher_that_gives_enough(warnings_of: Any):
    checks.check_objective(SampledTokenReverseKL(), SampledTeacher("x"), 300)
    checks.check_objective(TopKReverseKL(k=8), TopKTeacher("x"), 300)
    for cls in known_objectives().values():
        checks.check_objective(cls(), LocalTeacher("x"), 300)
    assert warnings_of() == []


def test_k_above_the_vocabulary_warns(warnings_of: Any):
    checks.check_objective(TopKReverseKL(k=300), LocalTeacher("x"), 300)
    assert warnings_of() == []
    checks.check_objective(TopKReverseKL(k=301), LocalTeacher("x"), 300)
    assert warnings_of() == ["k=301 is above the vocabulary of 300 tokens: all of it is used"]


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 5}])
@pytest.mark.parametrize("objective", [SampledTokenReverseKL(), HeadTailReverseKL(k=4)])
def test_a_nucleus_biases_objectives_on_the_sampled_token(
    warnings_of: Any, objective: Objective, settings: dict
):
    checks.check_rollouts(objective, SamplingConfig(**settings), None)
    (message,) = warnings_of()
    sampling = SamplingConfig(**settings)
    expected = (
        f"{objective.describe()} with top_p={sampling.top_p}, top_k={sampling.top_k} is biased"
    )
    assert message.startswith(expected)
    assert "Set top_p=1 and top_k=0, or take an objective that compares distributions" in message


def test_a_nucleus_is_fine_where_distributions_are_compared(warnings_of: Any):
    checks.check_rollouts(TopKReverseKL(k=4), SamplingConfig(top_p=0.9, top_k=5), None)
    checks.check_rollouts(SampledTokenReverseKL(), SamplingConfig(), None)
    assert warnings_of() == []


def test_no_completions():
    with pytest.raises(ConfigError) as error:
        checks.check_rollouts(ReverseKL(), None, has_completions=False)
    message = str(error.value)
    assert message == checks.no_completions()
    assert (
        "no RolloutCallback among the callbacks (value: None) and no column `completion`" in message
    )
    assert "Add a RolloutCallback (on-policy" in message
    assert "or completions to the dataset (off-policy)" in message
    checks.check_rollouts(ReverseKL(), None, has_completions=True)
    checks.check_rollouts(ReverseKL(), None, has_completions=None)


@pytest.mark.parametrize(
    ("prompts", "generations", "ranks", "rows"), [(6, 1, 1, 6), (4, 3, 2, 6), (2, None, 1, 2)]
)
def test_mini_batches_that_do_not_divide(
    prompts: int, generations: int | None, ranks: int, rows: int
):
    sampling = None if generations is None else SamplingConfig(num_generations=generations)
    with pytest.raises(ConfigError) as error:
        checks.check_mini_batches(4, prompts, sampling, ranks)
    message = str(error.value)
    assert f"model.mini_batches=4 must divide the {rows} completions" in message
    assert (
        f"(data.prompts_per_step={prompts} * num_generations={generations or 1} / {ranks} ranks). "
        "Change one of them."
    ) in message
    checks.check_mini_batches(2, prompts, sampling, ranks)
    checks.check_mini_batches(4, None, sampling, ranks)


def test_fp16_autocast():
    with pytest.raises(ConfigError) as error:
        checks.check_precision("16-mixed")
    assert "trainer.precision '16-mixed' is not supported" in str(error.value)
    assert "Take 'bf16-mixed', or '32-true'" in str(error.value)
    for precision in ("bf16-mixed", "32-true", "bf16-true", "64-true"):
        checks.check_precision(precision)


def test_a_context_that_is_too_short():
    sampling = SamplingConfig(max_completion_length=50)
    checks.check_lengths(14, sampling, 64)
    with pytest.raises(ConfigError) as error:
        checks.check_lengths(15, sampling, 64)
    message = str(error.value)
    assert "the longest prompt (15 tokens) and max_completion_length=50 make 65 tokens" in message
    assert "the student's context is 64. Lower max_completion_length or data.max_prompt_tokens" in (
        message
    )
    for missing in ((None, sampling, 64), (15, None, 64), (15, sampling, None)):
        checks.check_lengths(*missing)


def test_the_first_rollout_callback_is_found():
    one = RolloutCallback()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[one]
    )
    assert checks.find_rollout_callback(trainer) is one
    without = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert checks.find_rollout_callback(without) is None


# Each check where it acts: before the weights are loaded.
@pytest.mark.parametrize(
    ("settings", "limit", "message"),
    [
        ({"teacher": "topk"}, 4, "ReverseKL\\(\\) needs 'full' of the teacher"),
        ({"mini_batches": 3}, 4, "model.mini_batches=3 must divide the 2 completions"),
        ({}, 250, "max_completion_length=250 make 2.. tokens; the student's context is 256"),
    ],
)
def test_a_run_is_refused_before_weights_are_loaded(
    models: Path, tmp_path: Path, settings: dict, limit: int, message: str
):
    if "teacher" in settings:
        settings = {"teacher": TopKTeacher(str(models / "teacher"))}
    model = module(models, **settings)
    data = OPDDataModule(write_prompts(tmp_path / "p.jsonl", 4), prompts_per_step=2)
    with pytest.raises(ConfigError, match=message):
        fit(model, data, rollouts(limit), **until(1))
    assert model.student is None
    assert model.teacher.policy is None


def test_a_run_warns_of_a_nucleus_and_of_k(models: Path, tmp_path: Path, warnings_of: Any):
    data = OPDDataModule(write_prompts(tmp_path / "p.jsonl", 4), prompts_per_step=2)
    model = module(models, HeadTailReverseKL(k=1000))
    fit(model, data, rollouts(top_p=0.8), **until(1))
    messages = " ".join(warnings_of())
    assert "k=1000 is above the vocabulary of 300 tokens" in messages
    assert "top_p=0.8, top_k=0 is biased" in messages


def rollout() -> Rollout:
    return answered((2, 3)).rollout


def output(token_loss: list[float]) -> ObjectiveOutput:
    losses = torch.tensor(token_loss)
    return ObjectiveOutput(losses.sum(), losses)


def test_a_finite_loss_passes(tmp_path: Path):
    checks.stop_on_non_finite(rollout(), output([1.0, 0.0, -3.0, 2.0, 1.0]), None, tmp_path)
    checks.stop_on_non_finite_gradient(3.0, [rollout()], tmp_path)
    checks.stop_on_non_finite_gradient(0.0, [rollout()], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_sum_that_overflows_is_told_as_such(tmp_path: Path):
    big = 3e38
    with pytest.raises(RunError) as error:
        checks.stop_on_non_finite(
            rollout(), output([big, big, 0.0, 0.0, 0.0]), tiny_tokenizer(), tmp_path
        )
    assert "the loss is inf at 0 of 5 tokens: no single token, their sum" in str(error.value)


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite(tmp_path: Path, norm: float):
    with pytest.raises(RunError, match=f"the gradient's norm is {norm} although"):
        checks.stop_on_non_finite_gradient(norm, [rollout()], tmp_path / "new")
    (saved,) = torch.load(tmp_path / "new" / "non_finite_rollout.pt", weights_only=True)
    loaded = Rollout(**saved)
    assert torch.equal(loaded.token_ids, rollout().token_ids)
    assert loaded.task == rollout().task
    assert torch.equal(loaded.truncated, rollout().truncated)
