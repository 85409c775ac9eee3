"""Optimiser steps: how many, on what, with which gradient, rate and precision."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from opd_lightning import updates
from opd_lightning.data import OPDDataModule
from opd_lightning.errors import ConfigError
from opd_lightning.module import OPDModule
from opd_lightning.objectives import Objective, ReverseKL, SampledTokenReverseKL, TokenLoss
from opd_lightning.policy import PolicySpec
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.teachers import LocalTeacher
from opd_lightning.updates import Update
from tests.module.harness import (
    SGD,
    Gradients,
    answered,
    csv_logger,
    distance,
    fit,
    logged,
    module,
    rollouts,
    until,
    weights,
    write_prompts,
)
from tests.module.test_splits import NAMES, objective

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
FAST_SGD = partial(torch.optim.SGD, lr=0.5, momentum=0.9)


class SeenRatios(SampledTokenReverseKL):
    """The clipped objective, writing down each token's ratio to the recorded log-probability."""

    def __init__(self) -> None:
        super().__init__(clip_ratio=0.2)
        self._ratios: list[Tensor] = []

    def token_loss(self, student: Any, teacher: Any, rollout: Any) -> TokenLoss:
        now = student.logprobs(rollout.token_ids).detach()
        self._ratios.append((now - rollout.flat_old_logprobs).exp())
        return super().token_loss(student, teacher, rollout)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("budget", [None, 8])
def test_old_logprobs_are_those_before_the_first_of_several_updates(
    models: Path, budget: int | None, dtype: str
):
    seen = SeenRatios()
    settings = {"mini_batches": 2, "micro_batch_tokens": budget}
    fit(module(models, seen, dtype, **settings), [answered((3, 5, 2, 4))])
    number = sum(len(ratios) for ratios in seen._ratios)
    assert number == 14
    ratios = torch.cat(seen._ratios)
    before, after = ratios[:8], ratios[8:]
    assert before.tolist() == pytest.approx([1.0] * 8, abs=1e-4 if dtype == "float32" else 1e-10)
    assert (after - 1).abs().min() > 1e-3


@pytest.mark.parametrize(("max_steps", "rounds"), [(3, 2), (4, 2), (1, 1)])
def test_max_steps_counts_updates(models: Path, tmp_path: Path, max_steps: int, rounds: int):
    gradients = Gradients()
    trainer = fit(
        module(models, mini_batches=2),
        [answered(seed=i) for i in range(4)],
        gradients,
        max_steps=max_steps,
        logger=csv_logger(tmp_path),
    )
    assert trainer.global_step == len(gradients.steps) == max_steps
    assert trainer.fit_loop.total_batch_idx + 1 == rounds
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, max_steps + 1))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_updates_of_one_round_are_those_of_two_rounds(models: Path, precision: str):
    """Two mini-batches on four rows = two rounds of two rows; no weights of the first are kept."""
    whole = answered((3, 5, 2, 4))
    halves = []
    for rows in ([0, 1], [2, 3]):
        half = replace(whole, rollout=whole.rollout.select_rows(torch.tensor(rows)))
        halves.append(half)
    settings = {"optimizer": partial(torch.optim.SGD, lr=2.0)}
    at_once, apart = module(models, mini_batches=2, **settings), module(models, **settings)
    fit(at_once, [whole], precision=precision)
    fit(apart, halves, precision=precision)
    assert distance(weights(at_once), weights(apart)) < 1e-7


class BehindOthers(OPDModule):
    """On a rank that has fewer micro-batches than another."""

    empty = 0

    def plan_updates(self, rollout: Rollout) -> list[Update]:
        def all_gather(table: Tensor) -> Tensor:
            other = torch.zeros_like(table)  # no tokens, but more micro-batches
            other[:, 3] = table[:, 3] + self.empty
            return torch.stack([table, other])

        plan = updates.plan_updates(rollout, 1, None, all_gather)
        assert len(plan[0].micro_batches) == 1 + self.empty
        return plan


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_micro_batch_adds_nothing(models: Path, name: str):
    steps = []
    for empty in (0, 2):
        gradients = Gradients()
        model = BehindOthers(
            str(models / "student"), LocalTeacher(str(models / "teacher")), objective(name)
        )
        model.empty = empty
        trainer = fit(model, [answered()], gradients)
        steps.append(gradients.steps[0])
        loss = trainer.progress_bar_metrics["loss"]
    assert distance(steps[1], steps[0]) == 0
    assert torch.isfinite(torch.tensor(float(loss)))


