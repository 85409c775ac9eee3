"""The default loggers of a run: TensorBoard and CSV in one folder, and how both are cut back."""

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from opd_lightning.callbacks.whole import WRITING, write_whole

METRICS = ExperimentWriter.NAME_METRICS_FILE
_EVENTS = "events.out.tfevents*"

LogMarks = dict[str, int]
"""File of a run folder -> how far it was written: rows of `metrics.csv`, bytes of event files."""


def run_loggers(folder: str | Path, version: int | None = None) -> list[Logger]:
    """Return TensorBoard and CSV loggers that write into `folder`/version_N.

    Args:
        folder: The folder of all runs, made when something is written.
        version: N; default one that is not used yet. A run that is there is added to.
    """
    if version is None:
        version = TensorBoardLogger(save_dir=folder, name="").version
    name = f"version_{version}"
    return [
        TensorBoardLogger(save_dir=folder, name="", version=name),
        RunCSVLogger(save_dir=folder, name="", version=name, flush_logs_every_n_steps=1),
    ]


class _Rows(ExperimentWriter):
    """Adds to a `metrics.csv` that is there, and never leaves a part of one."""

    def _check_log_dir_exists(self) -> None:
        if (path := Path(self.metrics_file_path)).is_file():
            with path.open(newline="", encoding="utf-8") as lines:
                self.metrics_keys = list(next(csv.reader(lines), []))

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        _write_rows(path, fieldnames, rows)


class RunCSVLogger(CSVLogger):
    """Lightning's CSVLogger for runs that are killed and go on.

    A `metrics.csv` that is there is added to, and where a new column needs the file to be written
    again, it is the old or the new one at any instant.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = _Rows(log_dir=self.log_dir)
        return self._experiment


def mark_logs(loggers: list[Logger], folder: Path) -> LogMarks:
    """Flush the logs of a run folder to disk and return how far they are written."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()
        elif isinstance(logger, CSVLogger):
            logger.save()
    marks = {path.name: path.stat().st_size for path in sorted(folder.glob(_EVENTS))}
    if (metrics := folder / METRICS).is_file():
        marks[METRICS] = len(_read_rows(metrics)[1])
    for name in marks:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    return marks


def cut_logs(folder: Path, marks: LogMarks) -> None:
    """Cut the logs of a run folder back to where they were; what is not in `marks` is removed.

    Safe to be killed in, and to be done again.
    """
    for path in sorted(folder.glob(_EVENTS)):
        if path.name not in marks:
            path.unlink()
        elif path.stat().st_size > marks[path.name]:
            os.truncate(path, marks[path.name])
    metrics = folder / METRICS
    (folder / f"{WRITING}{METRICS}").unlink(missing_ok=True)
    if not metrics.is_file():
        return
    if METRICS not in marks:
        metrics.unlink()
        return
    keys, rows = _read_rows(metrics)
    kept = rows[: marks[METRICS]]
    # columns that no row is left of go too: the file is as it was
    held = {key for row in kept for key, value in row.items() if value}
    _write_rows(metrics, [key for key in keys if key in held], kept)


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8") as lines:
        table = csv.DictReader(lines)
        rows = list(table)
    return list(table.fieldnames or []), rows


def _write_rows(path: Path, keys: list[str], rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fieldnames=keys, extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    write_whole(path, text.getvalue())
