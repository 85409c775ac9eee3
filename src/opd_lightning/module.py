"""OPDModule: student and frozen teacher, and a training step that is a list of named calls.

B rows of a rollout, N completion tokens of a micro-batch.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from opd_lightning import checks, memory
from opd_lightning.checkpoints import AnyCheckpointIO
from opd_lightning.distributions import Distribution, TokenDistribution
from opd_lightning.errors import ConfigError
from opd_lightning.metrics import StepClock, TokenMeans, completion_measures, on_policy_measures
from opd_lightning.objectives import Objective, ObjectiveOutput
from opd_lightning.policy import (
    CausalPolicy,
    PolicySpec,
    Tokenizer,
    as_spec,
    export_policy,
    one_row_at_least,
)
from opd_lightning.predictions import prediction_records
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.sharding import Sharding, load_policy
from opd_lightning.teachers import LocalTeacher, Teacher, shared_vocabulary
from opd_lightning.updates import Update, micro_batch_rows, plan_updates
from opd_lightning.weighting import (
    Reduction,
    ReductionName,
    TokenWeight,
    UpdateSize,
    combined_weight,
)

log = logging.getLogger("opd_lightning")

# Where no data module says how many rows an update has, "auto" looks no further than for this many.
_ROWS_WHERE_UNKNOWN = 64
PairReader = Callable[[TokenDistribution, Distribution], Any]
_ADAMW = partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0)


class OPDModule(L.LightningModule):
    """On-policy distillation of `student` towards `teacher` by `objective`.

    One batch is a round of prompts that a RolloutCallback has answered (or a dataset's own
    completions). Optimisation is manual, because the loss is divided by the token count of the
    whole update, over micro-batches and ranks: how an update is split changes nothing.

    Args:
        student: What is trained: a PolicySpec, or a folder or hub name.
        teacher: What is imitated: a Teacher, or a folder or hub name for a LocalTeacher.
        objective: The per-token loss.
        weights: Token weights; they multiply.
        reduction: How token losses become one number: a name, or a Reduction with its horizon.
        optimizer: Torch optimiser, called with the student's parameters.
        lr_scheduler: Torch scheduler, called with the optimiser; stepped once an update.
        max_grad_norm: Gradients are clipped to this norm; None: not clipped.
        mini_batches: Optimiser steps on one rollout.
        micro_batch_tokens: Largest rows x padded length of one forward and backward; None: an
            update is one micro-batch; "auto": the most that fits `memory_limit_gb`, found before
            the first step by a few forward and backward passes.
        memory_limit_gb: Of each process, in 10^9 bytes, for "auto"; None: 90 % of a GPU's memory,
            on a CPU what is held at the start and half of what is free.
        temperature: Divides student and teacher logits; None: that of the rollouts.
        metrics_every: Optimiser steps between measures over the whole vocabulary (reverse KL,
            entropies), which cost one more pass of both heads; 0: never.

    Raises:
        ConfigError: If a number is out of its range.
    """

    def __init__(
        self,
        student: PolicySpec | str,
        teacher: Teacher | str,
        objective: Objective,
        weights: Sequence[TokenWeight] = (),
        reduction: ReductionName | Reduction = "token-mean",
        optimizer: OptimizerCallable = _ADAMW,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        mini_batches: int = 1,
        micro_batch_tokens: int | Literal["auto"] | None = None,
        memory_limit_gb: float | None = None,
        temperature: float | None = None,
        metrics_every: int = 1,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        auto = micro_batch_tokens == "auto"
        if isinstance(micro_batch_tokens, str) and not auto:
            raise ConfigError(
                f"micro_batch_tokens must be a number, None or 'auto'; got {micro_batch_tokens!r}."
            )
        for name, value, least in [
            ("mini_batches", mini_batches, 1),
            ("micro_batch_tokens", None if auto else micro_batch_tokens, 1),
            ("metrics_every", metrics_every, 0),
            ("max_grad_norm", max_grad_norm, 0),
        ]:
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}; got {value}.")
        if memory_limit_gb is not None and not (auto and memory_limit_gb > 0):
            raise ConfigError(
                f"memory_limit_gb={memory_limit_gb} with micro_batch_tokens={micro_batch_tokens}: "
                "a limit is above 0 and goes with micro_batch_tokens: auto. Set both or neither."
            )
        self.student_spec = as_spec(student)
        # no nn.Module of the teacher may be registered here: it stays out of optimiser, checkpoint
        self.teacher = teacher if isinstance(teacher, Teacher) else LocalTeacher(str(teacher))
        self.objective = objective
        self.token_weights = list(weights)
        self.reduction = reduction if isinstance(reduction, Reduction) else Reduction(reduction)
        self.optimizer_factory = optimizer
        self.lr_scheduler_factory = lr_scheduler
        self.max_grad_norm = max_grad_norm
        self.mini_batches = mini_batches
        self.micro_batch_tokens = None if auto else micro_batch_tokens
        self.auto_micro_batch = auto
        self.memory_limit_gb = memory_limit_gb
        self.temperature = temperature
        self.metrics_every = metrics_every
        self.student: CausalPolicy | None = None
        self._tokenizer: Tokenizer | None = None
        self._shared_vocabulary: int | None = None
        self._evaluation = TokenMeans()
        self._run_folder: Path | None = None
        # each is shown what an update reads: `observe(rollout, student, teacher, weights)`
        self.observers: list[Any] = []

    # ------------------------------------------------------------------------------- set-up

    @property
    def tokenizer(self) -> Tokenizer:
        """The student's tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = self.student_spec.load_tokenizer()
        return self._tokenizer

    @property
    def context_length(self) -> int | None:
        """Tokens that the student can take, None where its config does not say."""
        config = self.student_spec.load_config().get_text_config()
        return getattr(config, "max_position_embeddings", None)

    def setup(self, stage: str) -> None:
        """Refuse what cannot work, before any weights are loaded."""
        self._run_folder = _log_folder(self.trainer)
        self.student_spec.check()
        self.teacher.check()
        size = self.student_spec.load_config().get_text_config().vocab_size
        teacher_tokenizer = self.teacher.load_tokenizer()
        if teacher_tokenizer is not None:
            sizes = size, self.teacher.vocab_size()
            size = shared_vocabulary(self.tokenizer, teacher_tokenizer, *sizes)
        self._shared_vocabulary = size
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AnyCheckpointIO()
        checks.check_strategy(self.trainer.strategy)
        checks.check_objective(self.objective, self.teacher, size)
        checks.check_precision(self.trainer.precision)
        callback = checks.find_rollout_callback(self.trainer)
        sampling = None if callback is None else callback.sampling
        data = self.trainer.datamodule
        if stage == "fit":
            checks.check_rollouts(self.objective, sampling, getattr(data, "has_completions", None))
            prompts = getattr(data, "prompts_per_step", None)
            checks.check_mini_batches(self.mini_batches, prompts, sampling, self.trainer.world_size)
        checks.check_lengths(getattr(data, "longest_prompt", None), sampling, self.context_length)
        if self.temperature is None:
            self.temperature = 1.0 if sampling is None else sampling.temperature
        for weight in self.token_weights:
            weight.setup(self.tokenizer)

    def configure_model(self) -> None:
        """Load student and teacher; a second call does nothing."""
        if self.student is None:
            self.student = load_policy(
                self.student_spec,
                self.device if self._trainer is None else self.trainer.strategy.root_device,
                self.sharding,
                self.tokenizer,
                self._shared_vocabulary,
            )
        self._place_teacher()

    @property
    def sharding(self) -> Sharding | None:
        """How student and teacher are sharded; None where each process holds all of them."""
        return None if self._trainer is None else getattr(self.trainer.strategy, "sharding", None)

    def on_fit_start(self) -> None:
        """Place the teacher; find the micro-batch budget where it is "auto".

        A resumed run keeps the budget that its checkpoint has for the same limit: other
        micro-batches would round differently.
        """
        self._place_teacher()
        if self.auto_micro_batch and self.micro_batch_tokens is None:
            self.micro_batch_tokens = self._largest_budget()

    def _place_teacher(self) -> None:
        """Move the teacher to the device; it is no submodule, so Lightning leaves it alone."""
        self.teacher.load(self.device, self._shared_vocabulary, self.sharding)

    on_validation_start = on_test_start = on_predict_start = _place_teacher

    def configure_optimizers(self) -> Any:
        """Build the optimiser over the student alone, and its schedule."""
        trained = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = self.optimizer_factory(trained)
        if self.lr_scheduler_factory is None:
            return optimizer
        scheduler = self.lr_scheduler_factory(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ConfigError(
                "lr_scheduler ReduceLROnPlateau waits for a metric, but schedules are stepped once "
                "an update. Take one that counts steps, such as LinearLR or CosineAnnealingLR."
            )
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    # ----------------------------------------------------------------------------- training

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Train on one round: one or more updates, each of one or more micro-batches."""
        clock = StepClock(self.device)
        clock.add("rollout", batch.rollout_seconds)
        for update in self.plan_updates(_answered(batch)):
            if self.global_step == self.trainer.max_steps:
                break
            means = TokenMeans()
            for rollout in update.micro_batches:
                # teacher.read( student.read( weights, objective ) )
                output = self.read_both(rollout, partial(self._loss, rollout, update, means), clock)
                checks.stop_on_non_finite(rollout, output, self.tokenizer, self.run_folder)
                # ranks average their gradients; each loss is a share of the global mean
                self.manual_backward(output.loss * self.trainer.world_size)
                clock.lap("student")
            stepped = self._optimizer_step(update)
            clock.lap("optimizer")
            values = self.objective.finish_metrics(means.compute()) | stepped
            self._log_update(update, values, clock.take())

    def plan_updates(self, rollout: Rollout) -> list[Update]:
        """Split a round into updates, with the token counts of all ranks known beforehand."""

        def all_gather(table: Tensor) -> Tensor:
            return self.all_gather(table).view(-1, *table.shape)

        rollout = self._with_old_logprobs(rollout)
        return plan_updates(
            rollout, self.mini_batches, self.micro_batch_tokens, all_gather, self.student.packed
        )

    def _largest_budget(self) -> int:
        """Return the most tokens of a micro-batch that fit the memory limit, the same on all ranks.

        Raises:
            ConfigError: If the longest possible row is not known or does not fit.
        """
        data, callback = self.trainer.datamodule, checks.find_rollout_callback(self.trainer)
        sampling = None if callback is None else callback.sampling
        longest = self._longest_row(data, sampling)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        later = memory.optimizer_bytes(self.optimizer_factory, trained)
        if self.trainer.world_size > 1:
            later += memory.parameter_bytes(trained)  # the buckets in which gradients are averaged
        limit = memory.memory_limit(self.device, self.memory_limit_gb, self.trainer.num_devices)
        limit = -self._largest_of_ranks(-limit)
        rows = _ROWS_WHERE_UNKNOWN
        if (prompts := getattr(data, "prompts_per_step", None)) is not None:
            generations = 1 if sampling is None else sampling.num_generations
            rows = prompts * generations // self.trainer.world_size // self.mini_batches
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            budget = memory.largest_budget(self._peak_of, longest, limit, later, rows)
        self.student.zero_grad()
        log.info(
            "micro_batch_tokens: auto -> %d (rows of up to %d tokens, limit %.2f GB a process)",
            budget,
            longest,
            limit / 1e9,
        )
        return budget

    def _peak_of(self, rows: int, length: int) -> int:
        """Return the peak in bytes, over all ranks, of the first two micro-batches of an update.

        The gradients of an earlier call are dropped first, as after an optimiser step.
        """
        rollout = memory.full_rows(rows, length, self._shared_vocabulary, self.device)
        size = UpdateSize(rollout.num_tokens, rows, length - 1)
        update = Update([rollout], size, padding_fraction=0.0)

        def loss(student: TokenDistribution, teacher: Distribution) -> Tensor:
            output = self._loss(rollout, update, TokenMeans(), student, teacher)
            if self.metrics_every:
                on_policy_measures(student, teacher, rollout)
            return output.loss

        def run() -> None:
            self.student.zero_grad()
            for _ in range(2):
                with self.trainer.precision_plugin.train_step_context():
                    value = self.read_both(rollout, loss)
                value.backward()

        return self._largest_of_ranks(memory.peak_bytes(self.device, run))

    def _longest_row(self, data: Any, sampling: Any) -> int:
        """Return the tokens of the longest prompt with its completion that training can meet."""
        if sampling is not None and (prompt := getattr(data, "longest_prompt", None)) is not None:
            return prompt + sampling.max_completion_length
        if getattr(data, "has_completions", None):
            prompts = data.tables["train"].prompts
            return max(len(p.prompt_ids) + len(p.completion_ids) for p in prompts)
        if self.context_length is None:
            raise ConfigError(
                "micro_batch_tokens: auto needs the longest row that can come, but neither the "
                "data nor the student's config says it. Give a number of tokens."
            )
        return self.context_length

    def _largest_of_ranks(self, value: int) -> int:
        return int(self.all_gather(torch.tensor(value, device=self.device)).max())

    def read_both(
        self, rollout: Rollout, reader: PairReader, clock: StepClock | None = None
    ) -> Any:
        """Return `reader(student, teacher)`, called inside both models' forward passes.

        The reads nest, teacher outside: under sharding a head is whole only inside its own forward.
        """

        answers = []

        def with_teacher(teacher: Distribution) -> None:
            if clock is not None:
                clock.lap("teacher")
            # not returned through the teacher's read: if that is sharded, a loss that it sees makes
            # it gather its weights in the student's backward pass
            answers.append(
                self.student.read(
                    rollout, lambda student: reader(student, teacher), self.temperature
                )
            )

        self.teacher.read(rollout, with_teacher, self.temperature)
        return answers[0]

    def _loss(
        self,
        rollout: Rollout,
        update: Update,
        means: TokenMeans,
        student: TokenDistribution,
        teacher: Distribution,
    ) -> ObjectiveOutput:
        """Return this micro-batch's share of the update's loss; add what it shows to `means`."""
        mask = combined_weight(self.token_weights, rollout, student, teacher)
        weights = mask * self.reduction.scale(rollout, update.size)
        output = self.objective(student, teacher, rollout, weights)
        for observer in self.observers:
            observer.observe(rollout, student, teacher, mask)
        measures = output.metrics
        if self.metrics_every and (self.global_step + 1) % self.metrics_every == 0:
            measures = measures | on_policy_measures(student, teacher, rollout)
        means.update(measures, keep=mask > 0)
        means.update({"weights/masked_frac": (mask == 0).float()})
        means.update(completion_measures(rollout), keep=rollout.completion_lengths > 0)
        means.add("loss", output.loss.detach())
        return output

    def _with_old_logprobs(self, rollout: Rollout) -> Rollout:
        """Record the student's log-probabilities where several updates will need them."""
        if self.mini_batches == 1 or not getattr(self.objective, "uses_old_logprobs", False):
            return rollout
        old = torch.zeros(rollout.input_ids.shape, device=self.device)
        parts = micro_batch_rows(rollout, self.micro_batch_tokens)
        # sharded weights are gathered by all ranks: those with fewer parts read empty ones
        most = self._largest_of_ranks(len(parts))
        parts += [torch.arange(0)] * (most - len(parts))
        with torch.no_grad():
            for rows in parts:
                part = rollout.select_rows(rows)
                logprobs = self.student.read(
                    part, lambda student, part=part: student.logprobs(part.token_ids),
                    self.temperature,
                )  # fmt: skip
                columns = part.completion_mask.nonzero()[:, 1]
                old = old.to(logprobs.dtype)
                old[rows.to(self.device)[part.row], columns] = logprobs
        return replace(rollout, old_logprobs=old)

    def _optimizer_step(self, update: Update) -> dict[str, float]:
        """Clip, step, step the schedule; return the norm before clipping and the rate used."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), limit)
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        checks.stop_on_non_finite_gradient(grad_norm, update.micro_batches, self.run_folder)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        return {"grad_norm": grad_norm, "lr": rate}

    # --------------------------------------------------------------------------- evaluation

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Add the batch's completions to the held-out measures."""
        rollout = _answered(batch)
        read = one_row_at_least(rollout)
        measures = self.read_both(
            read, lambda student, teacher: on_policy_measures(student, teacher, read)
        )
        self._evaluation.update(measures)
        self._evaluation.update(completion_measures(rollout))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the held-out measures, at step 0 before training too."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the held-out measures."""
        self._log_evaluation("test")

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return one record a completion, with student and teacher log-probabilities a token."""
        rollout = _answered(batch)
        read = one_row_at_least(rollout)
        ids = read.token_ids
        student, teacher = self.read_both(
            read, lambda student, teacher: (student.logprobs(ids), teacher.logprobs(ids))
        )
        if rollout.num_rows == 0:
            return []
        return prediction_records(batch, self.tokenizer, student, teacher)

    # --------------------------------------------------------------------- logging, results

    @property
    def run_folder(self) -> Path:
        """Where the run's files go; since `setup` a rank may ask for it alone."""
        return self._run_folder or _log_folder(self.trainer)

    def export(self, folder: str | Path) -> None:
        """Write the student as a Hugging Face folder, with its tokenizer."""
        export_policy(self.student, self.tokenizer, Path(folder))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `opd export` needs to build the student around its weights."""
        checkpoint["opd_lightning"] = {
            "student_path": self.student_spec.path,
            "student_config": self.student.model.config.to_json_string(use_diff=False),
            "micro_batch_tokens": self.micro_batch_tokens,
            "memory_limit_gb": self.memory_limit_gb,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the micro-batch budget that was found."""
        saved = checkpoint.get("opd_lightning", {})
        if self.auto_micro_batch and saved.get("memory_limit_gb") == self.memory_limit_gb:
            self.micro_batch_tokens = saved.get("micro_batch_tokens")

    def _log_update(
        self, update: Update, values: dict[str, float], seconds: dict[str, float]
    ) -> None:
        """Log one optimiser step; the progress bar gets the few that matter."""
        step, total = self.global_step, sum(seconds.values())
        values = values | {
            "completions/tokens": update.size.num_tokens,
            "perf/padding_fraction": update.padding_fraction,
            "perf/step_seconds": total,
            "perf/tokens_per_second": update.size.num_tokens / total,
            **{f"perf/{name}_seconds": value for name, value in seconds.items()},
        }
        if self.auto_micro_batch:
            values["perf/micro_batch_tokens"] = self.micro_batch_tokens
        if step % self.trainer.log_every_n_steps == 0:
            self._log(values, step)
        shown = ["loss", "kl/reverse", "perf/tokens_per_second"]
        shown += [key for key in values if key.startswith("perf/") and key.endswith("_seconds")]
        shown = {key: values[key] for key in shown if key in values}
        self.log_dict(shown, prog_bar=True, logger=False, batch_size=1)

    def _log_evaluation(self, prefix: str) -> None:
        values = {f"{prefix}/{key}": value for key, value in self._evaluation.compute().items()}
        fitting = self.trainer.state.fn == "fit"
        if fitting:
            self._log(values, self.global_step)
        elif values:
            # Lightning writes, prints and returns them, under the step that stands among them
            values["step"] = float(self.global_step)
        self.log_dict(values, logger=not fitting, batch_size=1)

    def _log(self, values: dict[str, float], step: int) -> None:
        """Write to all loggers with the number of optimiser steps as the step.

        `self.log` counts batches, which are several updates each where mini_batches > 1.
        """
        for logger in self.loggers:
            logger.log_metrics(values, step=step)


def _log_folder(trainer: L.Trainer) -> Path:
    """Return where a trainer's logs go; Lightning asks the first rank, so all have to call it."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def _answered(batch: PromptBatch) -> Rollout:
    """Return the batch's rollout.

    Raises:
        ConfigError: If neither a RolloutCallback nor the dataset gave one.
    """
    if batch.rollout is None:
        raise ConfigError(checks.no_completions())
    return batch.rollout