@pytest.mark.parametrize("limit", [1e-3, 1e6, None])
def test_clipping_is_torchs_and_the_norm_logged_is_before_it(
    models: Path, tmp_path: Path, limit: float | None
):
    free, clipped = Gradients(), Gradients()
    fit(module(models, max_grad_norm=None), [answered()], free)
    model = module(models, max_grad_norm=limit)
    before = weights(model_at_start(models))
    fit(model, [answered()], clipped, logger=csv_logger(tmp_path))
    leaves = {name: torch.nn.Parameter(g.clone()) for name, g in free.steps[0].items()}
    for name, leaf in leaves.items():
        leaf.grad = free.steps[0][name].clone()
    norm = torch.sqrt(sum(g.square().sum() for g in free.steps[0].values()))
    if limit is not None:
        torch.nn.utils.clip_grad_norm_(leaves.values(), limit)
    assert distance(clipped.steps[0], {k: v.grad for k, v in leaves.items()}) < 1e-6
    assert logged(tmp_path)[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    after = weights(model)
    moved = {f"model.{k}": (before[k] - after[k]) / SGD.keywords["lr"] for k in before}
    atol = 1e-4 * float(norm)
    assert all(torch.allclose(moved[k], clipped.steps[0][k], rtol=1e-2, atol=atol) for k in moved)


def model_at_start(models: Path) -> OPDModule:
    model = module(models)
    model.configure_model()
    return model


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        (FAST_SGD, partial(CosineAnnealingLR, T_max=4)),
        (ADAMW, partial(LinearLR, start_factor=0.5, total_iters=3)),
        (FAST_SGD, None),
    ],
)
def test_the_rate_logged_is_the_one_used(
    models: Path, tmp_path: Path, optimizer: Any, schedule: Any
):
    used = []

    class Rates(L.Callback):
        def on_before_optimizer_step(
            self, trainer: L.Trainer, pl_module: OPDModule, optimizer: torch.optim.Optimizer
        ) -> None:
            used.append(optimizer.param_groups[0]["lr"])

    model = module(models, optimizer=optimizer, lr_scheduler=schedule, mini_batches=2)
    batches = [answered(seed=i) for i in range(2)]
    fit(model, batches, Rates(), logger=csv_logger(tmp_path))
    alone = optimizer([torch.nn.Parameter(torch.zeros(1))])
    expected = []
    stepper = None if schedule is None else schedule(alone)
    for _ in range(4):
        expected.append(alone.param_groups[0]["lr"])
        alone.step()
        if stepper is not None:
            stepper.step()
    assert [line["lr"] for line in logged(tmp_path)] == pytest.approx(expected)
    assert used == expected
    assert (len(set(used)) == 1) == (schedule is None)


def test_bf16_autocast_trains_float32_weights(models: Path):
    exact, mixed = Gradients(), Gradients()
    fit(module(models), [answered()], exact)
    model = module(models)
    fit(model, [answered()], mixed, precision="bf16-mixed")
    assert {p.dtype for p in model.student.parameters()} == {torch.float32}
    apart = distance(mixed.steps[0], exact.steps[0])
    assert 1e-4 < apart < 0.2, "autocast was on, and its rounding is small"


