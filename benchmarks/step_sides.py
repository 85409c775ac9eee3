"""How each side of step.py trains, step by step as it is told to, and its loss on a given rollout.

`python -m benchmarks.step_sides JSON` is one side's process; the JSON holds what `train` is given.
"""

import json
import math
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import common
from benchmarks.step_shared import (
    EOS,
    PAD,
    SPREADS,
    ForcedLengths,
    Turns,
    completion_lengths,
    prompts,
    random_tokens,
)
from opd_lightning import (
    LocalTeacher,
    Objective,
    OPDDataModule,
    OPDModule,
    PromptBatch,
    ReverseKL,
    Rollout,
    RolloutCallback,
    SamplingConfig,
    TopKReverseKL,
)

PARTS = ("rollout", "teacher", "student and loss", "optimiser", "other")
TRL = "TRL, beta=1"
# name -> objective, optimiser steps between measures over the whole vocabulary
OURS: dict[str, tuple[Callable[[], Objective], int]] = {
    "TopKReverseKL(k=32)": (partial(TopKReverseKL, k=32), 0),
    "ReverseKL": (ReverseKL, 0),
    "TopKReverseKL(k=32), measured every step": (partial(TopKReverseKL, k=32), 1),
    "ReverseKL, measured every step": (ReverseKL, 1),
}


def train(name: str, spread: str, folder: str, sizes: dict[str, Any]) -> None:
    """Train in this process, step by step as it is told to."""
    turns = Turns()
    lengths = completion_lengths(spread, sizes["rows"], sizes["longest"])
    force = ForcedLengths(lengths, sizes["vocab_size"])
    rounds = sizes["warm_up"] + sizes["rounds"] + 1
    if name == TRL:
        _train_trl(turns, force, Path(folder), sizes, rounds)
    else:
        _train_ours(turns, force, Path(folder), sizes, rounds, *_ours(name, spread, sizes))


# -------------------------------------------------------------------------------------------- ours


def _ours(name: str, spread: str, sizes: dict[str, Any]) -> tuple[Objective, dict[str, Any]]:
    objective, metrics_every = OURS[name]
    options = {
        "metrics_every": metrics_every,
        "micro_batch_tokens": sizes["micro_batch_tokens"][spread],
    }
    return objective(), options


def _module(
    folder: Path, sizes: dict[str, Any], objective: Objective, options: dict[str, Any]
) -> OPDModule:
    optimizer = partial(torch.optim.AdamW, lr=sizes["learning_rate"], weight_decay=0.0, fused=True)
    return OPDModule(
        str(folder / "student"),
        LocalTeacher(str(folder / "teacher")),
        objective,
        optimizer=optimizer,
        **options,
    )


class _Kept(DummyLogger):
    """Keeps what was logged last."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.values = metrics


def _trainer(folder: Path, logger: _Kept, callbacks: list[L.Callback], steps: int) -> L.Trainer:
    return L.Trainer(
        accelerator="gpu" if common.device().type == "cuda" else "cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=logger,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


class _TakeTurns(L.Callback):
    """Waits before each step, before its rollout; hands over what the module's clock measured."""

    def __init__(self, turns: Turns, force: ForcedLengths, logger: _Kept) -> None:
        self.turns, self.force, self.logger = turns, force, logger

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.force.attach(pl_module.student.model)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.turns.next()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        names = ("rollout", "teacher", "student", "optimizer")
        for part, name in zip(PARTS, names, strict=False):
            self.turns.add(part, self.logger.values[f"perf/{name}_seconds"])
        self.turns.lengths = batch.rollout.completion_lengths.tolist()


def _train_ours(
    turns: Turns,
    force: ForcedLengths,
    folder: Path,
    sizes: dict[str, Any],
    rounds: int,
    objective: Objective,
    options: dict[str, Any],
) -> None:
    turns.ready()
    logger = _Kept()
    callbacks = [
        _TakeTurns(turns, force, logger),
        RolloutCallback(SamplingConfig(max_completion_length=sizes["longest"])),
    ]
    data = OPDDataModule(
        train=str(folder / "prompts.jsonl"), prompts_per_step=sizes["rows"], shuffle=False
    )
    module = _module(folder, sizes, objective, options)
    _trainer(folder, logger, callbacks, rounds).fit(module, data)


# --------------------------------------------------------------------------------------------- TRL


