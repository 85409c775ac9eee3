"""What is sampled, and the sampler: one uniform number a token decides it.

R rows, V vocabulary.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from opd_lightning.errors import ConfigError

# A nucleus is looked for among this many of the likeliest tokens first, then among 8 times more.
# It holds the nucleus 0.9 of a trained model at nearly every token, at half the cost of 256.
_NUCLEUS_CANDIDATES = 64
# Ids summed together when the whole vocabulary is drawn from; about the root of usual vocabularies.
_BLOCK = 256


@dataclass
class SamplingConfig:
    """How completions are drawn, in TRL's names.

    Attributes:
        temperature: Divides the logits, > 0; 1 is usual.
        top_p: Keep the smallest set of tokens with this mass, in (0, 1]. 0.9 is usual for
            distribution-matching objectives; below 1 biases those that score the sampled token.
        top_k: Keep this many of the likeliest tokens; 0 keeps all, 1 is greedy.
        max_completion_length: Limit in tokens.
        stop: Strings that end a completion; the tokens that complete one belong to it.
        num_generations: Completions a prompt.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_completion_length: int = 256
    stop: list[str] = field(default_factory=list)
    num_generations: int = 1

    def __post_init__(self) -> None:
        checks = [
            ("temperature", self.temperature > 0, "above 0; greedy decoding is top_k=1"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]; 1 keeps every token"),
            ("top_k", self.top_k >= 0, "0 (keep every token) or more"),
            ("max_completion_length", self.max_completion_length >= 1, "at least 1"),
            ("num_generations", self.num_generations >= 1, "at least 1"),
            (
                "stop",
                not isinstance(self.stop, str) and all(self.stop),
                "a list of strings, none of them empty",
            ),
        ]
        for name, valid, rule in checks:
            if not valid:
                raise ConfigError(f"{name} must be {rule}; got {getattr(self, name)!r}.")


def uniforms(seed: int, prompt_ids: list[int], number: int, length: int) -> Tensor:
    """Return the `length` uniform numbers in [0, 1) that decide one completion, float64.

    A function of the seed, the prompt and the completion's number among its siblings alone, so that
    a completion does not depend on what else is in the batch, on its order or on other ranks.

    Args:
        seed: Of the round.
        prompt_ids: The prompt's tokens.
        number: 0-based number of the completion among those of its prompt.
        length: How many.
    """
    key = np.array([seed, number, *prompt_ids], dtype=np.int64).tobytes()
    digest = hashlib.blake2b(key, digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return torch.from_numpy(generator.random(length))


def sample(
    logits: Tensor, uniform: Tensor, config: SamplingConfig, with_logprobs: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Draw one token a row by inverting the distribution function, in order of the ids.

    Args:
        logits: [R, V] of the next token, before temperature.
        uniform: [R] in [0, 1).
        config: Temperature, top-k (ties at the last place are kept), then top-p of what is left.
        with_logprobs: False leaves the log-probabilities out.

    Returns:
        The token ids [R] and their log-probabilities in nats [R], or None, under the distribution
        that they were drawn from (after temperature, top-k and top-p).
    """
    logits = logits.float()
    if config.temperature != 1:
        logits = logits / config.temperature
    vocab_size = logits.shape[-1]
    if 0 < config.top_k < vocab_size:
        # one more than is kept shows whether the last place is tied
        tokens, probs = _draw_from_likeliest(logits, uniform, config, config.top_k + 1)
    elif config.top_p < 1:
        count = min(_NUCLEUS_CANDIDATES, vocab_size)
        tokens, probs = _draw_from_likeliest(logits.softmax(-1), uniform, config, count)
    else:
        tokens, probs = _draw_from_all(logits.softmax(-1), uniform)
    return tokens, probs.log() if with_logprobs else None


def _draw_from_all(probs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens [R] and their probabilities [R]; `probs` is [R, V].

    The block of ids is found first and then the id within it: sums of blocks in fp32 are cheap, and
    running sums, which need float64, are taken over V / 256 + 256 numbers instead of V.
    """
    whole = probs.shape[-1] // _BLOCK
    sums = probs[:, : whole * _BLOCK].unflatten(1, (whole, _BLOCK)).sum(-1)
    rest = probs[:, whole * _BLOCK :].sum(-1, keepdim=True)
    cumulative = torch.cat([sums, rest], dim=1).cumsum(-1, dtype=torch.float64)
    threshold = uniform[:, None] * cumulative[:, -1:]
    block = _invert(cumulative, threshold)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    ids = block * _BLOCK + torch.arange(_BLOCK, device=probs.device)
    inside = probs.gather(1, ids.clamp(max=probs.shape[-1] - 1))
    inside = inside.masked_fill(ids >= probs.shape[-1], 0.0)
    cumulative = inside.cumsum(-1, dtype=torch.float64)
    # both ways to sum a block may differ by rounding: draw within what there is
    last = cumulative[:, -1:]
    column = _invert(cumulative, torch.minimum(threshold - before, last.nextafter(-last)))
    return ids.gather(1, column)[:, 0], inside.gather(1, column)[:, 0]


def _draw_from_likeliest(
    scores: Tensor, uniform: Tensor, config: SamplingConfig, count: int
) -> tuple[Tensor, Tensor]:
    """Return tokens [R] and their probabilities [R] after truncation, from `count` candidates.

    Rows whose kept set may hold more tokens than that are drawn again from 8 times more, so that a
    row's result does not depend on the others.

    Args:
        scores: [R, V], logits where the config has a top-k, else probabilities.
        uniform: [R].
        config: With a top-k below V, or a top-p below 1.
        count: Candidates, above `top_k` and at most V.
    """
    # sorting the whole vocabulary would cost more than the model's forward pass on a CPU
    values, ids = scores.topk(count)
    if 0 < config.top_k < scores.shape[-1]:
        kept = values >= values[:, config.top_k - 1 : config.top_k]
        weights = (values - values[:, :1]).exp() * kept
        settled = ~kept[:, -1]
        weights = weights / weights.sum(-1, keepdim=True)
    else:
        weights, settled = values, None
    if config.top_p < 1:
        mass_before = weights.cumsum(-1, dtype=torch.float64) - weights
        kept = mass_before < config.top_p
        settled = ~kept[:, -1] if settled is None else settled
        weights = weights * kept
    ids, order = ids.sort(-1)
    weights = weights.gather(1, order)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    column = _invert(cumulative, uniform[:, None] * cumulative[:, -1:])
    tokens = ids.gather(1, column)[:, 0]
    probs = (weights.gather(1, column) / cumulative[:, -1:])[:, 0].float()
    if count < scores.shape[-1] and not bool(settled.all()):
        again = (~settled).nonzero()[:, 0]
        more = min(8 * count, scores.shape[-1])
        tokens[again], probs[again] = _draw_from_likeliest(
            scores[again], uniform[again], config, more
        )
    return tokens, probs


def _invert(cumulative: Tensor, threshold: Tensor) -> Tensor:
    """Return the first column [R, 1] whose running sum [R, C] is above `threshold` [R, 1]."""
    column = torch.searchsorted(cumulative, threshold, right=True)
    return column.clamp(max=cumulative.shape[-1] - 1)