def test_a_teacher_in_bfloat16_changes_the_gradient_by_its_rounding(models: Path):
    exact, rounded = Gradients(), Gradients()
    fit(module(models), [answered()], exact)
    model = module(models, teacher=LocalTeacher(str(models / "teacher"), dtype="bfloat16"))
    fit(model, [answered()], rounded)
    assert {p.dtype for p in model.teacher.policy.parameters()} == {torch.bfloat16}
    assert 1e-5 < distance(rounded.steps[0], exact.steps[0]) < 0.2


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_gradient_checkpointing_gives_the_same_weights(
    models: Path, tmp_path: Path, mini_batches: int
):
    ends = []
    for checkpointing in (False, True):
        spec = PolicySpec(str(models / "student"), gradient_checkpointing=checkpointing)
        model = module(models, student=spec, mini_batches=mini_batches)
        data = OPDDataModule(write_prompts(tmp_path / "p.jsonl", 6), prompts_per_step=2)
        fit(model, data, rollouts(), **until(2 * mini_batches))
        assert model.student.model.is_gradient_checkpointing is checkpointing
        ends.append(weights(model))
    assert distance(ends[1], ends[0]) < 1e-7


def test_the_teacher_is_frozen_and_no_part_of_the_module(models: Path):
    model = module(models, optimizer=ADAMW)
    teacher = LocalTeacher(str(models / "teacher"))
    teacher.load(torch.device("cpu"), 300)
    before = {k: v.clone() for k, v in teacher.policy.state_dict().items()}
    trainer = fit(model, [answered(seed=i) for i in range(3)])
    after = model.teacher.policy.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert not any(p.requires_grad for p in model.teacher.policy.parameters())
    assert all(p.grad is None for p in model.teacher.policy.parameters())
    students = {id(p) for p in model.student.parameters()}
    (optimizer,) = trainer.optimizers
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert set(held) == students
    assert len(held) == len(students)
    assert {id(p) for p in model.parameters()} == students
    assert not any("teacher" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("setting", "value", "least"),
    [
        ("mini_batches", 0, 1),
        ("micro_batch_tokens", 0, 1),
        ("metrics_every", -1, 0),
        ("max_grad_norm", -1.0, 0),
    ],
)
def test_a_number_out_of_range_is_refused(models: Path, setting: str, value: float, least: int):
    with pytest.raises(ConfigError, match=f"{setting} must be at least {least}; got {value}"):
        module(models, **{setting: value})


@pytest.mark.parametrize(("every", "measured"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (0, [])])
def test_whole_vocabulary_measures_are_taken_every_so_many_updates(
    models: Path, tmp_path: Path, every: int, measured: list[int]
):
    model = module(models, mini_batches=2, metrics_every=every)
    fit(model, [answered(seed=i) for i in range(2)], logger=csv_logger(tmp_path))
    lines = logged(tmp_path)
    assert len(lines) == 4
    for key in ("kl/reverse", "entropy", "teacher/entropy"):
        assert [line["step"] for line in lines if key in line] == measured
    assert all("loss" in line for line in lines)


def test_log_every_n_steps_counts_updates(models: Path, tmp_path: Path):
    model = module(models, mini_batches=2)
    batches = [answered(seed=i) for i in range(3)]
    fit(model, batches, logger=csv_logger(tmp_path), log_every_n_steps=3)
    assert [line["step"] for line in logged(tmp_path)] == [3, 6]


class Halves(Objective):
    """A loss of the user's own."""

    needs = "sampled"

    def token_loss(self, student: Any, teacher: Any, rollout: Any) -> TokenLoss:
        return TokenLoss(0.5 * (student.logprobs(rollout.token_ids)).square())


def test_an_objective_of_ones_own_trains(models: Path):
    model = module(models, Halves())
    start = weights(model_at_start(models))
    fit(model, [answered()])
    assert distance(weights(model), start) > 1e-6


def test_the_temperature_is_that_of_the_rollouts_unless_given(models: Path, tmp_path: Path):
    for given, expected in ((None, 0.7), (1.3, 1.3)):
        model = module(models, temperature=given)
        data = OPDDataModule(write_prompts(tmp_path / "p.jsonl", 4), prompts_per_step=2)
        gradients = Gradients()
        fit(model, data, rollouts(temperature=0.7), gradients, **until(1))
        assert model.temperature == expected
    plain = module(models)
    fit(plain, [answered()])
    assert plain.temperature == 1.0


def test_a_batch_without_completions_is_refused(models: Path):
    batch: PromptBatch = replace(answered(), rollout=None)
    with pytest.raises(ConfigError, match=r"no completions to train on.*Add a RolloutCallback"):
        fit(module(models, ReverseKL()), [batch])
