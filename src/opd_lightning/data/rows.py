"""One row of a dataset, checked: types, roles, emptiness; every error names its file and line."""

from dataclasses import dataclass
from typing import Any

from opd_lightning.errors import ConfigError, nearest

Conversation = list[dict[str, Any]]
Prompt = str | Conversation

ROLES = ("system", "developer", "user", "assistant", "tool")

_EXCERPT_CHARACTERS = 60


@dataclass(frozen=True)
class Record:
    """A row as it was read, for example `Record(2, "train.jsonl:3", {"prompt": "Hi"})`.

    Attributes:
        index: 0-based number of the row in its source.
        where: The row's place as a user finds it: "FILE:LINE", or "NAME[INDEX]" where there are no
            lines.
        columns: Values by column name.
    """

    index: int
    where: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class PromptRow:
    """A checked row; the columns are described in the room's docstring.

    Attributes:
        index: 0-based number of the row in its source.
        where: The row's place, for error messages.
        prompt: A string or a conversation that ends before the answer.
        task: Task name.
        answer: Reference answer or None.
        teacher_prompt: What the teacher sees instead, or None for the prompt.
        completion: The dataset's own completion or None.
        truncated: Whether the completion was cut off.
    """

    index: int
    where: str
    prompt: Prompt
    task: str = "default"
    answer: str | None = None
    teacher_prompt: Prompt | None = None
    completion: str | None = None
    truncated: bool = False

    @classmethod
    def from_record(cls, record: Record, prompt_column: str | None = None) -> "PromptRow":
        """Check a record and return its row.

        Args:
            record: The row as it was read.
            prompt_column: Column that holds the prompt; default `prompt`, else `messages`.

        Raises:
            ConfigError: If the prompt's column is missing, a prompt is empty, of a wrong type, has
                an unknown role or ends with an assistant turn, or another column is of a wrong
                type.
        """
        columns, where = record.columns, record.where
        column = _find_prompt_column(record, prompt_column)
        prompt = columns[column]
        if column == "messages" and _ends_with_assistant(prompt):
            prompt = prompt[:-1]
        teacher_prompt = columns.get("teacher_prompt")
        if teacher_prompt is not None:
            teacher_prompt = _checked_prompt(teacher_prompt, where, "teacher_prompt")
        return cls(
            index=record.index,
            where=where,
            prompt=_checked_prompt(prompt, where, column),
            task=_checked_string(columns.get("task"), where, "task") or "default",
            answer=_checked_answer(columns.get("answer"), where),
            teacher_prompt=teacher_prompt,
            completion=_checked_string(columns.get("completion"), where, "completion"),
            truncated=_checked_flag(columns.get("truncated"), where, "truncated"),
        )


def excerpt(value: Any) -> str:
    """Return `repr(value)`, shortened to fit in an error message."""
    text = repr(value)
    return text if len(text) <= _EXCERPT_CHARACTERS else text[: _EXCERPT_CHARACTERS - 3] + "..."


def _find_prompt_column(record: Record, prompt_column: str | None) -> str:
    wanted = ("prompt", "messages") if prompt_column is None else (prompt_column,)
    for column in wanted:
        if column in record.columns:
            return column
    seen = sorted(str(name) for name in record.columns)
    guesses = (nearest(column, seen) for column in wanted)
    guess = next((text for text in guesses if text), "")
    raise ConfigError(
        f"{record.where}: no column {' or '.join(map(repr, wanted))}.{guess} "
        f"Columns seen: {', '.join(seen) or 'none'}. Rename it, or set data.prompt_column."
    )


def _ends_with_assistant(prompt: Any) -> bool:
    if not isinstance(prompt, list) or not prompt or not isinstance(prompt[-1], dict):
        return False
    return prompt[-1].get("role") == "assistant"


def _checked_prompt(value: Any, where: str, column: str) -> Prompt:
    if isinstance(value, list):
        return _checked_conversation(value, where, column)
    if value is not None and not isinstance(value, str):
        raise ConfigError(
            f"{where}: {column} is of type {type(value).__name__}: {excerpt(value)}. "
            "Give a string or a list of {role, content} objects."
        )
    if not value or not value.strip():
        raise ConfigError(
            f"{where}: {column} is empty: {excerpt(value)}. Fill it or remove the row."
        )
    return value


def _checked_conversation(turns: list[Any], where: str, column: str) -> Conversation:
    checked = [_checked_turn(turn, where, f"{column}[{i}]") for i, turn in enumerate(turns)]
    if not any(turn["content"].strip() for turn in checked):
        raise ConfigError(
            f"{where}: {column} is empty: {excerpt(turns)}. Give at least one turn with text "
            "before the answer, or remove the row."
        )
    if checked[-1]["role"] == "assistant":
        raise ConfigError(
            f"{where}: {column} ends with an assistant turn: {excerpt(turns[-1])}. A prompt ends "
            "with a user or tool turn; of a column 'messages' the last assistant turn is dropped."
        )
    return checked


def _checked_turn(turn: Any, where: str, place: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise ConfigError(
            f"{where}: {place} is of type {type(turn).__name__}: {excerpt(turn)}. "
            "A turn is an object with role and content."
        )
    # Parquet and `datasets` fill the keys that only other turns have with None.
    turn = {key: value for key, value in turn.items() if value is not None}
    role, content = turn.get("role"), turn.get("content", "")
    if role not in ROLES:
        raise ConfigError(
            f"{where}: {place} has the unknown role {excerpt(role)}.{nearest(str(role), ROLES)} "
            f"Known: {', '.join(ROLES)}."
        )
    if not isinstance(content, str):
        raise ConfigError(
            f"{where}: {place} has content of type {type(content).__name__}: {excerpt(content)}. "
            "Give a string; other modalities are not supported."
        )
    return {**turn, "content": content}


def _checked_string(value: Any, where: str, column: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ConfigError(
            f"{where}: {column} is of type {type(value).__name__}: {excerpt(value)}. Give a string."
        )
    return value


def _checked_answer(value: Any, where: str) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return _checked_string(value, where, "answer")


def _checked_flag(value: Any, where: str, column: str) -> bool:
    by_text = {"true": True, "false": False}
    if isinstance(value, str) and value.lower() in by_text:
        return by_text[value.lower()]
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{where}: {column} is {excerpt(value)}. Give true or false.")
    return bool(value)
