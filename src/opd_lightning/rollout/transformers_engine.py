"""The embedded engine: transformers' models and key-value cache, one token of all rows at a time.

P prompts, R rows still running, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, StopStringCriteria

from opd_lightning.errors import ConfigError
from opd_lightning.policy import CausalPolicy
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.rollout.cache import can_join, join_caches
from opd_lightning.rollout.engine import RolloutEngine
from opd_lightning.rollout.packing import packed_linears
from opd_lightning.rollout.sampling import SamplingConfig, sample, uniforms
from opd_lightning.sharding import gathered

# A further forward call reads the weights again, which costs as much as this many prompt tokens
# (40 M parameters on a CPU: 25 ms a call, 0.7 ms a token): padding above it is not computed.
_PADDING_TOKENS = 64
# Tokens of one forward call over prompts, padding included: bounds its activations.
_PREFILL_TOKENS = 16_384


class TransformersEngine(RolloutEngine):
    """Decodes with the student's own weights in the training process.

    Each prompt is read once, together with others of like length, and its cache rows are copied for
    the siblings. Rows leave the batch when they end (an end token of the generation config, a stop
    string, the limit), so that a few long completions do not drag the finished ones along. An end
    token belongs to its completion. No scores are kept beyond the step that drew from them.

    Args:
        max_rows: Rows decoded at once; default all of them.
        logprobs: Return the sampling log-probabilities.
        pack_weights: Decode on packed copies of the linear layers' weights, where they are fp32 on
            a CPU (see `packed_linears`): faster, for as much memory again as the weights.

    Raises:
        ConfigError: If `max_rows` < 1.
    """

    def __init__(
        self, max_rows: int | None = None, logprobs: bool = True, pack_weights: bool = True
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise ConfigError(
                f"max_rows must be at least 1 or left out (all rows); got {max_rows}."
            )
        self.max_rows = max_rows
        self.logprobs = logprobs
        self.pack_weights = pack_weights

    @torch.no_grad()
    def generate(
        self, policy: CausalPolicy, prompts: PromptBatch, sampling: SamplingConfig, seed: int
    ) -> Rollout:
        """Return the completions with their sampling log-probabilities; see `RolloutEngine`."""
        prompt_ids = prompts.unpadded()
        rows = [(p, g) for p in range(len(prompt_ids)) for g in range(sampling.num_generations)]
        drawn: list[_Completion | None] = [None] * len(rows)
        # prompts of like length together: less padding on the left; siblings stay neighbours
        order = sorted(range(len(rows)), key=lambda i: len(prompt_ids[rows[i][0]]))
        batch = self.max_rows or max(1, len(rows))
        packed = packed_linears(policy.model) if self.pack_weights else nullcontext()
        with _generating(policy), gathered(policy), packed:
            for start in range(0, len(rows), batch):
                part = order[start : start + batch]
                completions = self._decode(
                    policy, prompt_ids, [rows[i] for i in part], sampling, seed
                )
                for i, completion in zip(part, completions, strict=True):
                    drawn[i] = completion
        return Rollout.from_completions(
            prompts,
            [c.token_ids for c in drawn],
            truncated=[c.truncated for c in drawn],
            sampling_logprobs=[c.logprobs for c in drawn] if self.logprobs else None,
        )

    def _decode(
        self,
        policy: CausalPolicy,
        prompt_ids: list[list[int]],
        rows: list[tuple[int, int]],
        sampling: SamplingConfig,
        seed: int,
    ) -> list["_Completion"]:
        """Draw one completion for each pair (prompt, number of the completion) of `rows`."""
        device, limit = policy.device, sampling.max_completion_length
        numbers = torch.stack([uniforms(seed, prompt_ids[p], g, limit) for p, g in rows]).to(device)
        ends = _end_check(policy, sampling)
        tokens_of = torch.zeros(len(rows), limit, dtype=torch.long, device=device)
        logprobs_of = torch.zeros(len(rows), limit, device=device) if self.logprobs else None
        lengths, ended_itself = [limit] * len(rows), [False] * len(rows)

        logits, cache, mask = _read_prompts(policy, prompt_ids, [p for p, _ in rows])
        positions = mask.sum(1, keepdim=True)
        slots = list(range(len(rows)))  # the row that each row of the cache belongs to
        running = torch.arange(len(rows), device=device)
        for step in range(limit):
            tokens, logprobs = sample(logits, numbers[running, step], sampling, self.logprobs)
            tokens_of[running, step] = tokens
            if logprobs_of is not None:
                logprobs_of[running, step] = logprobs
            completed = tokens_of[running, : step + 1] if sampling.stop else tokens[:, None]
            ended = ends(completed, tokens).tolist()
            for row, end in zip(slots, ended, strict=True):
                if end:
                    lengths[row], ended_itself[row] = step + 1, True
            if all(ended) or step + 1 == limit:
                break
            if any(ended):
                keep = _close_ranks(ended)
                slots = [slots[i] for i in keep]
                kept = torch.tensor(keep, device=device)
                cache.batch_select_indices(kept)
                running, tokens = running[kept], tokens[kept]
                mask, positions = mask[kept], positions[kept]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = _forward(policy, tokens[:, None], mask, positions, cache)
            positions = positions + 1
        return _completions(tokens_of, logprobs_of, lengths, ended_itself)


@dataclass
class _Completion:
    token_ids: list[int]
    logprobs: list[float] | None
    truncated: bool


def _completions(
    tokens: Tensor, logprobs: Tensor | None, lengths: list[int], ended: list[bool]
) -> list[_Completion]:
    width = max(lengths, default=0)
    ids = tokens[:, :width].tolist()
    values = [None] * len(ids) if logprobs is None else logprobs[:, :width].tolist()
    return [
        _Completion(i[:n], None if v is None else v[:n], truncated=not end)
        for i, v, n, end in zip(ids, values, lengths, ended, strict=True)
    ]


def _close_ranks(ended: list[bool]) -> list[int]:
    """Return the places that stay, those from the back put where others fall out.

    So a row of the cache is copied only for each that ended, not for each that stays:
    `[F, T, F, T, F, F]` gives `[0, 5, 2, 4]`.
    """
    size = len(ended) - sum(ended)
    spare = [i for i in range(size, len(ended)) if not ended[i]]
    return [spare.pop() if ended[i] else i for i in range(size)]


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


def _forward(
    policy: CausalPolicy, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache
) -> Tensor:
    """Return the logits [rows, V] after the last column of `ids`; the head sees that column only.

    Args:
        policy: The student.
        ids: [rows, new tokens].
        mask: [rows, columns in the cache + new tokens].
        positions: [rows, new tokens].
        cache: Grows by the new tokens.
    """
    return policy.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1, : policy.vocab_size]


def _read_prompts(
    policy: CausalPolicy, prompt_ids: list[list[int]], prompts: list[int]
) -> tuple[Tensor, DynamicCache, Tensor]:
    """Read each prompt once; return logits [R, V], cache and attention mask [R, T] of the rows.

    Args:
        policy: The student.
        prompt_ids: Token lists.
        prompts: R numbers of prompts, those of siblings next to one another, shortest first.
    """
    device, config = policy.device, policy.model.config
    distinct = list(dict.fromkeys(prompts))
    groups = _groups([len(prompt_ids[p]) for p in distinct])
    if not can_join(DynamicCache(config=config)):
        groups = [len(distinct)]
    width = len(prompt_ids[distinct[-1]])
    all_logits, parts, masks, start = [], [], [], 0
    for size in groups:
        group = distinct[start : start + size]
        ids, mask = _pad_left([prompt_ids[p] for p in group], device)
        cache = DynamicCache(config=config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = _forward(policy, ids, mask, positions, cache)
        siblings = torch.tensor([prompts.count(p) for p in group], device=device)
        rows = torch.arange(size, device=device).repeat_interleave(siblings)
        all_logits.append(logits[rows])
        parts.append((cache, rows))
        masks.append(torch.nn.functional.pad(mask, (width - mask.shape[1], 0))[rows])
        start += size
    return torch.cat(all_logits), join_caches(config, width, parts), torch.cat(masks)


def _groups(lengths: list[int]) -> list[int]:
    """Cut rising prompt lengths into groups read together; return the groups' sizes."""
    sizes, padding = [], 0
    for i, length in enumerate(lengths):
        if sizes:
            padding += sizes[-1] * (length - lengths[i - 1])
            if padding <= _PADDING_TOKENS and (sizes[-1] + 1) * length <= _PREFILL_TOKENS:
                sizes[-1] += 1
                continue
        sizes.append(1)
        padding = 0
    return sizes


def _pad_left(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _end_check(
    policy: CausalPolicy, sampling: SamplingConfig
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return f(completions [R, L], newest tokens [R]) -> [R] bool, whether each has ended.

    The completions are read only where there are stop strings.

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
