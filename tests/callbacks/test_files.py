"""Loggers, the writer of predictions and the progress bar."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from opd_lightning.callbacks import OPDProgressBar, PredictionWriter, run_loggers
from opd_lightning.callbacks.curve import draw_learning_curve
from opd_lightning.data import OPDDataModule
from tests.module.harness import QUIET, fit, module, rollouts, until, write_prompts


def test_each_run_gets_a_new_version(tmp_path: Path):
    for number in range(3):
        tensorboard, table = run_loggers(tmp_path / "runs")
        assert isinstance(tensorboard, TensorBoardLogger)
        assert isinstance(table, CSVLogger)
        assert Path(tensorboard.log_dir) == Path(table.log_dir)
        assert Path(table.log_dir) == tmp_path / "runs" / f"version_{number}"
        assert not Path(table.log_dir).exists(), "nothing is made before something is written"
        tensorboard.log_metrics({"loss": 1.0}, step=1)
        table.log_metrics({"loss": 1.0}, step=1)
        names = sorted(path.name for path in Path(table.log_dir).iterdir())
        assert names[-1] == "metrics.csv"
        assert names[0].startswith("events.out.tfevents")


def test_a_run_writes_both(models: Path, tmp_path: Path):
    data = OPDDataModule(write_prompts(tmp_path / "p.jsonl", 4), prompts_per_step=2)
    for number in range(2):
        model = module(models)
        fit(model, data, rollouts(), logger=run_loggers(tmp_path / "runs"), **until(1))
        folder = tmp_path / "runs" / f"version_{number}"
        assert model.run_folder == folder
        assert (folder / "metrics.csv").is_file()
        assert list(folder.glob("events.out.tfevents*"))


def predict(models: Path, folder: Path, writer: PredictionWriter, number: int) -> L.Trainer:
    folder.mkdir(exist_ok=True)
    data = OPDDataModule(predict=write_prompts(folder / "p.jsonl", number), prompts_per_step=2)
    trainer = L.Trainer(**QUIET | {"default_root_dir": folder}, callbacks=[rollouts(), writer])
    trainer.predict(module(models), datamodule=data, return_predictions=False)
    return trainer


def test_predictions_are_lines_of_json(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    writer = PredictionWriter()
    for number in (5, 3):
        predict(models, tmp_path, writer, number)
        path = tmp_path / "predictions.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["index"] for line in lines] == list(range(number)), "from anew"
        assert f"completions: {path}" in capsys.readouterr().out


def test_predictions_go_where_they_are_told(models: Path, tmp_path: Path):
    path = tmp_path / "deep" / "records.jsonl"
    predict(models, tmp_path, PredictionWriter(str(path)), 1)
    (record,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(record["student_logprobs"]) == len(record["token_ids"])


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_the_bar_shows_loss_divergence_speed_and_split(
    models: Path, tmp_path: Path, mini_batches: int
):
    shown = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            shown.append(bar.get_metrics(trainer, pl_module))

    bar = OPDProgressBar()
    data = OPDDataModule(write_prompts(tmp_path / "p.jsonl", 6), prompts_per_step=2)
    fit(
        module(models, mini_batches=mini_batches),
        data,
        rollouts(),
        bar,
        Watch(),
        enable_progress_bar=True,
        **until(3 * mini_batches),
    )
    assert len(shown) == 3
    for metrics in shown:
        assert set(metrics) == {"loss", "kl/reverse", "tok/s", "roll/teac/stud/opti"}
        assert metrics["loss"] == pytest.approx(metrics["kl/reverse"], rel=1e-4)
        assert int(metrics["tok/s"]) > 0
        split = metrics["roll/teac/stud/opti"]
        assert split.endswith("%")
        parts = [int(part) for part in split[:-1].split("/")]
        assert len(parts) == 4
        assert sum(parts) == pytest.approx(100, abs=2)
        assert parts[0] > 0
        assert parts[2] > 0


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_curve_of_either_or_both(tmp_path: Path):
    both = table(tmp_path / "a.csv", "step,kl/reverse,val/kl/reverse", "0,,2.0", "1,1.5,", "2,1,1")
    one = table(tmp_path / "b.csv", "step,val/kl/reverse,loss", "0,2.0,", "1,,1")
    for source in (both, one):
        picture = source.with_suffix(".png")
        draw_learning_curve(source, picture)
        assert picture.read_bytes().startswith(b"\x89PNG")
    drawn = both.with_suffix(".png").read_bytes()
    assert drawn != one.with_suffix(".png").read_bytes()


def test_without_a_divergence_nothing_is_drawn(tmp_path: Path):
    other = table(tmp_path / "a.csv", "step,loss", "1,0.5")
    for source in (other, tmp_path / "missing.csv"):
        draw_learning_curve(source, tmp_path / "curve.png")
        assert not (tmp_path / "curve.png").exists()
