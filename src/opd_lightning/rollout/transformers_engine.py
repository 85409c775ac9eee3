"""The embedded engine: transformers' models and key-value cache, one token of all rows at a time.

R rows still running, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache, StopStringCriteria

from opd_lightning.errors import ConfigError
from opd_lightning.policy import CausalPolicy
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.rollout.engine import RolloutEngine
from opd_lightning.rollout.sampling import SamplingConfig, sample, uniforms


class TransformersEngine(RolloutEngine):
    """Decodes with the student's own weights in the training process.

    Rows leave the batch when they end (an end token of the generation config, a stop string, the
    limit), so that a few long completions do not drag the finished ones along. An end token belongs
    to its completion. No scores are kept beyond the step that drew from them.

    Args:
        max_rows: Rows decoded at once; default all of them.

    Raises:
        ConfigError: If `max_rows` < 1.
    """

    def __init__(self, max_rows: int | None = None) -> None:
        if max_rows is not None and max_rows < 1:
            raise ConfigError(
                f"max_rows must be at least 1 or left out (all rows); got {max_rows}."
            )
        self.max_rows = max_rows

    @torch.no_grad()
    def generate(
        self, policy: CausalPolicy, prompts: PromptBatch, sampling: SamplingConfig, seed: int
    ) -> Rollout:
        """Return the completions with their sampling log-probabilities; see `RolloutEngine`."""
        prompt_ids = prompts.unpadded()
        rows = [(p, g) for p in range(len(prompt_ids)) for g in range(sampling.num_generations)]
        drawn = [_Completion() for _ in rows]
        # prompts of like length together: less padding on the left
        order = sorted(range(len(rows)), key=lambda i: len(prompt_ids[rows[i][0]]))
        batch = self.max_rows or max(1, len(rows))
        with _generating(policy):
            for start in range(0, len(rows), batch):
                part = order[start : start + batch]
                numbers = torch.stack(
                    [
                        uniforms(seed, prompt_ids[p], g, sampling.max_completion_length)
                        for p, g in (rows[i] for i in part)
                    ]
                )
                completions = _decode(
                    policy, [prompt_ids[rows[i][0]] for i in part], sampling, numbers
                )
                for i, completion in zip(part, completions, strict=True):
                    drawn[i] = completion
        return Rollout.from_completions(
            prompts,
            [c.token_ids for c in drawn],
            truncated=[c.truncated for c in drawn],
            sampling_logprobs=[c.logprobs for c in drawn],
        )


class _Completion:
    """What was drawn for one row so far."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.truncated = True


@contextmanager
def _generating(policy: CausalPolicy) -> Iterator[None]:
    """Switch off dropout, gradient checkpointing (it forbids a cache) and compiled code."""
    training = policy.training
    checkpointing = policy.model.is_gradient_checkpointing
    policy.eval()
    if checkpointing:
        policy.model.gradient_checkpointing_disable()
    try:
        # each new length of the cache would compile again
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        policy.train(training)
        if checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})


def _decode(
    policy: CausalPolicy,
    prompt_ids: list[list[int]],
    sampling: SamplingConfig,
    numbers: Tensor,
) -> list[_Completion]:
    """Draw one completion for each prompt; `numbers` [R, max_completion_length] decide them."""
    device = policy.device
    completions = [_Completion() for _ in prompt_ids]
    ends = _end_check(policy, sampling)
    ids, mask = _pad_left(prompt_ids, device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=policy.model.config)
    running = torch.arange(len(prompt_ids))
    completed = ids[:, :0]
    numbers = numbers.to(device)
    for step in range(sampling.max_completion_length):
        logits = policy.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1, : policy.vocab_size]
        tokens, logprobs = sample(logits, numbers[running.to(device), step], sampling)
        completed = torch.cat([completed, tokens[:, None]], dim=1)
        ended = ends(completed, tokens)
        _record(completions, running.tolist(), tokens, logprobs, ended)
        if bool(ended.all()):
            break
        if bool(ended.any()):
            keep = (~ended).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            running = running[keep.cpu()]
            tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
            completed = completed[keep]
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return completions


def _record(
    completions: list[_Completion],
    rows: list[int],
    tokens: Tensor,
    logprobs: Tensor,
    ended: Tensor,
) -> None:
    for row, token, logprob, end in zip(
        rows, tokens.tolist(), logprobs.tolist(), ended.tolist(), strict=True
    ):
        completions[row].token_ids.append(token)
        completions[row].logprobs.append(logprob)
        completions[row].truncated = not end


def _pad_left(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _end_check(
    policy: CausalPolicy, sampling: SamplingConfig
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return f(completions [R, L], newest tokens [R]) -> [R] bool, whether each has ended.

    Raises:
        ConfigError: If stop strings are set and the policy has no tokenizer.
    """
    eos = torch.tensor(policy.eos_token_ids, dtype=torch.long, device=policy.device)
    if not sampling.stop:
        return lambda completed, tokens: torch.isin(tokens, eos)
    if policy.tokenizer is None:
        raise ConfigError(
            f"stop strings {sampling.stop} need a tokenizer; give one to CausalPolicy, or leave "
            "stop empty."
        )
    stops = StopStringCriteria(policy.tokenizer, sampling.stop)
    return lambda completed, tokens: torch.isin(tokens, eos) | stops(completed, None)
