"""Diagnostics: the failure modes of on-policy distillation as numbers, figures and words."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor

from opd_lightning.callbacks import diagnostic_figures as figures
from opd_lightning.callbacks.heat_map import heat_map
from opd_lightning.callbacks.whole import write_whole
from opd_lightning.distributions import Distribution, TokenDistribution
from opd_lightning.errors import ConfigError
from opd_lightning.metrics.failure_modes import (
    LOOP_TOKENS,
    by_position,
    engine_mismatch,
    imbalance,
    offending_tokens,
    token_mismatch,
    unreliable_teacher,
)
from opd_lightning.metrics.gradients import GradientVariance
from opd_lightning.metrics.tokens import TokenRecords, TokenTable, token_table
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.rollout.callback import find_rollout_callback

log = logging.getLogger("opd_lightning")

# Below this mass of the student on the teacher's support, or above this share of repeated 4-grams,
# a run has collapsed: the teacher says nothing about what the student writes.
_COLLAPSED_MASS, _COLLAPSED_REPETITION = 0.2, 0.8
_WORST_TRUNCATION, _LEAST_OVERLAP = 0.5, 0.3


class Diagnostics(L.Callback):
    """Measures every `every` optimiser steps how a run may be failing; warns in words.

    Of the first update of a round: imbalance (few tokens carry the signal), an unreliable teacher
    (support mass, overlap, entropies, repetition, by position), token mismatch (special tokens and
    all with an advantage below -10 nats), the engine's probabilities beside the student's, and the
    variance of the gradient over micro-batches. Into the loggers under `diagnostics/`, and into
    `diagnostics/` of the run folder: a JSON file for each of these steps, one completion as HTML
    with each token coloured by its advantage, and figures, less often.

    Each warning is given once a run and names what to do. A served teacher's entropies are unknown
    and left out.

    Args:
        every: Optimiser steps between two measurements; 0: never.
        k: Size of the teacher's and the student's support.
        position_bucket: Completion tokens of one bucket of positions; default: an eighth of the
            longest completion, at most 1024 (the paper's).
        watch: Strings or ids to follow one by one, beside the tokenizer's special tokens.
        figures_every: Optimiser steps between two drawings, of what is measured then; 0: never. The
            last measurement of a run is drawn too.
        stop_on_collapse: End the run, with its checkpoint kept, after this many measurements in a
            row with less than 0.2 of the student's mass on the teacher's support or more than 0.8
            of 4-grams repeated; 0: never.

    Raises:
        ConfigError: If a number is out of its range.
    """

    def __init__(
        self,
        every: int = 10,
        k: int = 16,
        position_bucket: int | None = None,
        watch: list[str | int] | None = None,
        figures_every: int = 100,
        stop_on_collapse: int = 0,
    ) -> None:
        for name, value, least in [
            ("every", every, 0),
            ("k", k, 1),
            ("position_bucket", position_bucket, 1),
            ("figures_every", figures_every, 0),
            ("stop_on_collapse", stop_on_collapse, 0),
        ]:
            if value is not None and value < least:
                raise ConfigError(f"Diagnostics.{name} must be at least {least}; got {value}.")
        self.every = every
        self.k = k
        self.position_bucket = position_bucket
        self.watch = list(watch or [])
        self.figures_every = figures_every
        self.stop_on_collapse = stop_on_collapse
        self._module: L.LightningModule | None = None
        self._watched: dict[int, str] = {}
        self._records: TokenRecords | None = None
        self._gradients = GradientVariance()
        self._example: tuple[Rollout, TokenTable] | None = None
        self._undrawn: tuple[TokenTable, dict[str, Any]] | None = None
        self._step = -1
        self._collapsed = 0
        self._warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"collapsed": self._collapsed, "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._collapsed, self._warned = state_dict["collapsed"], set(state_dict["warned"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ask the module to be shown what it reads."""
        if stage == "fit" and self not in pl_module.observers:
            pl_module.observers.append(self)
            self._module = pl_module

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the ids to watch."""
        self._watched = _watched(pl_module.tokenizer, self.watch)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Begin a measurement where one is due."""
        step = trainer.global_step
        self._records = TokenRecords() if self._due(self.every, step) else None
        self._step, self._example = step, None
        self._gradients = GradientVariance()

    def observe(
        self, rollout: Rollout, student: TokenDistribution, teacher: Distribution, weights: Tensor
    ) -> None:
        """Record a micro-batch's tokens, inside both models' forward passes.

        Args:
            rollout: The micro-batch.
            student: N positions.
            teacher: The same positions.
            weights: [N] token weights in [0, 1].
        """
        if not self._is_due:
            return
        table = token_table(student, teacher, rollout, weights > 0, self.k)
        self._records.update(table)
        if self._example is None and rollout.num_tokens:
            self._example = rollout, table

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the gradient that the micro-batch added."""
        if self._is_due:
            self._gradients.update(pl_module.student)

    @property
    def _is_due(self) -> bool:
        return self._records is not None and self._module.global_step == self._step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
    ) -> None:
        """Compute, log, draw and warn."""
        if self._records is None:
            return
        records, self._records = self._records.to(pl_module.device), None
        table = records.compute()
        if not len(table["token_id"]):
            return
        found = self._found(trainer, pl_module, table)
        values = {f"diagnostics/{key}": value for key, value in found["measures"].items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=found["step"])
        self._warn_of(found)
        self._stop_if_collapsed(trainer, found["measures"])
        if trainer.is_global_zero:
            self._write(trainer, pl_module, table, found)

    def _found(
        self, trainer: L.Trainer, pl_module: L.LightningModule, table: TokenTable
    ) -> dict[str, Any]:
        """Return what the JSON file of a measured step holds."""
        return {
            "step": self._step + 1,
            "measures": self._measures(trainer, table),
            "by_position": by_position(table, self.position_bucket or _bucket(table)),
            "offending_tokens": [
                entry | {"string": pl_module.tokenizer.decode([entry["token_id"]])}
                for entry in offending_tokens(table)
            ],
        }

    def _measures(self, trainer: L.Trainer, table: TokenTable) -> dict[str, float]:
        callback = find_rollout_callback(trainer)
        cut = callback is not None and (callback.sampling.top_p < 1 or callback.sampling.top_k > 0)
        return (
            imbalance(table)
            | unreliable_teacher(table)
            | token_mismatch(table, self._watched)
            | engine_mismatch(table, cut)
            | self._gradients.compute()
        )

    def _write(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        table: TokenTable,
        found: dict[str, Any],
    ) -> None:
        folder = pl_module.run_folder / "diagnostics"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{found['step']:06d}"
        write_whole(folder / f"{name}.json", json.dumps(found, indent=1))
        if self._example is not None:
            page = heat_map(*self._example, pl_module.tokenizer)
            write_whole(folder / f"{name}.html", page)
        self._undrawn = table, found
        if self._due(self.figures_every, self._step):
            self._draw(trainer, folder)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the last measurement."""
        folder = pl_module.run_folder / "diagnostics"
        if self.figures_every and self._undrawn is not None:
            self._draw(trainer, folder)

    def _due(self, every: int, step: int) -> bool:
        """Whether the round that begins after `step` updates holds the first of so many."""
        return every > 0 and -step % every < self._module.mini_batches

    def _draw(self, trainer: L.Trainer, folder: Path) -> None:
        (table, found), self._undrawn = self._undrawn, None
        step = found["step"]
        history = [json.loads(path.read_text()) for path in sorted(folder.glob("step_*.json"))]
        history = [entry for entry in history if entry["step"] <= step]
        drawn: dict[str, Figure] = {
            "sampled_tokens": figures.sampled_tokens(table),
            "positions": figures.positions(found["by_position"]),
            "offending_tokens": figures.offending(found["offending_tokens"]),
            "support": figures.support(history),
        }
        for title, figure in drawn.items():
            name = title if title == "support" else f"step_{step:06d}_{title}"
            figure.savefig(folder / f"{name}.png", dpi=110)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure(f"diagnostics/{title}", figure, step)

    def _warn_of(self, found: dict[str, Any]) -> None:
        """Warn of what crosses a threshold, with what to do."""
        for entry in found["offending_tokens"]:
            if entry["mismatched"] and entry["mismatched"] * 2 >= entry["count"]:
                self._warn(
                    f"mismatch {entry['token_id']}",
                    f"the teacher gives {entry['string']!r} (id {entry['token_id']}) "
                    f"{entry['teacher_logprob']:.1f} where the student gives "
                    f"{entry['student_logprob']:.1f} nats: the models spell or end differently. "
                    f"Add it to SpecialTokenMask: tokens: [{entry['token_id']}].",
                )
        values = found["measures"]
        if values["support/overlap"] < _LEAST_OVERLAP:
            self._warn(
                "overlap",
                f"only {values['support/overlap']:.0%} of the student's top {self.k} tokens are "
                f"among the teacher's (student's mass on the teacher's "
                f"{values['support/student_mass']:.2f}): the teacher knows little of what the "
                "student writes. Shorter completions, a teacher nearer to the student, or tail: "
                "bucket for a TopKReverseKL.",
            )
        if (
            values["repetition/longest_loop"] >= LOOP_TOKENS
            and values.get("repetition/advantage_inside", -1.0) > -0.05
        ):
            self._warn(
                "loop",
                f"completions loop (up to {values['repetition/longest_loop']:.0f} tokens) and the "
                f"teacher does not object (advantage {values['repetition/advantage_inside']:.2f} "
                "inside): this signal will not end them. Lower rollout.sampling.top_p or "
                "max_completion_length.",
            )
        if values["truncation/rows"] > _WORST_TRUNCATION:
            self._warn(
                "truncation",
                f"{values['truncation/rows']:.0%} of the completions were ended by the limit and "
                "teach no end. Raise rollout.sampling.max_completion_length, or leave them out by "
                "TruncatedRowWeight.",
            )

    def _stop_if_collapsed(self, trainer: L.Trainer, values: dict[str, float]) -> None:
        """Stop a run that has collapsed, on all ranks alike."""
        mass, repetition = values["support/student_mass"], values["repetition/ngrams"]
        collapsed = mass < _COLLAPSED_MASS or repetition > _COLLAPSED_REPETITION
        self._collapsed = self._collapsed + 1 if collapsed else 0
        if self.stop_on_collapse and self._collapsed >= self.stop_on_collapse:
            trainer.should_stop = True
            log.warning(
                "stopped at step %d: collapsed at %d measurements in a row (student's mass on the "
                "teacher's support %.2f, repeated 4-grams %.0f %%).",
                self._step + 1,
                self._collapsed,
                mass,
                100 * repetition,
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            if self._module.global_rank == 0:
                log.warning("step %d: %s", self._step + 1, text)


def _bucket(table: TokenTable) -> int:
    """Return an eighth of the longest completion, a power of two, at most 1024."""
    longest = int(table["position"].max()) + 1
    return min(1024, 2 ** max(0, math.ceil(math.log2(longest / 8))))


def _watched(tokenizer: Any, more: list[str | int]) -> dict[int, str]:
    ids = list(tokenizer.all_special_ids)
    for token in more:
        ids += (
            [token] if isinstance(token, int) else tokenizer.encode(token, add_special_tokens=False)
        )
    return {token_id: tokenizer.decode([token_id]) for token_id in dict.fromkeys(ids)}
