"""Writes what `opd predict` makes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Writes each record of `predict_step` as a line of JSON, batch by batch.

    Hook: `on_predict_batch_end`. Each rank writes its own file where there are several.

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
        """Append the batch's records; the first batch starts the file anew."""
        path = self.file(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if self._started else "w", encoding="utf-8") as lines:
            for record in prediction:
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._started = True

    def file(self, trainer: L.Trainer) -> Path:
        """Return where this rank writes."""
        folder = trainer.log_dir or trainer.default_root_dir
        path = Path(self.path) if self.path else Path(folder) / "predictions.jsonl"
        if trainer.world_size > 1:
            path = path.with_stem(f"{path.stem}_rank{trainer.global_rank}")
        return path

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where the records are."""
        self._started = False
        if trainer.is_global_zero:
            print(f"completions: {self.file(trainer)}")
