"""Evaluation by scores: several completions of each held-out prompt, checked by its task.

P prompts of a batch, n completions of each.
"""

import json
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor

from opd_lightning.callbacks.predictions import json_lines
from opd_lightning.callbacks.whole import write_whole
from opd_lightning.errors import ConfigError
from opd_lightning.metrics import AverageAtK, PassAtK, SuccessRate
from opd_lightning.metrics.success import PromptMetric, check_bootstrap
from opd_lightning.records import PromptBatch
from opd_lightning.rollout import RolloutCallback, RolloutEngine, SamplingConfig
from opd_lightning.rollout.callback import (
    completion_records,
    find_rollout_callback,
    round_seed,
    score_rollout,
)
from opd_lightning.tasks import Task, Verifiers

log = logging.getLogger("opd_lightning")

# The same random numbers at each evaluation of a run, so that two differ by the weights alone.
_ROUND = 2**40 + 1


class Evaluate(L.Callback):
    """Samples completions of the held-out prompts, scores them, and says how sure the means are.

    In `fit` on `data.val`, before the first step, every `every_n_steps` optimiser steps and at the
    end (unless the run was told to stop); in `opd test` on the test prompts. Logged for each task
    that can be scored, with `test/` for `eval/` in `opd test`: `eval/<task>/avg@n`,
    `eval/<task>/pass@k` and `eval/<task>/success_rate`, each with `/low` and `/high`, the ends of a
    bootstrap interval over prompts. Two files each time, in the run's folder: the completions with
    their scores as JSON lines, and the estimates with the sampling that they hold for as JSON.

    Hooks: `setup`, `on_train_start`, `on_train_batch_end`, `on_train_end`, `on_test_epoch_end`.
    Saves nothing, and leaves the global random state alone.

    Args:
        every_n_steps: Optimiser steps between evaluations; 0: only before and after training.
        num_samples: Completions of each prompt, n.
        pass_at: The k of pass@k, each at most n; default n alone.
        sampling: How they are drawn; default: `rollout.evaluation`. Its `num_generations` is
            `num_samples` here.
        threshold: Score from which on a completion solves its prompt.
        level: Of the intervals.
        resamples: Bootstrap means of each interval.
        seed: Of sampling and bootstrap; default: that of the rollouts.
        engine: What generates; default: that of the rollouts.
        tasks: Name in the data's column `task` -> what scores its rows; default: as for rollouts.
        at_start: Evaluate before the first step.
        folder: Of the files, in the run's folder.

    Raises:
        ConfigError: If a number is out of its range.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        num_samples: int = 4,
        pass_at: list[int] | None = None,
        sampling: SamplingConfig | None = None,
        threshold: float = 1.0,
        level: float = 0.95,
        resamples: int = 1000,
        seed: int | None = None,
        engine: RolloutEngine | None = None,
        tasks: dict[str, Task] | None = None,
        at_start: bool = True,
        folder: str = "evaluations",
    ) -> None:
        for name, value, least in [
            ("every_n_steps", every_n_steps, 0),
            ("num_samples", num_samples, 1),
        ]:
            if value < least:
                raise ConfigError(f"Evaluate's {name} must be at least {least}; got {value}.")
        self.pass_at = [num_samples] if pass_at is None else list(pass_at)
        if wrong := [k for k in self.pass_at if not 1 <= k <= num_samples]:
            raise ConfigError(
                f"pass_at holds {wrong[0]}, but k is 1 to num_samples={num_samples}. Lower it or "
                "draw more samples."
            )
        if sampling is not None and sampling.num_generations not in (1, num_samples):
            raise ConfigError(
                f"Evaluate's sampling.num_generations={sampling.num_generations} and num_samples="
                f"{num_samples} differ. Leave num_generations out."
            )
        check_bootstrap(level, resamples)
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.sampling = sampling
        self.threshold = threshold
        self.level = level
        self.resamples = resamples
        self.seed = seed
        self.engine = engine
        self.verifiers = None if tasks is None else Verifiers(tasks)
        self.at_start = at_start
        self.folder = folder
        self._tasks: list[str] = []
        self._seen = 0
        self._evaluated: int | None = None

    # ------------------------------------------------------------------------------- set-up

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take from the rollouts what is not given, and refuse what cannot be scored.

        Raises:
            ConfigError: If there are no held-out prompts, none that can be scored, or nothing says
                how to sample.
        """
        split = {"fit": "val", "test": "test"}.get(stage)
        if split is None:
            return
        self.complete(find_rollout_callback(trainer))
        tables = getattr(trainer.datamodule, "tables", {})
        if split not in tables:
            raise ConfigError(
                f"Evaluate needs held-out prompts, but data.{split} is not given. Give a file with "
                "the columns prompt, task and answer."
            )
        self._tasks = self.tasks_of((p.task, p.answer) for p in tables[split].prompts)

    def complete(self, rollout: RolloutCallback | None) -> None:
        """Take from the rollouts what is not given.

        Raises:
            ConfigError: If there are none, and something is missing.
        """
        missing = [n for n in ("sampling", "engine", "verifiers") if getattr(self, n) is None]
        if rollout is None and missing:
            raise ConfigError(
                f"Evaluate has no {', '.join(missing).replace('verifiers', 'tasks')} of its own, "
                "and there is no RolloutCallback to take it from. Give sampling, engine and tasks."
            )
        if rollout is not None:
            self.sampling = self.sampling or rollout.evaluation
            self.engine = self.engine or rollout.engine
            self.verifiers = self.verifiers or rollout.verifiers
            self.seed = rollout.seed if self.seed is None else self.seed
        self.sampling = replace(self.sampling, num_generations=self.num_samples)

    def tasks_of(self, rows: Iterable[tuple[str, str | None]]) -> list[str]:
        """Return the tasks of the rows (task, answer) that can be scored.

        Raises:
            ConfigError: If there is none.
        """
        rows = set(rows)
        if not (tasks := self.verifiers.scored_tasks(rows)):
            raise ConfigError(
                "Evaluate can score none of the held-out prompts: their tasks are "
                f"{', '.join(sorted({name for name, _ in rows}))}, "
                f"{sum(answer is not None for _, answer in rows)} of {len(rows)} kinds of rows "
                "have an answer. Name a known task in the column `task` (Math, Arithmetic, "
                "ExactMatch), or map the names to tasks under `tasks`, and give answers."
            )
        return tasks

    def metrics(self) -> dict[str, PromptMetric]:
        """Return new metrics of one task by their names: `avg@4`, `success_rate`, `pass@4`."""
        settings: dict[str, Any] = {
            "level": self.level,
            "resamples": self.resamples,
            "seed": self.seed or 0,
        }
        passes = {f"pass@{k}": PassAtK(k, self.threshold, **settings) for k in self.pass_at}
        return {
            f"avg@{self.num_samples}": AverageAtK(**settings),
            "success_rate": SuccessRate(self.threshold, **settings),
            **passes,
        }

    # -------------------------------------------------------------------------------- hooks

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate before the first step; a resumed run has done so already."""
        self._seen = trainer.global_step
        if self.at_start and trainer.global_step == 0:
            self._evaluate_in_fit(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Evaluate where a multiple of `every_n_steps` was reached or passed by this round."""
        before, self._seen = self._seen, trainer.global_step
        every = self.every_n_steps
        if every and before // every < trainer.global_step // every:
            values = self._evaluate_in_fit(trainer, pl_module)
            # for callbacks that monitor a metric; the loggers have it, under the right step
            pl_module.log_dict(values, logger=False, batch_size=1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate what came out."""
        if self._evaluated != trainer.global_step and not trainer.should_stop:
            self._evaluate_in_fit(trainer, pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate on the test prompts; Lightning writes, prints and returns the numbers."""
        loader = trainer.datamodule.test_dataloader()
        pl_module.log_dict(self._evaluate(trainer, pl_module, loader, "test"), batch_size=1)

    def _evaluate_in_fit(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, float]:
        self._evaluated = trainer.global_step
        values = self._evaluate(trainer, pl_module, trainer.datamodule.val_dataloader(), "eval")
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        return values

    def _evaluate(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        loader: Iterable[PromptBatch],
        prefix: str,
    ) -> dict[str, float]:
        """Return the values to log; write the two files."""
        started = time.perf_counter()
        folder = pl_module.run_folder / self.folder
        stem = f"{prefix}_step_{trainer.global_step:08d}"
        rank = f"_rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        metrics = {task: self.metrics() for task in self._tasks}
        for of_task in metrics.values():
            for metric in of_task.values():
                metric.to(pl_module.device)
        lines = []
        for batch, scores in self.sampled(pl_module.student, pl_module.tokenizer, loader):
            add_scores(metrics, batch, scores)
            lines += score_records(batch, scores, pl_module.tokenizer)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{stem}{rank}.jsonl", json_lines(lines))
        found = {
            f"{prefix}/{task}/{name}": metric.compute()
            for task, of_task in metrics.items()
            for name, metric in of_task.items()
        }
        if trainer.is_global_zero:
            summary = {
                "step": trainer.global_step,
                "seconds": round(time.perf_counter() - started, 3),
                "sampling": asdict(self.sampling),
                "seed": self.seed or 0,
                "threshold": self.threshold,
                "level": self.level,
                "estimates": {key: estimate._asdict() for key, estimate in found.items()},
            }
            write_whole(folder / f"{stem}.json", json.dumps(summary, indent=2) + "\n")
            log.info("%s", _told(trainer.global_step, found, self.level, self.sampling))
        values = {}
        for key, (mean, low, high) in found.items():
            values |= {key: mean, f"{key}/low": low, f"{key}/high": high}
        return values

    def sampled(
        self, student: Any, tokenizer: Any, loader: Iterable[PromptBatch]
    ) -> Iterator[tuple[PromptBatch, list[float | None]]]:
        """Yield each batch with its rollout, and the scores of its P * n completions."""
        seed = round_seed(self.seed or 0, _ROUND)
        for batch in loader:
            batch = batch.to(student.device)
            batch.rollout = self.engine.generate(student, batch, self.sampling, seed)
            yield batch, score_rollout(self.verifiers, batch, tokenizer)


def add_scores(
    metrics: dict[str, dict[str, PromptMetric]], batch: PromptBatch, scores: list[float | None]
) -> None:
    """Update every task's metrics, with no prompts where the batch has none of the task."""
    group = len(scores) // max(1, batch.num_prompts)
    for task, of_task in metrics.items():
        prompts = [
            p for p, name in enumerate(batch.task) if name == task and scores[p * group] is not None
        ]
        table = [scores[p * group : (p + 1) * group] for p in prompts]
        values = torch.tensor(table, dtype=torch.float64) if table else _no_scores(metrics)
        for metric in of_task.values():
            metric.update(values, batch.index[prompts])


def _no_scores(metrics: dict[str, dict[str, PromptMetric]]) -> Tensor:
    most = [m.k for of_task in metrics.values() for m in of_task.values() if hasattr(m, "k")]
    return torch.empty(0, max(most, default=1), dtype=torch.float64)


def score_records(
    batch: PromptBatch, scores: list[float | None], tokenizer: Any
) -> list[dict[str, Any]]:
    """Return one JSON-ready record a completion, score null where its row is not scored."""
    group = len(scores) // max(1, batch.num_prompts)
    return [
        record | {"answer": batch.answer[row // group], "score": scores[row]}
        for row, record in enumerate(completion_records(batch, tokenizer))
    ]


def _told(step: int, found: dict[str, Any], level: float, sampling: SamplingConfig) -> str:
    numbers = "; ".join(
        f"{key.partition('/')[2]} {e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]"
        for key, e in found.items()
    )
    return (
        f"step {step}: {numbers} ({level:.0%} intervals over prompts; temperature "
        f"{sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k}, at most "
        f"{sampling.max_completion_length} tokens)"
    )
