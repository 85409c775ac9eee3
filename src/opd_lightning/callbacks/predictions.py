"""Writes what `opd predict` makes."""

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter


def json_lines(records: Iterable[dict[str, Any]]) -> str:
    """Return the text of a file of JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


class PredictionWriter(BasePredictionWriter):
    """Writes each record of `predict_step` as a line of JSON, batch by batch, in order.

    Hook: `on_predict_batch_end`. The records of all ranks go to one file, which rank 0 writes.

    Args:
        path: The file; default `predictions.jsonl` in the run's folder.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self._started = False

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: list[dict[str, Any]],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the records of all ranks' batches; the first batch starts the file anew."""
        shares = [prediction]
        if trainer.world_size > 1:
            shares = [[]] * trainer.world_size
            torch.distributed.all_gather_object(shares, prediction)
        path = self.file(trainer)
        if not trainer.is_global_zero:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if self._started else "w", encoding="utf-8") as lines:
            lines.write(json_lines(chain.from_iterable(shares)))
        self._started = True

    def file(self, trainer: L.Trainer) -> Path:
        """Return where the records go; asked by all ranks together."""
        folder = trainer.lightning_module.run_folder
        return Path(self.path) if self.path else folder / "predictions.jsonl"

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where the records are."""
        self._started = False
        path = self.file(trainer)
        if trainer.is_global_zero:
            print(f"completions: {path}")
