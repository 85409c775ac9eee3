"""What is refused before a run and what stops one."""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from opd_lightning.errors import ConfigError, RunError
from opd_lightning.objectives import Objective, ObjectiveOutput
from opd_lightning.records import Rollout
from opd_lightning.rollout import SamplingConfig
from opd_lightning.rollout.callback import find_rollout_callback
from opd_lightning.teachers import Teacher

__all__ = ["find_rollout_callback"]  # for module.py, which has no arrow to the rollouts

log = logging.getLogger("opd_lightning")

_GIVES = {"sampled": 0, "topk": 1, "full": 2}
_TOKENS_SHOWN = 5


def check_objective(objective: Objective, teacher: Teacher, vocab_size: int) -> None:
    """Refuse an objective that needs more of the teacher than it gives; warn of a clamped k.

    Raises:
        ConfigError: If the pairing cannot work.
    """
    if _GIVES[objective.needs] > _GIVES[teacher.provides]:
        raise ConfigError(
            f"{objective.describe()} needs {objective.needs!r} of the teacher, but "
            f"{type(teacher).__name__} gives {teacher.provides!r}. Take an objective that needs no "
            "more (TopKReverseKL on the teacher's support, SampledTokenReverseKL), or a "
            "LocalTeacher, which gives the full vocabulary."
        )
    k = getattr(objective, "k", None)
    if isinstance(k, int) and k > vocab_size:
        log.warning("k=%d is above the vocabulary of %d tokens: all of it is used", k, vocab_size)


def check_rollouts(
    objective: Objective, sampling: SamplingConfig | None, has_completions: bool | None
) -> None:
    """Refuse a run without completions; warn of sampling that biases the objective.

    Args:
        objective: The loss.
        sampling: Of the RolloutCallback, None where there is none.
        has_completions: Whether the dataset has its own; None where that is not known yet.

    Raises:
        ConfigError: If nothing would provide completions.
    """
    if sampling is None:
        if has_completions is False:
            raise ConfigError(no_completions())
        return
    if objective.on_policy_estimator and (sampling.top_p < 1 or sampling.top_k > 0):
        log.warning(
            "%s with top_p=%s, top_k=%s is biased: its gradient is right in expectation over the "
            "full distribution, and tokens outside the nucleus are never sampled. "
            "Set top_p=1 and top_k=0, or take an objective that compares distributions "
            "(TopKReverseKL, ReverseKL).",
            objective.describe(),
            sampling.top_p,
            sampling.top_k,
        )


