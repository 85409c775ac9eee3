"""What travels between the rooms: prompts of one round and the rollout that answers them.

Shapes: P prompts, B rows of a rollout (P times the completions a prompt), L tokens with padding,
N completion tokens of all rows together ("flat": row by row, in time order).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from opd_lightning.errors import ConfigError


class _Movable:
    """Gives a dataclass of tensors the `.to` that Lightning's batch transfer calls."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return a copy with every tensor (and nested record) on `device`."""
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if hasattr(value := getattr(self, f.name), "to")
        }
        return replace(self, **moved)


@dataclass
class Rollout(_Movable):
    """Completions with their prompts, one sequence a row, padded on the right.

    For the prompt `[5, 6]` answered by `[7, 8]` and the prompt `[5]` answered by `[9]`:
    `input_ids = [[5, 6, 7, 8], [5, 9, 0, 0]]`, `attention_mask = [[1, 1, 1, 1], [1, 1, 0, 0]]`,
    `completion_mask = [[F, F, T, T], [F, T, F, F]]`, `token_ids = [7, 8, 9]`, `row = [0, 0, 1]`,
    `position = [0, 1, 0]`.

    Attributes:
        input_ids: [B, L] int64, prompt then completion.
        attention_mask: [B, L] int64, 1 on real tokens. Masks go by length, never by a pad id.
        completion_mask: [B, L] bool, True where the student sampled the token (or, off-policy,
            where the dataset's completion stands). Several spans a row in multi-turn.
        sampling_logprobs: [B, L] nats or None: log-probability under which each completion token
            was drawn, after temperature, top-k and top-p; 0 off the completion.
        old_logprobs: [B, L] nats or None: the student's log-probabilities (full softmax at the
            rollout's temperature) before the first of several updates on this rollout.
        task: B task names; default all "default".
        truncated: [B] bool, True where the limit ended the completion and not the student; default
            all False.
        reward: [B] or None, outcome reward of the row.
        teacher_input_ids: [B, Lt] or None, where the teacher sees another prompt. Each row ends
            with the same tokens as `input_ids`, from the first completion token on.
        teacher_attention_mask: [B, Lt] or None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    task: list[str] | None = None
    truncated: Tensor | None = None
    sampling_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    reward: Tensor | None = None
    teacher_input_ids: Tensor | None = None
    teacher_attention_mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.task is None:
            self.task = ["default"] * self.num_rows
        if self.truncated is None:
            self.truncated = self.completion_mask.new_zeros(self.num_rows)

    @property
    def num_rows(self) -> int:
        """B."""
        return self.input_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """N, the number of completion tokens."""
        return int(self.completion_mask.sum())

    @property
    def completion_lengths(self) -> Tensor:
        """[B] completion tokens of each row."""
        return self.completion_mask.sum(dim=1)

    @property
    def token_ids(self) -> Tensor:
        """[N] the completion tokens."""
        return self.input_ids[self.completion_mask]

    @property
    def row(self) -> Tensor:
        """[N] 0-based row of each completion token."""
        return self.completion_mask.nonzero()[:, 0]

    @property
    def position(self) -> Tensor:
        """[N] 0-based place of each completion token among those of its row."""
        return (self.completion_mask.cumsum(dim=1) - 1)[self.completion_mask]

    @property
    def span(self) -> Tensor:
        """[N] 0-based number of each token's span: unbroken completion tokens of one row."""
        before = self.completion_mask.roll(1, dims=1)
        before[:, :1] = False
        starts = self.completion_mask & ~before
        return (starts.flatten().cumsum(0) - 1)[self.completion_mask.flatten()]

    @property
    def flat_sampling_logprobs(self) -> Tensor | None:
        """[N] nats, or None when the engine did not return them."""
        return (
            None if self.sampling_logprobs is None else self.sampling_logprobs[self.completion_mask]
        )

    @property
    def flat_old_logprobs(self) -> Tensor | None:
        """[N] nats, or None when no log-probabilities were recomputed for this rollout."""
        return None if self.old_logprobs is None else self.old_logprobs[self.completion_mask]

    def seen_by_teacher(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ids, attention mask and completion mask of the teacher's view of the rows.

        The completion mask selects the same N tokens in the same order as `completion_mask`,
        shifted in each row by the difference of the two prompts' lengths.
        """
        if self.teacher_input_ids is None:
            return self.input_ids, self.attention_mask, self.completion_mask
        shift = self.teacher_attention_mask.sum(1) - self.attention_mask.sum(1)
        mask = torch.zeros_like(self.teacher_input_ids, dtype=torch.bool)
        rows, columns = self.completion_mask.nonzero(as_tuple=True)
        mask[rows, columns + shift[rows]] = True
        return self.teacher_input_ids, self.teacher_attention_mask, mask

    def select_rows(self, rows: Tensor) -> "Rollout":
        """Return the rows of index `rows` [R], in that order, without columns of padding alone."""
        picked = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                picked[f.name] = value[rows]
            elif isinstance(value, list):
                picked[f.name] = [value[i] for i in rows.tolist()]
        part = replace(self, **picked)
        return part._without_empty_columns()

    def _without_empty_columns(self) -> "Rollout":
        def longest(mask: Tensor | None) -> int | None:
            return None if mask is None else int(mask.sum(1).max()) if len(mask) else 1

        width, teacher_width = longest(self.attention_mask), longest(self.teacher_attention_mask)
        cut = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor) and value.dim() == 2:
                cut[f.name] = value[:, : teacher_width if f.name.startswith("teacher_") else width]
        return replace(self, **cut)

    @classmethod
    def from_completions(
        cls,
        prompts: "PromptBatch",
        completions: Sequence[Sequence[int]],
        truncated: Sequence[bool],
        sampling_logprobs: Sequence[Sequence[float]] | None = None,
    ) -> "Rollout":
        """Join P prompts and their completions; P divides their number, siblings stand together.

        Args:
            prompts: The P prompts.
            completions: B = P * G token lists; those of prompt p are `completions[p*G : (p+1)*G]`.
            truncated: B flags.
            sampling_logprobs: B lists of log-probabilities in nats, one for each completion token.

        Raises:
            ConfigError: If P does not divide B, or there are not B flags.
        """
        if len(completions) % max(1, prompts.num_prompts) or len(truncated) != len(completions):
            raise ConfigError(
                f"{len(completions)} completions and {len(truncated)} flags for "
                f"{prompts.num_prompts} prompts: give as many a prompt, and a flag for each."
            )
        device = prompts.input_ids.device
        group = len(completions) // max(1, prompts.num_prompts)
        prompt_ids = [ids for ids in prompts.unpadded() for _ in range(group)]
        rows = [p + list(c) for p, c in zip(prompt_ids, completions, strict=True)]
        input_ids, attention_mask = pad_right(rows, device)
        completion_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        logprobs = (
            None if sampling_logprobs is None else torch.zeros(input_ids.shape, device=device)
        )
        for i, (prompt, completion) in enumerate(zip(prompt_ids, completions, strict=True)):
            span = slice(len(prompt), len(prompt) + len(completion))
            completion_mask[i, span] = True
            if logprobs is not None:
                logprobs[i, span] = torch.tensor(sampling_logprobs[i], device=device)
        teacher_ids = teacher_mask = None
        if prompts.teacher_input_ids is not None:
            teacher_prompts = [ids for ids in prompts.unpadded("teacher_") for _ in range(group)]
            teacher_rows = [p + list(c) for p, c in zip(teacher_prompts, completions, strict=True)]
            teacher_ids, teacher_mask = pad_right(teacher_rows, device)
        return cls(
            input_ids=input_ids,
            attention_mask=attention_mask,
            completion_mask=completion_mask,
            sampling_logprobs=logprobs,
            task=[task for task in prompts.task for _ in range(group)],
            truncated=torch.tensor(list(truncated), dtype=torch.bool, device=device),
            teacher_input_ids=teacher_ids,
            teacher_attention_mask=teacher_mask,
        )

    @classmethod
    def from_flat(
        cls,
        token_ids: Tensor,
        row: Tensor,
        sampling_logprobs: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        reward: Tensor | None = None,
        truncated: Tensor | None = None,
        task: list[str] | None = None,
    ) -> "Rollout":
        """Build a rollout from its flat views, for tests and experiments; prompts are one token 0.

        Args:
            token_ids: [N] completion tokens, row by row in time order.
            row: [N] 0-based row of each token, never falling; rows left out are empty.
            sampling_logprobs: [N] nats or None.
            old_logprobs: [N] nats or None.
            reward: [B] or None, B = largest row + 1 (or `len(task)`).
            truncated: [B] bool; default all False.
            task: B names; default all "default".

        Raises:
            ConfigError: If `token_ids` and `row` differ in length, `row` falls or is negative, or
                `task` has too few names.
        """
        if token_ids.shape != row.shape or token_ids.dim() != 1:
            raise ConfigError(
                f"token_ids and row must be flat and of one length; got {tuple(token_ids.shape)} "
                f"and {tuple(row.shape)}."
            )
        if row.numel() and (bool((row.diff() < 0).any()) or int(row[0]) < 0):
            raise ConfigError(
                "row must start at 0 or above and never fall, as tokens stand row by row; got "
                f"{row.tolist()}."
            )
        device = token_ids.device
        last_row = int(row[-1]) if row.numel() else -1
        num_rows = len(task) if task is not None else last_row + 1
        if last_row >= num_rows:
            raise ConfigError(
                f"task names {num_rows} rows, but row goes up to {last_row}. Give one name a row."
            )
        lengths = torch.bincount(row, minlength=num_rows)
        starts = lengths.cumsum(0) - lengths
        column = torch.arange(len(row), device=device) - starts[row] + 1
        width = 1 + (int(lengths.max()) if num_rows else 0)

        def spread(flat: Tensor | None) -> Tensor | None:
            if flat is None:
                return None
            padded = torch.zeros(num_rows, width, dtype=flat.dtype, device=device)
            padded[row, column] = flat
            return padded

        columns = torch.arange(width, device=device)
        return cls(
            input_ids=spread(token_ids),
            attention_mask=(columns <= lengths[:, None]).long(),
            completion_mask=(columns > 0) & (columns <= lengths[:, None]),
            sampling_logprobs=spread(sampling_logprobs),
            old_logprobs=spread(old_logprobs),
            reward=reward,
            task=task,
            truncated=truncated,
        )


@dataclass
class PromptBatch(_Movable):
    """The prompts of one round on this rank; the rollout callback fills `rollout` in place.

    Attributes:
        input_ids: [P, L] int64, padded on the right.
        attention_mask: [P, L] int64.
        task: P task names; default all "default".
        index: [P] int64, number of each prompt in its source (0-based); default 0 to P - 1.
        answer: P reference answers, None where there is none.
        teacher_input_ids: [P, Lt] or None, the prompt that the teacher sees instead.
        teacher_attention_mask: [P, Lt] or None.
        rollout: The completions; from the dataset when it has them, else None until filled.
        rollout_seconds: Time the rollout took; 0.0 for a dataset's own completions.
    """

    input_ids: Tensor
    attention_mask: Tensor
    task: list[str] | None = None
    index: Tensor | None = None
    answer: list[str | None] | None = None
    teacher_input_ids: Tensor | None = None
    teacher_attention_mask: Tensor | None = None
    rollout: Rollout | None = None
    rollout_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.task is None:
            self.task = ["default"] * self.num_prompts
        if self.index is None:
            self.index = torch.arange(self.num_prompts, device=self.input_ids.device)
        if self.answer is None:
            self.answer = [None] * self.num_prompts

    @property
    def num_prompts(self) -> int:
        """P."""
        return self.input_ids.shape[0]

    def unpadded(self, prefix: str = "") -> list[list[int]]:
        """Return the P prompts as token lists; `prefix="teacher_"` for those of the teacher."""
        ids, mask = getattr(self, f"{prefix}input_ids"), getattr(self, f"{prefix}attention_mask")
        return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]

    @classmethod
    def from_token_ids(
        cls, prompts: Sequence[Sequence[int]], task: list[str] | None = None
    ) -> "PromptBatch":
        """Build a batch from P token lists, for use without a data module."""
        return cls(*pad_right(prompts), task=task)


def pad_right(
    rows: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return ids [B, L], padded with 0, and the attention mask [B, L] of B token lists."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(list(row), dtype=torch.long)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)
