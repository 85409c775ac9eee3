"""Runs of a real Trainer on tiny real models, for the tests of OPDModule and its callbacks."""

import csv
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from opd_lightning.data import OPDDataModule
from opd_lightning.module import OPDModule
from opd_lightning.objectives import Objective, ReverseKL
from opd_lightning.policy import PolicySpec
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.rollout import RolloutCallback, SamplingConfig
from opd_lightning.teachers import LocalTeacher
from tests.tiny import save_tiny

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SGD = partial(torch.optim.SGD, lr=0.05)
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "use_distributed_sampler": False,
    "logger": False,
}


def save_pair(folder: Path) -> Path:
    """Write `student` and `teacher`, two different models of one shape, into `folder`."""
    save_tiny(folder / "student", seed=1, **SMALL)
    save_tiny(folder / "teacher", seed=2, **SMALL)
    return folder


def module(
    models: Path, objective: Objective | None = None, dtype: str = "float32", **settings: Any
) -> OPDModule:
    settings = {"optimizer": SGD, "teacher": LocalTeacher(models / "teacher", dtype)} | settings
    student = settings.pop("student", PolicySpec(str(models / "student"), dtype=dtype))
    return OPDModule(student, objective=objective or ReverseKL(), **settings)


def answered(
    lengths: Sequence[int] = (5, 2, 7, 1), seed: int = 0, prompt_lengths: Sequence[int] = (3, 1, 2)
) -> PromptBatch:
    """Prompts and completions of random tokens, of these lengths; the prompts' lengths repeat."""
    g = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(2, 300, (length,), generator=g).tolist()

    prompts = [tokens(prompt_lengths[i % len(prompt_lengths)]) for i in range(len(lengths))]
    batch = PromptBatch.from_token_ids(prompts)
    truncated = [False] * len(lengths)
    batch.rollout = Rollout.from_completions(batch, [tokens(n) for n in lengths], truncated)
    return batch


def loader(*batches: PromptBatch) -> DataLoader:
    return DataLoader(list(batches), batch_size=None)


def fit(
    model: OPDModule,
    batches: Iterable[PromptBatch] | OPDDataModule,
    *callbacks: L.Callback,
    ckpt_path: str | Path | None = None,
    **options: Any,
) -> L.Trainer:
    """Train on these batches once, or on the data module until max_steps."""
    trainer = L.Trainer(callbacks=list(callbacks), **({**QUIET, "max_epochs": 1} | options))
    source = (
        {"datamodule": batches}
        if isinstance(batches, OPDDataModule)
        else {"train_dataloaders": loader(*batches)}
    )
    trainer.fit(model, **source, ckpt_path=ckpt_path)
    return trainer


def until(max_steps: int, **options: Any) -> dict[str, Any]:
    return {"max_steps": max_steps, "max_epochs": -1, **options}


def csv_logger(folder: Path) -> CSVLogger:
    return CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)


def logged(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.csv, empty cells left out."""
    with (folder / "metrics.csv").open(newline="") as lines:
        return [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(lines)]


def weights(model: OPDModule) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.student.model.state_dict().items()}


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Norm of the difference, relative to the norm of the second."""
    assert first.keys() == second.keys()
    apart = sum(float((first[k].double() - second[k].double()).square().sum()) for k in first)
    size = sum(float(v.double().square().sum()) for v in second.values())
    return (apart / size) ** 0.5


class Gradients(L.Callback):
    """Keeps the gradient of each optimiser step, as the optimiser gets it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: OPDModule, *_: Any) -> None:
        named = pl_module.student.named_parameters()
        self.steps.append({name: p.grad.detach().clone() for name, p in named})


class Frozen(L.Callback):
    """Puts the first weights back after each round: every gradient is taken at one place."""

    def on_train_start(self, trainer: L.Trainer, pl_module: OPDModule) -> None:
        self.first = weights(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: OPDModule, *_: Any) -> None:
        pl_module.student.model.load_state_dict(self.first)


def write_prompts(path: Path, number: int, **columns: Any) -> str:
    rows = [{"prompt": "abcdefgh"[: 1 + i % 5] + str(i), **columns} for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rollouts(limit: int = 5, **settings: Any) -> RolloutCallback:
    return RolloutCallback(SamplingConfig(max_completion_length=limit, **settings))
