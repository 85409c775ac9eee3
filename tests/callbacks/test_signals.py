"""Real signals to this process, at each place of a run where one may come."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch import Tensor

from opd_lightning.callbacks import RunCheckpoint, StopOnSignal
from opd_lightning.callbacks.signals import refuse_foreign_checkpoint, requeue, slurm_job
from opd_lightning.data import OPDDataModule
from opd_lightning.errors import ConfigError, RunError, RunStopped
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

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class SignalIn(L.Callback):
    """Sends this process a signal in the nth call of a hook."""

    def __init__(self, hook: str, number: signal.Signals = signal.SIGTERM, nth: int = 1) -> None:
        self.number, self.left = number, nth
        setattr(self, hook, self.count)

    def count(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def run(
    models: Path,
    folder: Path,
    *callbacks: L.Callback,
    ckpt_path: Path | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Six updates in rounds of one, 3 rounds an epoch, an evaluation of 4 batches each second."""
    folder.mkdir(exist_ok=True)
    prompts = write_prompts(folder / "p.jsonl", 7)
    data = OPDDataModule(prompts, val=prompts, prompts_per_step=2, seed=3)
    model = module(models, mini_batches=options.pop("mini_batches", 1))
    own = {"num_sanity_val_steps": -1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(
        model,
        data,
        rollouts(num_generations=2),
        *callbacks,
        StopOnSignal(),
        ckpt_path=ckpt_path,
        logger=csv_logger(folder),
        **own | options,
        **until(6),
    )
    lines = [{k: v for k, v in line.items() if "perf/" not in k} for line in logged(folder)]
    return weights(model), lines


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple]:
    """Weights and log of runs that nothing stops, by the updates of a round."""
    folder = tmp_path_factory.mktemp("whole")
    return {n: run(models, folder / str(n), mini_batches=n) for n in (1, 2)}


def stopped(models: Path, folder: Path, *callbacks: L.Callback, **options: Any) -> str:
    before = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(RunStopped) as stop:
        run(models, folder, *callbacks, **options)
    assert [signal.getsignal(number) for number in NUMBERS] == before
    return str(stop.value)


@pytest.mark.parametrize(
    ("hook", "nth", "updates", "step"),
    [
        ("on_train_batch_start", 1, 1, 1),  # the rollout comes first, so after it
        ("on_before_optimizer_step", 3, 1, 3),  # the last of an epoch
        ("on_before_optimizer_step", 3, 2, 4),  # the first of two of a round
        ("on_train_batch_end", 4, 1, 4),  # an evaluation is due
        ("on_validation_batch_start", 4 + 6, 1, 4),  # in the second evaluation of training
        ("on_validation_end", 1 + 1, 1, 3),  # behind the first
    ],
)
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(
    models: Path, tmp_path: Path, whole: dict, hook: str, nth: int, updates: int, step: int
):
    told = stopped(models, tmp_path, SignalIn(hook, nth=nth), mini_batches=updates)
    assert told.startswith(f"stopped by SIGTERM after step {step}. To go on, run the same command")
    checkpoint = Path(told.split()[-1])
    first = [line for line in logged(tmp_path) if line["step"] <= step]
    after, lines = run(models, tmp_path / "on", ckpt_path=checkpoint, mini_batches=updates)
    expected, expected_lines = whole[updates]
    assert all((after[name] == value).all() for name, value in expected.items())
    assert max(line["step"] for line in first if "loss" in line) == step
    assert [x for x in lines if x["step"] > step] == [x for x in expected_lines if x["step"] > step]


@pytest.mark.parametrize("hook", ["on_fit_start", "on_validation_batch_start", "on_train_start"])
def test_before_the_first_round_nothing_is_trained_and_nothing_saved(
    models: Path, tmp_path: Path, hook: str
):
    told = stopped(models, tmp_path, SignalIn(hook, signal.SIGINT))
    assert told == "stopped by SIGINT after step 0. Nothing was trained yet, so nothing is saved."
    assert not [line for line in logged_or_none(tmp_path) if "loss" in line]
    assert not list(tmp_path.rglob("*.ckpt"))


def logged_or_none(folder: Path) -> list[dict[str, float]]:
    return logged(folder) if (folder / "metrics.csv").is_file() else []


