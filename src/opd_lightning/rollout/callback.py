"""The callback that fills each round's batch with the student's own completions."""

import time
from typing import Any

import lightning as L
import torch

from opd_lightning.errors import ConfigError, RunError
from opd_lightning.policy import Tokenizer
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.rollout.engine import RolloutEngine
from opd_lightning.rollout.sampling import SamplingConfig
from opd_lightning.rollout.transformers_engine import TransformersEngine
from opd_lightning.tasks import Task, Verifiers

# Evaluation draws with the same numbers at every step of a run, so that two evaluations differ by
# the weights alone. Training rounds count from 0 and never reach this one.
_EVALUATION_ROUND = 2**40


class RolloutCallback(L.Callback):
    """Samples completions at the start of each batch and puts them into `batch.rollout`.

    Where rows of the data can be checked (their column `task` names a task and they have the answer
    that it needs), the completions' scores become `rollout.reward`, 0 for rows that cannot; the
    seconds this takes are the rollout's.

    Hooks: `setup`, `on_{train,validation,test,predict}_batch_start`. Saves nothing: the seed of a
    round is a function of (seed, optimiser steps so far) in training and of the seed alone in
    evaluation.

    Args:
        sampling: How completions are drawn in training; default `SamplingConfig()`.
        evaluation: The same for validate, test and predict; default as in training, one completion
            a prompt.
        engine: What generates; default `TransformersEngine()`.
        seed: Of all rounds.
        tasks: Name in the data's column `task` -> what scores its rows; other names are looked up
            among the known tasks, upper and lower case alike.
    """

    def __init__(
        self,
        sampling: SamplingConfig | None = None,
        evaluation: SamplingConfig | None = None,
        engine: RolloutEngine | None = None,
        seed: int = 0,
        tasks: dict[str, Task] | None = None,
    ) -> None:
        self.sampling = sampling or SamplingConfig()
        self.evaluation = evaluation or SamplingConfig(
            **{**vars(self.sampling), "num_generations": 1}
        )
        self.engine = engine or TransformersEngine()
        self.seed = seed
        self.verifiers = Verifiers(tasks)
        self._scores: bool | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out whether the data can be scored, alike on all ranks whatever batches they get.

        Raises:
            ConfigError: If `tasks` names a task that the data does not have, or one whose rows have
                no answer.
        """
        tables = getattr(trainer.datamodule, "tables", None)
        if not tables:
            self._scores = None
            return
        rows = {(p.task, p.answer) for table in tables.values() for p in table.prompts}
        self.verifiers.check(rows)
        self._scores = bool(self.verifiers.scored_tasks(rows))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Fill the batch for training; a round's number is that of its first optimiser step."""
        self._fill(pl_module, batch, self.sampling, round_seed(self.seed, trainer.global_step))

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Fill the batch; the same completions for the same weights, whenever it is called."""
        seed = round_seed(self.seed, _EVALUATION_ROUND)
        self._fill(pl_module, batch, self.evaluation, seed)

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """As for validation."""
        self.on_validation_batch_start(*args, **kwargs)

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """As for validation."""
        self.on_validation_batch_start(*args, **kwargs)

    def _fill(
        self,
        pl_module: L.LightningModule,
        batch: PromptBatch,
        sampling: SamplingConfig,
        seed: int,
    ) -> None:
        started = time.perf_counter()
        try:
            batch.rollout = self.engine.generate(pl_module.student, batch, sampling, seed)
        except ConfigError:
            raise
        except Exception as error:
            raise RunError(
                f"{type(self.engine).__name__} failed on {batch.num_prompts} prompts (lines "
                f"{batch.index.tolist()}): {error}. The last checkpoint is intact."
            ) from error
        self._fill_reward(pl_module, batch)
        batch.rollout_seconds = time.perf_counter() - started

    def _fill_reward(self, pl_module: L.LightningModule, batch: PromptBatch) -> None:
        scores = self._scores
        if scores is None:  # no data module: the batch is all that is known
            rows = zip(batch.task, batch.answer, strict=True)
            scores = bool(self.verifiers.scored_tasks(rows))
        if scores:
            found = score_rollout(self.verifiers, batch, pl_module.tokenizer)
            batch.rollout.reward = torch.tensor(
                [0.0 if score is None else score for score in found],
                device=batch.rollout.input_ids.device,
            )


def find_rollout_callback(trainer: L.Trainer) -> RolloutCallback | None:
    """Return the trainer's RolloutCallback, None where there is none."""
    found = [c for c in trainer.callbacks if isinstance(c, RolloutCallback)]
    return found[0] if found else None


def score_rollout(
    verifiers: Verifiers, batch: PromptBatch, tokenizer: Tokenizer
) -> list[float | None]:
    """Return the score of each row of the batch's rollout, None where it is not scored."""
    rollout = batch.rollout
    group = rollout.num_rows // max(1, batch.num_prompts)
    answers = [answer for answer in batch.answer for _ in range(group)]
    return verifiers.scores(rollout.task, answers, completion_texts(rollout, tokenizer))


def completion_records(batch: PromptBatch, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return one JSON-ready record a row of the batch's rollout.

    Keys: `index` (line of the prompt, 0-based), `generation` (number among its siblings), `task`,
    `prompt`, `completion`, `truncated`.
    """
    rollout = batch.rollout
    group = rollout.num_rows // max(1, batch.num_prompts)
    prompts = [tokenizer.decode(ids) for ids in batch.unpadded()]
    return [
        {
            "index": int(batch.index[row // group]),
            "generation": row % group,
            "task": rollout.task[row],
            "prompt": prompts[row // group],
            "completion": text,
            "truncated": bool(rollout.truncated[row]),
        }
        for row, text in enumerate(completion_texts(rollout, tokenizer))
    ]


def completion_texts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """Return the text of each row's completion, special tokens left out."""
    ids = rollout.token_ids.cpu().split(rollout.completion_lengths.tolist())
    return [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in ids]


def round_seed(seed: int, number: int) -> int:
    """Return the seed of round `number` of a run; distinct for distinct pairs of small numbers."""
    return (seed * 1_000_003 + number) % 2**63
