"""Checkpoints hold the student alone, and a run resumed from one continues bit for bit."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import AutoModelForCausalLM

from opd_lightning.callbacks import RunSummary
from opd_lightning.data import OPDDataModule
from opd_lightning.module import OPDModule
from opd_lightning.objectives import ReverseKL, SampledTokenReverseKL
from tests.module.harness import (
    csv_logger,
    fit,
    logged,
    module,
    rollouts,
    until,
    weights,
    write_prompts,
)

ADAMW = partial(torch.optim.AdamW, lr=1e-2)
MIB = 2**20


def run(
    models: Path, folder: Path, max_steps: int, ckpt_path: Path | None = None, **settings: Any
) -> tuple[OPDModule, list[dict[str, float]]]:
    """3 rounds an epoch, validation each second round, a checkpoint each update."""
    folder.mkdir()
    prompts = write_prompts(folder / "p.jsonl", 7)
    data = OPDDataModule(prompts, val=prompts, prompts_per_step=2, seed=3)
    schedule = partial(CosineAnnealingLR, T_max=12)
    model = module(models, optimizer=ADAMW, lr_scheduler=schedule, **settings)
    saving = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=False
    )
    fit(
        model,
        data,
        rollouts(num_generations=2),
        RunSummary(export_student=False),
        saving,
        ckpt_path=ckpt_path,
        enable_checkpointing=True,
        logger=csv_logger(folder),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,
        **until(max_steps, val_check_interval=2),
    )
    return model, logged(folder)


def without_times(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


@pytest.mark.parametrize(
    ("objective", "settings", "stop", "total"),
    [
        (ReverseKL(), {}, 3, 6),
        (ReverseKL(), {"micro_batch_tokens": 16, "metrics_every": 2}, 4, 6),
        (SampledTokenReverseKL(clip_ratio=0.2), {"mini_batches": 2}, 4, 8),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    models: Path, tmp_path: Path, objective: Any, settings: dict, stop: int, total: int
):
    settings = {"objective": objective, **settings}
    whole, lines = run(models, tmp_path / "whole", total, **settings)
    run(models, tmp_path / "first", stop, **settings)
    (checkpoint,) = (tmp_path / "first").glob(f"*step={stop}*.ckpt")
    resumed, later = run(models, tmp_path / "second", total, checkpoint, **settings)
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    expected = [line for line in without_times(lines) if line["step"] > stop]
    assert [line for line in without_times(later) if line["step"] > stop] == expected
    assert {line["step"] for line in expected if "loss" in line} == set(range(stop + 1, total + 1))
    assert any("val/kl/reverse" in line for line in expected)


@pytest.fixture(scope="module")
def folder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    run(models, folder, 3)
    return folder


def test_a_checkpoint_holds_the_student_alone(models: Path, folder: Path):
    (path,) = folder.glob("*step=2*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["state_dict"]
    assert not [key for key in state if "teacher" in key]
    assert all(key.startswith("student.model.") for key in state)
    stripped = {key.removeprefix("student.model."): value for key, value in state.items()}
    model = AutoModelForCausalLM.from_pretrained(models / "student")
    assert stripped.keys() == model.state_dict().keys()
    model.load_state_dict(stripped)

    def mentions(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [str(k) for k in value if "teacher" in str(k)] + mentions(list(value.values()))
        if isinstance(value, list | tuple):
            return [found for item in value for found in mentions(item)]
        return [value] if isinstance(value, str) and "teacher" in value else []

    assert mentions(checkpoint) == []


def test_a_checkpoint_is_as_large_as_weights_and_two_moments(folder: Path):
    (path,) = folder.glob("*step=2*.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    size = sum(value.numel() * value.element_size() for value in state.values())
    assert path.stat().st_size < 3 * size + 0.05 * MIB


def test_all_optimiser_states_are_the_students(folder: Path):
    (path,) = folder.glob("*step=3*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    (optimizer,) = checkpoint["optimizer_states"]
    held = [index for group in optimizer["param_groups"] for index in group["params"]]
    shapes = [tuple(value.shape) for value in checkpoint["state_dict"].values()]
    moments = [tuple(optimizer["state"][index]["exp_avg"].shape) for index in held]
    assert sorted(moments) == sorted(shapes)
    assert checkpoint["global_step"] == 3
    assert checkpoint["opd_lightning"]["student_path"].endswith("student")
