"""Run twice by `test_datamodule.py`, as two ranks that write the prompt indices they saw."""

import sys
from pathlib import Path

import lightning as L
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from opd_lightning.data import OPDDataModule
from opd_lightning.records import PromptBatch
from tests.tiny import tiny_tokenizer


class Recorder(L.LightningModule):
    """Records the prompt indices of each batch of each stage."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast | None, context_length: int | None = None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.layer = nn.Linear(1, 1)
        self.seen: dict[str, list[list[int]]] = {}

    def _record(self, stage: str, batch: PromptBatch) -> None:
        self.seen.setdefault(stage, []).append(batch.index.tolist())

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._record("train", batch)
        self.optimizers().step()

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._record("val", batch)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._record("test", batch)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> torch.Tensor:
        self._record("predict", batch)
        return batch.index

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(folder: Path) -> None:
    """Fit two epochs on two ranks with Lightning's sampler replacement on."""
    data = OPDDataModule(
        train=str(folder / "prompts.jsonl"),
        val=str(folder / "val.jsonl"),
        prompts_per_step=4,
        seed=2,
    )
    module = Recorder(tiny_tokenizer())
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=True,
        max_epochs=2,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    torch.save(module.seen, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