def check_mini_batches(
    mini_batches: int, prompts_per_step: int | None, sampling: SamplingConfig | None, ranks: int
) -> None:
    """Refuse a number of updates that does not divide a round's completions.

    Raises:
        ConfigError: If it does not.
    """
    if prompts_per_step is None:
        return
    generations = 1 if sampling is None else sampling.num_generations
    rows = prompts_per_step * generations // ranks
    if rows % mini_batches:
        raise ConfigError(
            f"model.mini_batches={mini_batches} must divide the {rows} completions that each rank "
            f"has in a round (data.prompts_per_step={prompts_per_step} * num_generations="
            f"{generations} / {ranks} ranks). Change one of them."
        )


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy under which results would be wrong, or that shards by other means.

    Raises:
        ConfigError: If it is neither on one device, nor DDP, nor FSDP2Strategy.
    """
    sharded = getattr(strategy, "sharding", None) is not None
    if not (sharded or isinstance(strategy, SingleDeviceStrategy | DDPStrategy)):
        raise ConfigError(
            f"trainer.strategy {type(strategy).__name__} is not supported. Take auto (one device), "
            "ddp, or opd_lightning.FSDP2Strategy, which shards student and teacher."
        )


def check_precision(precision: str) -> None:
    """Refuse fp16 autocast, which would need loss scaling.

    Raises:
        ConfigError: If `precision` is "16-mixed".
    """
    if precision == "16-mixed":
        raise ConfigError(
            "trainer.precision '16-mixed' is not supported: manual optimisation would need loss "
            "scaling. Take 'bf16-mixed', or '32-true'."
        )


def check_lengths(
    longest_prompt: int | None, sampling: SamplingConfig | None, context_length: int | None
) -> None:
    """Refuse rollouts that would run past the student's context.

    Raises:
        ConfigError: If the longest prompt and the completion limit do not fit together.
    """
    if sampling is None or longest_prompt is None or context_length is None:
        return
    total = longest_prompt + sampling.max_completion_length
    if total > context_length:
        raise ConfigError(
            f"the longest prompt ({longest_prompt} tokens) and max_completion_length="
            f"{sampling.max_completion_length} make {total} tokens; the student's context is "
            f"{context_length}. Lower max_completion_length or data.max_prompt_tokens."
        )


def no_completions() -> str:
    """Return the message for a run in which nothing provides completions."""
    return (
        "there are no completions to train on: no RolloutCallback among the callbacks (value: "
        "None) and no column `completion` in the data. Add a RolloutCallback (on-policy; in YAML "
        "`rollout:`), or completions to the dataset (off-policy)."
    )


def stop_on_non_finite(
    rollout: Rollout, output: ObjectiveOutput, tokenizer: Any, folder: Path
) -> None:
    """Stop a run whose loss is not finite, before it reaches the weights.

    Args:
        rollout: The micro-batch.
        output: What the objective made of it.
        tokenizer: Spells the tokens that the message names.
        folder: Receives `non_finite_rollout.pt`.

    Raises:
        RunError: If the loss is NaN or infinite; names rows and tokens and the saved file.
    """
    if bool(torch.isfinite(output.loss)):
        return
    path = save_rollouts([rollout], folder)
    bad = (~torch.isfinite(output.token_loss)).nonzero()[:, 0]
    shown = [
        f"row {int(rollout.row[n])} position {int(rollout.position[n])} "
        f"{tokenizer.decode([int(rollout.token_ids[n])])!r} ({float(output.token_loss[n])})"
        for n in bad[:_TOKENS_SHOWN]
    ]
    loss = float(output.loss.detach())
    raise RunError(
        f"the loss is {loss} at {len(bad)} of {len(output.token_loss)} tokens: "
        f"{'; '.join(shown) or 'no single token, their sum'}. The rollout is saved in {path}; the "
        "weights and the last checkpoint are as they were. Mask those tokens (SpecialTokenMask) or "
        "bound the loss (log_ratio_clamp, TopKReverseKL)."
    )


def stop_on_non_finite_gradient(
    grad_norm: float, micro_batches: list[Rollout], folder: Path
) -> None:
    """Stop a run whose gradient is not finite, before the optimiser sees it.

    Args:
        grad_norm: Of the update.
        micro_batches: All of the update.
        folder: Receives `non_finite_rollout.pt`.

    Raises:
        RunError: If the norm is NaN or infinite; names the saved file.
    """
    if grad_norm == grad_norm and grad_norm != float("inf"):
        return
    raise RunError(
        f"the gradient's norm is {grad_norm} although the loss is finite. The rollout is saved in "
        f"{save_rollouts(micro_batches, folder)}; the weights and the last checkpoint are as they "
        "were. Lower the learning rate, or train in float32 or bf16 instead of fp16."
    )


def save_rollouts(micro_batches: list[Rollout], folder: Path) -> Path:
    """Write the fields of each to `non_finite_rollout.pt` in `folder`, and return the path.

    `Rollout(**fields)` makes one again: `torch.load(path, weights_only=True)` is a list of fields.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "non_finite_rollout.pt"
    fields = [vars(rollout.to("cpu")) for rollout in micro_batches]
    torch.save([{k: v for k, v in one.items() if v is not None} for one in fields], path)
    return path
