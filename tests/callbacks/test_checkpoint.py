"""RunCheckpoint in runs of this process: what is kept, links, failures, and the log's marks."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from opd_lightning.callbacks import RunCheckpoint, run_loggers
from opd_lightning.callbacks.loggers import cut_logs, mark_logs
from opd_lightning.callbacks.whole import WholeCheckpointIO, check_whole
from opd_lightning.data import OPDDataModule
from opd_lightning.errors import ConfigError, RunError
from tests.module.harness import fit, module, rollouts, until, write_prompts


class Scripted(L.Callback):
    """Gives each evaluation a measure of its own."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            pl_module.log("scripted", self.values.pop(0))


def run(models: Path, folder: Path, steps: int, *callbacks: Any, **options: Any) -> RunCheckpoint:
    folder.mkdir(exist_ok=True)
    prompts = write_prompts(folder / "p.jsonl", 4)
    data = OPDDataModule(prompts, val=options.pop("val", None), prompts_per_step=2)
    checkpoint = RunCheckpoint(**options.pop("settings", {}))
    fit(
        module(models),
        data,
        rollouts(),
        *callbacks,
        checkpoint,
        enable_checkpointing=True,
        default_root_dir=folder,
        **until(steps, check_val_every_n_epoch=None) | options,
    )
    return checkpoint


def saved(folder: Path) -> list[int]:
    return sorted(int(p.stem.partition("_")[2]) for p in folder.glob("checkpoints/step_*.ckpt"))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [7]),  # the last, which is always saved
        ({"every_n_steps": 2}, [6, 7]),
        ({"every_n_steps": 2, "keep_last": 3}, [4, 6, 7]),
        ({"every_n_steps": 1, "keep_last": 1}, [7]),
    ],
)
def test_the_latest_are_kept(models: Path, tmp_path: Path, settings: dict, kept: list[int]):
    run(models, tmp_path, 7, settings=settings)
    assert saved(tmp_path) == kept
    folder = tmp_path / "checkpoints"
    assert (folder / "last.ckpt").resolve() == (folder / "step_00000007.ckpt").resolve()
    for path in folder.glob("step_*.ckpt"):
        assert check_whole(path)["step"] == int(path.stem.partition("_")[2])
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("mode", "keep_best", "kept", "best"),
    [("min", 1, [4, 8], 4), ("max", 1, [2, 8], 2), ("min", 2, [4, 6, 8], 4), ("min", 0, [8], None)],
)
def test_the_best_are_kept(
    models: Path, tmp_path: Path, mode: str, keep_best: int, kept: list[int], best: int | None
):
    settings = {"keep_last": 1, "keep_best": keep_best, "mode": mode, "monitor": "scripted"}
    val = write_prompts(tmp_path / "val.jsonl", 2)
    scripted = Scripted([3.0, 1.0, 1.5, 2.0])
    run(models, tmp_path, 8, scripted, settings=settings, val=val, val_check_interval=2)
    assert saved(tmp_path) == kept
    link = tmp_path / "checkpoints" / "best.ckpt"
    assert link.is_symlink() == (best is not None)
    if best is not None:
        assert link.resolve().name == f"step_{best:08d}.ckpt"


def test_numbers_out_of_range_are_refused():
    for name, value in [("every_n_steps", 0), ("keep_last", 0), ("keep_best", -1)]:
        with pytest.raises(ConfigError, match=f"{name} must be at least"):
            RunCheckpoint(**{name: value})
    with pytest.raises(ConfigError, match="mode is 'min' or 'max'; got 'best'"):
        RunCheckpoint(mode="best")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path):
    """/dev/full takes no byte: the error of a full disk, from the system itself."""
    io, path = WholeCheckpointIO(), tmp_path / "step.ckpt"
    io.save_checkpoint({"a": torch.ones(3)}, path)
    before = path.read_bytes()
    (tmp_path / ".writing_step.ckpt").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"cannot write the checkpoint .*No space left on device"):
        io.save_checkpoint({"a": torch.ones(10**6)}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["step.ckpt"]


def test_sums_are_those_of_the_file(tmp_path: Path):
    from opd_lightning.callbacks.whole import sums_of

    io, path = WholeCheckpointIO(), tmp_path / "step.ckpt"
    io.save_checkpoint({"a": torch.randn(1000), "b": [1, "c"]}, path)
    assert {path.name: io.sums[str(path)]} == sums_of([path], tmp_path)


def test_logs_are_cut_back_to_their_marks(tmp_path: Path):
    def log(steps: range, **further: float) -> list[Any]:
        loggers = run_loggers(tmp_path, version=0)
        for step in steps:
            for logger in loggers:
                logger.log_metrics({"loss": 1.0 / step} | further, step=step)
        return loggers

    folder = tmp_path / "version_0"
    marks = mark_logs(log(range(1, 4)), folder)
    assert marks["metrics.csv"] == 3
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    tensorboard, _ = log(range(4, 6), later=2.0)  # they add to the table, with a new column
    tensorboard.experiment.close()
    table = (folder / "metrics.csv").read_text().splitlines()
    assert table[0] == "later,loss,step" and len(table) == 6 and table[1] == ",1.0,1"
    for _ in range(2):
        cut_logs(folder, marks)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    cut_logs(folder, {})
    assert not list(folder.iterdir())