def test_before_the_first_round_of_a_resumed_run_its_checkpoint_is_named(
    models: Path, tmp_path: Path
):
    first = stopped(models, tmp_path, SignalIn("on_train_batch_end"))
    checkpoint = Path(first.split()[-1])
    again = stopped(models, tmp_path / "on", SignalIn("on_train_start"), ckpt_path=checkpoint)
    assert f"Nothing was trained since {checkpoint}" in again


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start"])
def test_after_the_last_round_a_run_ends_by_itself(
    models: Path, tmp_path: Path, whole: dict, hook: str
):
    last = {"on_train_batch_start": 6, "on_validation_batch_start": 4 + 4 + 4 + 4}[hook]
    after, lines = run(models, tmp_path, SignalIn(hook, nth=last))
    assert all((after[name] == value).all() for name, value in whole[1][0].items())
    assert lines == whole[1][1]


@pytest.mark.parametrize(("sent", "wins"), [
    ((signal.SIGTERM, signal.SIGUSR1), "SIGUSR1"),
    ((signal.SIGUSR1, signal.SIGTERM), "SIGUSR1"),
    ((signal.SIGINT, signal.SIGTERM), "SIGTERM"),
])  # fmt: skip
def test_of_several_signals_the_one_that_requeues_wins(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture, sent: tuple, wins: str
):
    callbacks = [SignalIn("on_train_batch_start", number) for number in sent]
    assert f"stopped by {wins} after step 1." in stopped(models, tmp_path, *callbacks)
    said = capfd.readouterr().err
    assert said.count(f"opd: {sent[0].name} received; finishing the round, then saving.") == 1
    assert ("Ctrl-C again stops at once." in said) == (signal.SIGINT in sent)


def test_a_data_worker_is_not_ended_by_the_signal(models: Path, tmp_path: Path):
    """Ctrl-C goes to all processes of the terminal: workers must still serve the round."""
    stop, children = StopOnSignal(), []

    class Fork(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if (child := os.fork()) == 0:
                for number in NUMBERS:
                    os.kill(os.getpid(), number)
                os._exit(7 + stop._received)
            children.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    prompts = write_prompts(tmp_path / "p.jsonl", 4)
    data = OPDDataModule(prompts, prompts_per_step=2)
    fit(module(models), data, rollouts(), stop, Fork(), **until(1))
    assert children == [7]


def test_a_run_that_lightning_would_resume_unasked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    left = tmp_path / "hpc_ckpt_3.ckpt"
    left.touch()
    refuse_foreign_checkpoint(tmp_path, None)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "opd")
    refuse_foreign_checkpoint(tmp_path, "hpc")
    with pytest.raises(ConfigError, match=rf"{left} .* unasked. Give --ckpt_path hpc"):
        refuse_foreign_checkpoint(tmp_path, None)
    left.unlink()
    refuse_foreign_checkpoint(tmp_path, None)


def test_the_job_is_the_one_task_of_an_array(monkeypatch: pytest.MonkeyPatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert slurm_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert slurm_job() == "41"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "41")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert slurm_job() == "41_0"


def test_a_job_that_is_not_taken_back_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match=r"saved\. The job did not .*scontrol is not on the PATH"):
        requeue("41", "saved.")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho no such job $2 >&2\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    with pytest.raises(RunError, match=r"scontrol requeue 41: no such job 41\)\. Submit it again"):
        requeue("41", "saved.")


@pytest.mark.parametrize(
    ("hook", "nth"), [("on_train_batch_end", 4), ("on_validation_batch_start", 4 + 6)]
)
def test_an_evaluation_that_was_broken_off_is_made_once_when_the_run_goes_on(
    models: Path, tmp_path: Path, whole: dict, hook: str, nth: int
):
    """Evaluations are due after steps 2, 4 and 6; the run is stopped before or in the second."""
    saving = {"every_n_steps": 100, "keep_best": 0}
    told = stopped(
        models,
        tmp_path,
        SignalIn(hook, nth=nth),
        RunCheckpoint(**saving),
        enable_checkpointing=True,
    )
    assert "after step 4. To go on, run the same command with --resume" in told
    after, lines = run(
        models, tmp_path / "on", RunCheckpoint(**saving), ckpt_path=Path(told.split()[-1]),
        enable_checkpointing=True,
    )  # fmt: skip
    expected, expected_lines = whole[1]
    assert all((after[name] == value).all() for name, value in expected.items())
    left = [x for x in expected_lines if x["step"] > 4 or (x["step"] == 4 and "loss" not in x)]
    assert lines == left
    assert [x["step"] for x in lines if "val/kl/reverse" in x] == [4, 6]
