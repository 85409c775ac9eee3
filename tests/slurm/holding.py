"""A callback for runs that are to be met at a known step."""

import time
from pathlib import Path
from typing import Any

import lightning as L


class Hold(L.Callback):
    """Waits at the start of the round after `step` until the file `release` is there.

    Writes an empty file `held` when it waits. Each rank waits by itself.
    """

    def __init__(self, step: int, folder: str) -> None:
        self.step = step
        self.folder = Path(folder)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        """Wait."""
        if trainer.global_step != self.step or not self.folder.is_dir():
            return
        (self.folder / f"held_{trainer.global_rank}").touch()
        while not (self.folder / "release").exists():
            time.sleep(0.05)
