"""The callback that fills each round's batch with the student's own completions."""

import time
from typing import Any

import lightning as L

from opd_lightning.errors import ConfigError, RunError
from opd_lightning.records import PromptBatch
from opd_lightning.rollout.engine import RolloutEngine
from opd_lightning.rollout.sampling import SamplingConfig
from opd_lightning.rollout.transformers_engine import TransformersEngine

# Evaluation draws with the same numbers at every step of a run, so that two evaluations differ by
# the weights alone. Training rounds count from 0 and never reach this one.
_EVALUATION_ROUND = 2**40


class RolloutCallback(L.Callback):
    """Samples completions at the start of each batch and puts them into `batch.rollout`.

    Hooks: `on_{train,validation,test,predict}_batch_start`. Saves nothing: the seed of a round is a
    function of (seed, optimiser steps so far) in training and of the seed alone in evaluation.

    Args:
        sampling: How completions are drawn in training; default `SamplingConfig()`.
        evaluation: The same for validate, test and predict; default as in training, one completion
            a prompt.
        engine: What generates; default `TransformersEngine()`.
        seed: Of all rounds.
    """

    def __init__(
        self,
        sampling: SamplingConfig | None = None,
        evaluation: SamplingConfig | None = None,
        engine: RolloutEngine | None = None,
        seed: int = 0,
    ) -> None:
        self.sampling = sampling or SamplingConfig()
        self.evaluation = evaluation or SamplingConfig(
            **{**vars(self.sampling), "num_generations": 1}
        )
        self.engine = engine or TransformersEngine()
        self.seed = seed

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
        batch.rollout_seconds = time.perf_counter() - started


def round_seed(seed: int, number: int) -> int:
    """Return the seed of round `number` of a run; distinct for distinct pairs of small numbers."""
    return (seed * 1_000_003 + number) % 2**63
