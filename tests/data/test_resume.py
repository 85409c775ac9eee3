"""A run stopped anywhere and resumed by a new Trainer sees the prompts of an uninterrupted run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers import PreTrainedTokenizerFast

from opd_lightning.data import OPDDataModule
from opd_lightning.errors import ConfigError
from opd_lightning.records import PromptBatch

NUM_PROMPTS, PROMPTS_PER_STEP = 11, 3  # 3 rounds an epoch, 2 prompts left over
NUM_STEPS = 8  # ends in the third epoch
STEPS_OF_ROUND = 2  # several optimiser steps on one round, as the real module does


class Student(L.LightningModule):
    """Manual optimisation; the loss depends on the prompts, so the weights tell their order too."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tokenizer = tokenizer
        self.layer = nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen.append(batch.index.tolist())
        for _ in range(STEPS_OF_ROUND):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = self.layer(batch.index[:, None].float()).square().mean()
            self.manual_backward(loss)
            optimizer.step()

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


@pytest.fixture
def spec(write_jsonl: Callable[..., str]) -> str:
    return write_jsonl(*({"prompt": f"What is {i}?"} for i in range(NUM_PROMPTS)))


def _fit(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    spec: str,
    num_rounds: int,
    ckpt_path: str | None = None,
    val: bool = False,
    seed: int = 0,
    **options: Any,
) -> tuple[Student, L.Trainer]:
    torch.manual_seed(0)
    module = Student(tokenizer)
    data = OPDDataModule(
        train=spec, val=spec if val else None, prompts_per_step=PROMPTS_PER_STEP, seed=seed
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=num_rounds * STEPS_OF_ROUND,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.parametrize("val", [False, True])
@pytest.mark.parametrize("stopped_after", range(1, NUM_STEPS))
def test_saved_after_a_stop(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, spec: str, stopped_after: int, val: bool
):
    options = {"val": val, "enable_checkpointing": False}
    whole, _ = _fit(tmp_path, tokenizer, spec, NUM_STEPS, **options)
    assert len(whole.seen) == NUM_STEPS
    stopped, trainer = _fit(tmp_path, tokenizer, spec, stopped_after, **options)
    checkpoint = tmp_path / "stopped.ckpt"
    trainer.save_checkpoint(checkpoint)
    resumed, _ = _fit(tmp_path, tokenizer, spec, NUM_STEPS, str(checkpoint), **options)
    assert stopped.seen + resumed.seen == whole.seen
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


@pytest.mark.parametrize("limit", [1.0, 2])
def test_saved_on_the_way(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, spec: str, limit: float
):
    """Every round writes a checkpoint; each of them continues to the same end."""
    callback = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole, _ = _fit(
        tmp_path, tokenizer, spec, NUM_STEPS, callbacks=[callback], limit_train_batches=limit
    )
    for done in range(1, NUM_STEPS):
        checkpoint = tmp_path / f"step={done * STEPS_OF_ROUND}.ckpt"
        state = torch.load(checkpoint, weights_only=True)
        assert state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["position"] == done
        resumed, _ = _fit(
            tmp_path,
            tokenizer,
            spec,
            NUM_STEPS,
            str(checkpoint),
            enable_checkpointing=False,
            limit_train_batches=limit,
        )
        assert resumed.seen == whole.seen[done:]
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_other_data_settings_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, spec: str
):
    _, trainer = _fit(tmp_path, tokenizer, spec, 2, enable_checkpointing=False)
    checkpoint = tmp_path / "stopped.ckpt"
    trainer.save_checkpoint(checkpoint)
    with pytest.raises(ConfigError, match=r"belongs to seed=0, this run has seed=1\. Resume with"):
        _fit(tmp_path, tokenizer, spec, 4, str(checkpoint), seed=1, enable_checkpointing=False)
