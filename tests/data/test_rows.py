"""What a row may hold, and how one that holds something else is refused."""

import re
from typing import Any

import pytest

from opd_lightning.data import PromptRow
from opd_lightning.data.rows import Record
from opd_lightning.errors import ConfigError

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def _row(columns: dict[str, Any], prompt_column: str | None = None) -> PromptRow:
    return PromptRow.from_record(Record(4, "a.jsonl:5", columns), prompt_column)


def test_all_columns():
    row = _row(
        {
            "prompt": "Hi",
            "task": "chat",
            "answer": 5,
            "teacher_prompt": [USER],
            "completion": "Hello",
            "truncated": "True",
            "other": object(),
        }
    )
    assert row == PromptRow(4, "a.jsonl:5", "Hi", "chat", "5", [USER], "Hello", True)


def test_defaults():
    assert _row({"prompt": "Hi"}) == PromptRow(4, "a.jsonl:5", "Hi")
    assert _row({"prompt": "Hi", "task": None, "truncated": None}) == _row({"prompt": "Hi"})


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER, ASSISTANT], [USER]),
        ([USER], [USER]),
        ([USER, ASSISTANT, USER, ASSISTANT], [USER, ASSISTANT, USER]),
    ],
)
def test_messages_lose_their_last_assistant_turn(messages: list[dict], expected: list[dict]):
    assert _row({"messages": messages}).prompt == expected
    assert len(messages) in (1, 2, 4), "the argument is not edited"


def test_prompt_goes_before_messages_and_prompt_column_before_both():
    columns = {"prompt": "a", "messages": [USER], "question": "b"}
    assert _row(columns).prompt == "a"
    assert _row(columns, "question").prompt == "b"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"promt": "x", "b": 1},
            r"no column 'prompt' or 'messages'. Did you mean promt\?.*b, promt",
        ),
        ({}, r"no column 'prompt' or 'messages'.*Columns seen: none"),
        ({"prompt": ""}, r"prompt is empty: ''\. Fill it or remove"),
        ({"prompt": " \n"}, r"prompt is empty: ' \\n'"),
        ({"prompt": None}, r"prompt is empty: None"),
        ({"prompt": []}, r"prompt is empty: \[\]"),
        ({"prompt": [{"role": "user", "content": " "}]}, r"prompt is empty"),
        ({"messages": [ASSISTANT]}, r"messages is empty"),
        ({"prompt": 7}, r"prompt is of type int: 7\. Give a string or a list of \{role, content\}"),
        ({"prompt": {"role": "user"}}, r"prompt is of type dict"),
        ({"prompt": ["hi"]}, r"prompt\[0\] is of type str: 'hi'"),
        (
            {"prompt": [USER, {**USER, "role": "usr"}]},
            r"prompt\[1\].*role 'usr'\. Did you mean user\?",
        ),
        ({"prompt": [{"content": "x"}]}, r"prompt\[0\] has the unknown role None"),
        ({"prompt": [{"role": "user", "content": [1]}]}, r"prompt\[0\] has content of type list"),
        ({"prompt": [USER, ASSISTANT]}, r"ends with an assistant turn.*'messages'"),
        ({"prompt": "x", "teacher_prompt": ""}, r"teacher_prompt is empty"),
        ({"prompt": "x", "teacher_prompt": [{"role": "me"}]}, r"teacher_prompt\[0\].*role 'me'"),
        ({"prompt": "x", "task": 3}, r"task is of type int: 3\. Give a string"),
        ({"prompt": "x", "answer": True}, r"answer is of type bool: True"),
        ({"prompt": "x", "completion": ["y"]}, r"completion is of type list: \['y'\]"),
        ({"prompt": "x", "truncated": "maybe"}, r"truncated is 'maybe'\. Give true or false"),
    ],
)
def test_refused_rows(columns: dict[str, Any], expected: str):
    with pytest.raises(ConfigError, match=r"^a\.jsonl:5: ") as caught:
        _row(columns)
    assert re.search(expected, str(caught.value)), caught.value


def test_missing_prompt_column_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no column 'qestion'\. Did you mean question\?"):
        _row({"question": "x"}, "qestion")
