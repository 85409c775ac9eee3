"""What both sides of step.py share: prompts, forced lengths, models, and taking turns."""

import json
import math
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import common

SPREADS = ("uneven", "equal")
PAD, BOS, EOS = 0, 1, 2


def completion_lengths(spread: str, rows: int, longest: int) -> list[int]:
    """Return the tokens of each row's completion, EOS included, in a fixed mixed order.

    "uneven": quantiles of a log-normal distribution whose median is a quarter of `longest` and
    whose largest is `longest`; "equal": `longest` each.
    """
    if spread == "equal":
        return [longest] * rows
    scores = [NormalDist().inv_cdf((i + 0.5) / rows) for i in range(rows)]
    scale = math.log(4) / scores[-1]
    lengths = [max(1, round(longest / 4 * math.exp(scale * score))) for score in scores]
    random.Random(0).shuffle(lengths)
    return lengths


def prompt_lengths(rows: int) -> list[int]:
    """Return the tokens of each row's prompt."""
    return [8 + 5 * i % 17 for i in range(rows)]


def prompts(rows: int, vocab_size: int, rounds: int) -> list[list[int]]:
    """Return `rounds` times `rows` prompts; prompt i's ids are i modulo `rows`."""
    draw = random.Random(0)
    lengths = prompt_lengths(rows)
    return [
        random_tokens(draw, row, lengths[row], rows, vocab_size) for row in [*range(rows)] * rounds
    ]


def random_tokens(
    draw: random.Random, row: int, length: int, rows: int, vocab_size: int
) -> list[int]:
    """Return ids that are `row` modulo `rows`, none of them special."""
    return [rows * draw.randrange(1, vocab_size // rows) + row for _ in range(length)]


class ForcedLengths:
    """Makes the completion of row i `lengths[i]` tokens long, EOS included, in any generation loop.

    It needs no state between the steps of a generation, so that rows may be sorted, padded and
    dropped: which row it is stands in the newest token, which is i modulo the number of rows (the
    prompt's tokens are, and only such tokens are drawn), and how far it is in the position. The
    output head's logits get -inf at all other ids, and at the last step at all but EOS. Forward
    passes without a cache, those of training, are left alone.
    """

    def __init__(self, lengths: list[int], vocab_size: int) -> None:
        rows = len(lengths)
        ends = [p + n - 2 for p, n in zip(prompt_lengths(rows), lengths, strict=True)]
        self._ends = torch.tensor(ends)
        self._bias = torch.full((rows + 1, vocab_size), -torch.inf)
        for row in range(rows):
            self._bias[row, rows + row :: rows] = 0.0
        self._bias[rows, EOS] = 0.0
        self._which: Tensor | None = None

    def attach(self, model: PreTrainedModel) -> None:
        """Put the hooks on the decoder and on the output head."""
        self._ends, self._bias = self._ends.to(model.device), self._bias.to(model.device)
        model.base_model.register_forward_pre_hook(self._remember, with_kwargs=True)
        model.get_output_embeddings().register_forward_hook(self._force)

    def _remember(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._which = None
        if kwargs.get("past_key_values") is not None:
            ids = kwargs["input_ids"] if args == () else args[0]
            row = ids[:, -1] % len(self._ends)
            ended = kwargs["position_ids"][:, -1] == self._ends[row]
            self._which = row.masked_fill(ended, len(self._ends))

    def _force(self, head: nn.Module, args: tuple, logits: Tensor) -> None:
        if self._which is not None:
            logits[:, -1] += self._bias[self._which]


def save_models(folder: Path, sizes: dict[str, Any]) -> dict[str, int]:
    """Write `student` and `teacher` with one tokenizer of the words t3, t4, …; count parameters."""
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    plain = [f"t{i}" for i in range(len(special), sizes["vocab_size"])]
    vocabulary = {word: i for i, word in enumerate([*special.values(), *plain])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)
    counts = {}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            **sizes[name],
            vocab_size=sizes["vocab_size"],
            num_attention_heads=sizes[name]["hidden_size"] // 64,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
        model = LlamaForCausalLM(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        counts[name] = model.num_parameters()
    return counts


class Turns:
    """A training process's side: each step waits for its turn and reports when the next one starts.

    A step's time is from its turn to the moment when the next step could start.
    """

    def __init__(self) -> None:
        # what libraries print must not come between the answers
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._device = common.device()
        self._started: float | None = None
        self._memory: common.PeakMemory | None = None
        self.parts: dict[str, float] = {}
        self.lengths: list[int] = []

    def ready(self) -> None:
        """Say what memory the libraries alone take."""
        self._say({"baseline_bytes": 0 if self._gpu else common.resident_bytes()})

    def next(self) -> None:
        """Report the step that ended, if any, and wait for the turn of the next one."""
        if self._started is not None:
            seconds = common.now(self._device) - self._started
            parts = {**self.parts, "other": seconds - sum(self.parts.values())}
            highest = self._memory.highest_bytes()
            self._memory.__exit__(None, None, None)
            self._say(
                {
                    "seconds": seconds,
                    "parts": parts,
                    "lengths": sorted(self.lengths),
                    "highest_bytes": highest,
                }
            )
        if sys.stdin.readline().strip() != "step":
            os._exit(0)
        self.parts = {}
        self._memory = common.PeakMemory(self._device).__enter__()
        self._started = common.now(self._device)

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return `work`, its seconds counted as `part`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = common.now(self._device)
            result = work(*args, **kwargs)
            self.add(part, common.now(self._device) - started)
            return result

        return run

    def add(self, part: str, seconds: float) -> None:
        """Count seconds as `part` of this step."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    @property
    def _gpu(self) -> bool:
        return self._device.type == "cuda"

    def _say(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)