def _trl_trainer(folder: Path, sizes: dict[str, Any], rounds: int, callbacks: list[Any]) -> Any:
    """Return TRL's trainer; its defaults except where they would make it slower or differ."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DistillationConfig, DistillationTrainer

    config = DistillationConfig(
        output_dir=str(folder / "trl"),
        beta=1.0,
        max_completion_length=sizes["longest"],
        per_device_train_batch_size=sizes["rows"],
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=common.device().type != "cuda",
        max_steps=rounds,
        learning_rate=sizes["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        shuffle_dataset=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    texts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    return DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(texts),
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
        callbacks=callbacks,
    )


def _train_trl(
    turns: Turns, force: ForcedLengths, folder: Path, sizes: dict[str, Any], rounds: int
) -> None:
    from transformers import TrainerCallback
    from trl import DistillationTrainer  # noqa: F401  counted with the libraries

    class TakeTurns(TrainerCallback):
        since: float

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.next()

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            turns.add("optimiser", common.now(common.device()) - self.since)

    turns.ready()
    taking = TakeTurns()
    trainer = _trl_trainer(folder, sizes, rounds, [taking])
    force.attach(trainer.model)
    generate = turns.timed("rollout", trainer._generate_and_score_completions)
    hidden, step = trainer._get_last_hidden_state, trainer.training_step
    teacher_hidden = turns.timed("teacher", hidden)

    def kept_lengths(*args: Any, **kwargs: Any) -> dict[str, Any]:
        rollout = generate(*args, **kwargs)
        turns.lengths = rollout["completion_mask"].sum(1).tolist()
        return rollout

    def of_either(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        is_teacher = model is trainer.accelerator.unwrap_model(trainer.teacher_model)
        return (teacher_hidden if is_teacher else hidden)(model, *args, **kwargs)

    def whole(*args: Any, **kwargs: Any) -> Tensor:
        started = common.now(common.device())
        loss = step(*args, **kwargs)
        taking.since = common.now(common.device())
        inside = turns.parts["rollout"] + turns.parts["teacher"]
        turns.add("student and loss", taking.since - started - inside)
        return loss

    trainer._generate_and_score_completions = kept_lengths
    trainer._get_last_hidden_state = of_either
    trainer.training_step = whole
    trainer.train()


# ------------------------------------------------------------------------------- the loss is equal


def losses(folder: str, sizes: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return loss and gradient norm of both sides on a rollout of random tokens, by spread."""
    return {spread: _losses(folder, spread, sizes) for spread in SPREADS}


def _losses(folder: str, spread: str, sizes: dict[str, Any]) -> dict[str, float]:
    draw = random.Random(1)
    rows, vocab_size = sizes["rows"], sizes["vocab_size"]
    lengths = completion_lengths(spread, rows, sizes["longest"])
    given = prompts(rows, vocab_size, 1)
    answers = [
        [*random_tokens(draw, i, n - 1, rows, vocab_size), EOS] for i, n in enumerate(lengths)
    ]
    ours = _our_loss(Path(folder), sizes, given, answers, _ours("ReverseKL", spread, sizes))
    theirs = _trl_loss(Path(folder), sizes, given, answers)
    found = {"tokens": sum(lengths)}
    for name in ours:
        found |= {
            f"{name}_ours": ours[name],
            f"{name}_trl": theirs[name],
            f"{name}_relative_difference": abs(ours[name] / theirs[name] - 1),
        }
    return found


def _our_loss(
    folder: Path,
    sizes: dict[str, Any],
    given: list[list[int]],
    answers: list[list[int]],
    ours: tuple[Objective, dict[str, Any]],
) -> dict[str, float]:
    """Take one step of OPDModule on the rollout and return what it logs."""
    batch = PromptBatch.from_token_ids(given)
    batch.rollout = Rollout.from_completions(batch, answers, truncated=[False] * len(answers))
    logger = _Kept()
    trainer = _trainer(folder, logger, [], steps=1)
    trainer.fit(_module(folder, sizes, *ours), DataLoader([batch], batch_size=None))
    return {name: float(logger.values[name]) for name in ("loss", "grad_norm")}


def _trl_loss(
    folder: Path, sizes: dict[str, Any], given: list[list[int]], answers: list[list[int]]
) -> dict[str, float]:
    """Return the loss that TRL's trainer computes for the rollout, and its gradient's norm."""
    from trl.trainer.utils import pad

    trainer = _trl_trainer(folder, sizes, 1, [])
    device = trainer.accelerator.device
    inputs = {"num_items_in_batch": torch.tensor(float(sum(map(len, answers))), device=device)}
    for name, ids, side in (("prompt", given, "left"), ("completion", answers, "right")):
        rows = [torch.tensor(row, device=device) for row in ids]
        inputs[f"{name}_ids"] = pad(rows, padding_value=PAD, padding_side=side)
        ones = [torch.ones_like(row) for row in rows]
        inputs[f"{name}_mask"] = pad(ones, padding_value=0, padding_side=side)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), math.inf)
    return {"loss": float(loss), "grad_norm": float(norm)}


if __name__ == "__main__":
    train(**json.loads(sys.argv[1]))
