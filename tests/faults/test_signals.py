"""`opd fit` that is told to end: it ends in order, with 0, and goes on as if it had not."""

import csv
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opd_lightning.cli import main
from tests.faults.conftest import ROOT, Run, whole_checkpoints

Start = Callable[..., Run]
SAVING = '[{"class_path": "RunCheckpoint", "init_args": {"every_n_steps": 1, "keep_last": 99}}]'
FAULTY = ["--rollout.engine", "tests.faults.engines.Faulty", "--rollout.engine.fault"]


STRATEGIES = {
    "ddp": ["--trainer.strategy", "ddp"],
    "fsdp2": ["--config", str(ROOT / "configs" / "trainer" / "fsdp.yaml")],
}


def waiting(folder: Path, step: int) -> list[str]:
    """Arguments of a run that waits in the rollout behind `step`, on rank 0."""
    folder.mkdir(exist_ok=True)
    return [
        *FAULTY, "wait", "--rollout.engine.step", str(step), "--rollout.engine.folder", str(folder)
    ]  # fmt: skip


def results(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    """Weights of the last checkpoint, and metrics.csv without times and empty cells."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    with (folder / "metrics.csv").open(newline="") as lines:
        rows = [
            {k: v for k, v in row.items() if v and "perf/" not in k}
            for row in csv.DictReader(lines)
        ]
    return checkpoint["state_dict"], rows


def test_sigterm_saves_and_the_same_command_goes_on(world: Path, tmp_path: Path, start: Start):
    config = ["--config", str(world / "run.yaml")]
    faulty = waiting(tmp_path / "hold", 1)
    run = start(*config, *faulty, "--trainer.default_root_dir", str(tmp_path / "cut"))
    run.until((tmp_path / "hold" / "waiting_0").exists)
    run.process.send_signal(signal.SIGTERM)
    run.until(lambda: "opd: SIGTERM received; finishing the round, then saving." in run.said)
    (tmp_path / "hold" / "release").touch()
    assert run.end() == 0
    checkpoint = tmp_path / "cut" / "version_0" / "checkpoints" / "step_00000002.ckpt"
    last = run.said.splitlines()[-1]
    assert last == (
        "opd: stopped by SIGTERM after step 2. To go on, run the same command with --resume "
        f"{checkpoint}"
    )
    assert "Traceback" not in run.said
    assert whole_checkpoints(tmp_path / "cut") == [2]
    for name, more in (("cut", ["--resume", last.split()[-1]]), ("whole", [])):
        main(["fit", *config, *faulty, "--trainer.default_root_dir", str(tmp_path / name), *more])
    weights, rows = results(tmp_path / "cut" / "version_0")
    expected, expected_rows = results(tmp_path / "whole" / "version_0")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    # behind the step at which it was stopped, an evaluation was due
    assert rows == expected_rows


def test_ctrl_c_and_once_more(world: Path, tmp_path: Path, start: Start):
    run = start(
        "--config", str(world / "run.yaml"), *waiting(tmp_path / "hold", 2),
        "--trainer.default_root_dir", str(tmp_path / "run"),
    )  # fmt: skip
    run.until((tmp_path / "hold" / "waiting_0").exists)
    run.send_to_all(signal.SIGINT)
    run.until(lambda: "SIGINT received; finishing the round, then saving. Ctrl-C again" in run.said)
    run.send_to_all(signal.SIGINT)
    assert run.end(5) == -signal.SIGINT
    assert whole_checkpoints(tmp_path / "run") == [2], "made before the evaluation"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_ranks_agree_when_one_or_all_are_told(
    world: Path, tmp_path: Path, start: Start, number: signal.Signals
):
    """SIGTERM to the second rank alone; Ctrl-C to both, as a terminal sends it."""
    strategy = {signal.SIGTERM: "ddp", signal.SIGINT: "fsdp2"}[number]
    run = start(
        "--config", str(world / "run.yaml"), *waiting(tmp_path / "hold", 1),
        "--trainer.default_root_dir", str(tmp_path / "run"), "--data.val", "null",
        *STRATEGIES[strategy], "--trainer.devices", "2", "--trainer.accelerator", "cpu",
    )  # fmt: skip
    run.until((tmp_path / "hold" / "waiting_0").exists)
    (child,) = run.children()
    if number == signal.SIGTERM:
        os.kill(child, number)
    else:
        run.send_to_all(number)
        run.until(lambda: "SIGINT received" in run.said)
    (tmp_path / "hold" / "release").touch()
    assert run.end() == 0
    assert run.said.count(f"stopped by {number.name} after step 2. To go on") == 1
    assert run.said.count("opd: stopped") == 1
    assert whole_checkpoints(tmp_path / "run") == [2]
