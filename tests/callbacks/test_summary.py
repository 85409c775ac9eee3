"""RunSummary in real runs: what it writes, and that a resumed run reports the whole."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.callbacks import RunSummary
from opd_lightning.data import OPDDataModule
from opd_lightning.module import OPDModule
from opd_lightning.records import PromptBatch, Rollout
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

PNG = b"\x89PNG\r\n\x1a\n"


class Counted(L.Callback):
    """Counts completion tokens on its own."""

    def __init__(self) -> None:
        self.tokens = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: OPDModule, outputs: Any, batch: PromptBatch, *_: Any
    ) -> None:
        self.tokens += sum(len(ids) for ids in self.completions(batch.rollout))

    @staticmethod
    def completions(rollout: Rollout) -> list[list[int]]:
        masked = zip(rollout.input_ids.tolist(), rollout.completion_mask.tolist(), strict=True)
        return [[i for i, m in zip(*row, strict=True) if m] for row in masked]


def run(
    models: Path, folder: Path, max_steps: int, *callbacks: L.Callback, **options: Any
) -> OPDModule:
    folder.mkdir(exist_ok=True)
    prompts = write_prompts(folder / "p.jsonl", 6)
    model = module(models)
    fit(
        model,
        OPDDataModule(prompts, val=options.pop("val", prompts), prompts_per_step=2),
        rollouts(num_generations=2),
        *callbacks,
        logger=csv_logger(folder),
        **{"num_sanity_val_steps": -1, "val_check_interval": 1} | options,
        **until(max_steps),
    )
    return model


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, OPDModule, Counted]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    counted, summary = Counted(), RunSummary()
    summary.config = {"model": {"objective": "ReverseKL"}}
    model = run(models, folder, 3, counted, summary)
    return folder, model, counted


def test_before_and_after_are_the_first_and_last_validation(finished: tuple):
    folder = finished[0]
    validated = [line for line in logged(folder) if "val/kl/reverse" in line]
    assert [line["step"] for line in validated] == [0, 1, 2, 3]
    summary = summary_of(folder)
    keys = {
        "reverse_kl": "val/kl/reverse",
        "entropy": "val/entropy",
        "mean_length": "val/completions/mean_length",
        "clipped_ratio": "val/completions/clipped_ratio",
    }
    for name, key in keys.items():
        assert summary[f"{name}_before"] == pytest.approx(validated[0][key], rel=1e-6)
        assert summary[f"{name}_after"] == pytest.approx(validated[-1][key], rel=1e-6)
    assert summary["reverse_kl_before"] != summary["reverse_kl_after"]
    assert summary["steps"] == 3
    assert summary["config"] == {"model": {"objective": "ReverseKL"}}


def test_tokens_and_seconds_are_those_of_training(finished: tuple):
    folder, _, counted = finished
    summary, lines = summary_of(folder), logged(folder)
    trained = [line for line in lines if "loss" in line]
    assert summary["tokens"] == counted.tokens == sum(x["completions/tokens"] for x in trained)
    steps = sum(line["perf/step_seconds"] for line in trained)
    assert summary["seconds"] >= steps - 0.01, "no step is lost, validation or not"
    speed = summary["tokens"] / summary["seconds"]
    assert summary["tokens_per_second"] == pytest.approx(speed, rel=0.2)


def test_the_student_loads_by_transformers_alone(finished: tuple):
    folder, model, _ = finished
    loaded = AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()
    trained = weights(model)
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[key], trained[key]) for key in trained)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    assert tokenizer.encode("two and three") == model.tokenizer.encode("two and three")
    assert tokenizer.chat_template == model.tokenizer.chat_template


def test_samples_are_the_first_prompts_with_their_completions(finished: tuple):
    samples = summary_of(finished[0])["samples"]
    assert list(samples) == ["before", "after"]
    for shown in samples.values():
        assert len(shown) == 2
        assert "a0" in shown[0]["prompt"]
        assert "ab1" in shown[1]["prompt"]


def test_the_curve_is_a_picture(finished: tuple):
    content = (finished[0] / "learning_curve.png").read_bytes()
    assert content.startswith(PNG)
    assert len(content) > 5000


def test_what_is_printed(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run(models, tmp_path / "run", 1, RunSummary(export_student=False))
    printed, summary = capsys.readouterr().out, summary_of(tmp_path / "run")
    assert "held-out, before -> after 1 steps" in printed
    assert f"{summary['reverse_kl_before']:.3f}" in printed
    assert f"{summary['reverse_kl_after']:.3f}" in printed
    assert f"{summary['tokens']} completion tokens in" in printed
    assert f"run folder: {tmp_path / 'run'}" in printed
    assert not (tmp_path / "run" / "student").exists()


def test_without_validation_there_is_no_before_and_after(models: Path, tmp_path: Path):
    run(
        models,
        tmp_path / "run",
        2,
        RunSummary(export_student=False),
        val=None,
        val_check_interval=1.0,
    )
    summary = summary_of(tmp_path / "run")
    assert summary["reverse_kl_before"] is None
    assert summary["reverse_kl_after"] is None
    assert summary["tokens"] > 0
    assert (tmp_path / "run" / "learning_curve.png").read_bytes().startswith(PNG)


def test_a_partial_sanity_check_is_no_before(models: Path, tmp_path: Path):
    run(models, tmp_path / "run", 1, RunSummary(export_student=False), num_sanity_val_steps=1)
    summary = summary_of(tmp_path / "run")
    assert summary["reverse_kl_before"] is None
    assert summary["reverse_kl_after"] is not None


def test_a_resumed_run_reports_the_whole(models: Path, tmp_path: Path, finished: tuple):
    whole = summary_of(finished[0])
    saving = ModelCheckpoint(tmp_path / "first", "{step}", every_n_train_steps=1, save_top_k=-1)
    first = RunSummary(export_student=False)
    run(models, tmp_path / "first", 2, first, saving, enable_checkpointing=True)
    (path,) = (tmp_path / "first").glob("step=2.ckpt")
    state = torch.load(path, weights_only=True)["callbacks"]
    (saved,) = [value for key, value in state.items() if "RunSummary" in key]
    resumed = RunSummary(export_student=False)
    run(models, tmp_path / "second", 3, resumed, ckpt_path=path)
    summary = summary_of(tmp_path / "second")
    for key in ("reverse_kl_before", "reverse_kl_after", "entropy_before", "tokens", "steps"):
        assert summary[key] == whole[key], key
    assert summary["samples"] == whole["samples"]
    assert summary["seconds"] >= saved["seconds"] > 0
