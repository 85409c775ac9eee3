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
_NUCLEUS_CANDIDATES = 256


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


def sample(logits: Tensor, uniform: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the distribution function, in order of the ids.

    Args:
        logits: [R, V] of the next token, before temperature.
        uniform: [R] in [0, 1).
        config: Temperature, top-k (ties at the last place are kept), then top-p of what is left.

    Returns:
        The token ids [R] and their log-probabilities in nats [R] under the distribution that they
        were drawn from (after temperature, top-k and top-p).
    """
    logits = logits.float() / config.temperature
    ids = None  # column -> token id, where not all are left
    if 0 < config.top_k < logits.shape[-1]:
        last = logits.topk(config.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < last, -torch.inf)
    if config.top_p < 1:
        logits, ids = _nucleus(logits, config.top_p)
    logprobs = logits.log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    # the last sum may miss 1 by rounding: draw within what there is
    threshold = (uniform * cumulative[:, -1])[:, None]
    column = torch.searchsorted(cumulative, threshold, right=True)
    column = column.clamp(max=logits.shape[-1] - 1)
    tokens = column if ids is None else ids.gather(1, column)
    return tokens[:, 0], logprobs.gather(1, column)[:, 0]


def _nucleus(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return logits [R, C] and ids [R, C] of candidates in order of the ids.

    Those outside the smallest set of tokens with mass >= `top_p` are -inf.
    """
    probs = logits.softmax(-1)
    vocab_size = probs.shape[-1]
    # sorting the whole vocabulary would cost more than the model's forward pass on a CPU
    candidates = min(_NUCLEUS_CANDIDATES, vocab_size)
    while True:
        mass, ids = probs.topk(candidates)
        mass_before = mass.cumsum(-1) - mass
        if candidates == vocab_size or bool((mass_before[:, -1] >= top_p).all()):
            break
        candidates = min(8 * candidates, vocab_size)
    ids, order = ids.sort(-1)
    inside = (mass_before < top_p).gather(1, order)
    return logits.gather(1, ids).masked_fill(~inside, -torch.inf), ids
