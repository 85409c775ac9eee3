"""From checked rows to token ids: chat template, special tokens, prompts that are too long."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jinja2
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from transformers import PreTrainedTokenizerBase

from opd_lightning.data.rows import Prompt, PromptRow, excerpt
from opd_lightning.errors import ConfigError

Overlong = Literal["drop", "error", "truncate"]

logger = logging.getLogger("opd_lightning")


@dataclass(frozen=True)
class EncodedPrompt:
    """A row as tokens: `EncodedPrompt(0, "a.jsonl:1", "add", "5", [1, 7, 2], None, None)`.

    Attributes:
        index: 0-based number of the row in its source.
        where: The row's place, for error messages.
        task: Task name.
        answer: Reference answer or None.
        prompt_ids: Tokens of the student's prompt.
        teacher_prompt_ids: Tokens of the teacher's prompt, None where it is the student's.
        completion_ids: Tokens of the dataset's completion or None.
        truncated: Whether the completion was cut off.
    """

    index: int
    where: str
    task: str
    answer: str | None
    prompt_ids: list[int]
    teacher_prompt_ids: list[int] | None
    completion_ids: list[int] | None
    truncated: bool = False


class PromptEncoder:
    """Tokenises rows; one place decides about templates, BOS, EOS and length.

    With a chat template, a string becomes one user turn, `system_prompt` stands before a
    conversation that has no system (or developer) turn of its own, for student and teacher alike,
    and the rendered text is tokenised without special tokens: the template has written them, BOS is
    not doubled. Without one, a string is tokenised as it is with the tokenizer's default special
    tokens.

    Args:
        tokenizer: The student's tokenizer.
        max_prompt_tokens: Longest prompt of the student, >= 1, template included. The teacher's own
            prompts are not limited by it.
        overlong: What becomes of a longer prompt: "drop" the row, "error", or "truncate": its first
            `max_prompt_tokens // 2` tokens and the last ones are kept, the middle is cut out.
        system_prompt: Text of a system turn, or None.
        chat_template_kwargs: Passed to the chat template, for example `{"enable_thinking": False}`.
        context_length: Most tokens the model can read, or None for no limit.

    Raises:
        ConfigError: If `system_prompt` or `chat_template_kwargs` is given and there is no chat
            template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        overlong: Overlong = "drop",
        system_prompt: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        context_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.overlong = overlong
        self.system_prompt = system_prompt
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.context_length = context_length
        self.has_template = bool(tokenizer.chat_template)
        useless = {"system_prompt": system_prompt, "chat_template_kwargs": chat_template_kwargs}
        for name, value in useless.items():
            if value and not self.has_template:
                raise ConfigError(
                    f"data.{name} is {excerpt(value)}, but the tokenizer has no chat template to "
                    "use it. Remove it, or set tokenizer.chat_template."
                )

    def encode(self, rows: Sequence[PromptRow], name: str) -> list[EncodedPrompt]:
        """Return the encoded rows in order, without dropped ones.

        Args:
            rows: Checked rows of one split.
            name: The split's source, for messages.

        Raises:
            ConfigError: If a row cannot be rendered or has no tokens, is overlong where that is an
                error, does not fit into the context, or all rows are dropped.
        """
        encoded = [
            EncodedPrompt(
                row.index, row.where, row.task, row.answer, ids, teacher, completion, row.truncated
            )
            for row, ids, teacher, completion in zip(
                rows,
                self._prompt_ids([row.prompt for row in rows], rows),
                self._teacher_prompt_ids(rows),
                self._completion_ids(rows),
                strict=True,
            )
        ]
        kept = self._limit(encoded, name)
        self._check_context(kept)
        return kept

    def _prompt_ids(self, prompts: Sequence[Prompt], rows: Sequence[PromptRow]) -> list[list[int]]:
        texts = [self._render(p, row.where) for p, row in zip(prompts, rows, strict=True)]
        ids = self._tokenize(texts, add_special_tokens=not self.has_template)
        for prompt_ids, row, text in zip(ids, rows, texts, strict=True):
            if not prompt_ids:
                raise ConfigError(
                    f"{row.where}: the tokenizer makes no tokens of {excerpt(text)}. Remove the "
                    "row, or check that tokenizer and data belong together."
                )
        return ids

    def _teacher_prompt_ids(self, rows: Sequence[PromptRow]) -> list[list[int] | None]:
        with_own = [row for row in rows if row.teacher_prompt is not None]
        ids = iter(self._prompt_ids([row.teacher_prompt for row in with_own], with_own))
        return [None if row.teacher_prompt is None else next(ids) for row in rows]

    def _completion_ids(self, rows: Sequence[PromptRow]) -> list[list[int] | None]:
        if any(row.completion is None for row in rows):
            return [None] * len(rows)
        eos = self.tokenizer.eos_token_id
        completions = self._tokenize([row.completion for row in rows], add_special_tokens=False)
        for row, ids in zip(rows, completions, strict=True):
            if row.truncated or (eos is not None and ids[-1:] == [eos]):
                continue
            if eos is None:
                raise ConfigError(
                    f"{row.where}: the completion is a finished answer, but the tokenizer has no "
                    "EOS token. Set tokenizer.eos_token, or mark the row with truncated = true."
                )
            ids.append(eos)
        return completions

    def _render(self, prompt: Prompt, where: str) -> str:
        if not self.has_template:
            if isinstance(prompt, str):
                return prompt
            raise ConfigError(
                f"{where}: the prompt is a conversation, but the tokenizer has no chat template: "
                f"{excerpt(prompt)}. Give strings, or set tokenizer.chat_template."
            )
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.system_prompt and turns[0]["role"] not in ("system", "developer"):
            turns = [{"role": "system", "content": self.system_prompt}, *turns]
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
            )
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"{where}: the tokenizer's chat template refuses the prompt ({error}): "
                f"{excerpt(turns)}."
            ) from error

    def _tokenize(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: the tokenizer's own warning about long texts; length is dealt with here
        encoded = self.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _limit(self, encoded: list[EncodedPrompt], name: str) -> list[EncodedPrompt]:
        limit = self.max_prompt_tokens
        too_long = [prompt for prompt in encoded if len(prompt.prompt_ids) > limit]
        if not too_long:
            return encoded
        what = (
            f"{len(too_long)} of {len(encoded)} prompts of {name} exceed max_prompt_tokens={limit}"
        )
        if self.overlong == "error":
            first = too_long[0]
            raise ConfigError(
                f"{first.where}: a prompt of {len(first.prompt_ids)} tokens; {what}. Raise "
                "data.max_prompt_tokens, or set data.overlong to drop or truncate."
            )
        if self.overlong == "truncate":
            _report(f"{what}: truncated in the middle")
            return [replace(p, prompt_ids=_cut_middle(p.prompt_ids, limit)) for p in encoded]
        if len(too_long) == len(encoded):
            shortest = min(len(prompt.prompt_ids) for prompt in encoded)
            raise ConfigError(
                f"{what} (the shortest has {shortest}): none is left. Raise "
                "data.max_prompt_tokens, or set data.overlong to truncate."
            )
        _report(f"{what}: dropped")
        return [prompt for prompt in encoded if len(prompt.prompt_ids) <= limit]

    def _check_context(self, encoded: list[EncodedPrompt]) -> None:
        if self.context_length is None:
            return
        for prompt in encoded:
            num_completion = max(1, len(prompt.completion_ids or []))
            if len(prompt.prompt_ids) + num_completion > self.context_length:
                raise ConfigError(
                    f"{prompt.where}: {len(prompt.prompt_ids)} prompt tokens and a completion of "
                    f"at least {num_completion} do not fit into the model's context of "
                    f"{self.context_length}. Shorten the row, or lower data.max_prompt_tokens so "
                    "that it is dropped or truncated."
                )


def _cut_middle(ids: list[int], limit: int) -> list[int]:
    if len(ids) <= limit:
        return ids
    num_first = limit // 2
    return ids[:num_first] + ids[len(ids) - (limit - num_first) :]


@rank_zero_only
def _report(message: str) -> None:
    logger.warning(message)
