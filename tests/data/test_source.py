"""Every source gives the same rows; what cannot be read is refused with its place and advice."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from opd_lightning.data import PromptSource
from opd_lightning.errors import ConfigError

ROWS = [
    {"prompt": 'Say "a, b"', "task": "talk", "answer": "042"},
    {"prompt": "two\nlines é", "task": None, "answer": None},
]


def _write(path: Path) -> str:
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return str(path)


def _refusal(spec: str | Path, prompt_column: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        PromptSource(str(spec), prompt_column).rows()
    return str(caught.value)


@pytest.mark.parametrize(
    ("extension", "places"),
    [
        ("jsonl", [":1", ":3"]),
        ("json", ["[0]", "[1]"]),
        ("csv", [":2", ":4"]),  # the second record takes two lines
        ("parquet", ["[0]", "[1]"]),
    ],
)
def test_file_formats_give_the_same_rows(tmp_path: Path, extension: str, places: list[str]):
    spec = _write(tmp_path / f"prompts.{extension}")
    first, second = PromptSource(spec).rows()
    assert (first.index, first.prompt, first.task, first.answer) == (0, 'Say "a, b"', "talk", "042")
    assert (second.index, second.prompt) == (1, "two\nlines é")
    assert (second.task, second.answer, second.completion) == ("default", None, None)
    assert [first.where, second.where] == [spec + place for place in places]


def test_conversations_of_parquet_lose_the_keys_of_other_turns(tmp_path: Path):
    turns = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b", "name": "sum"}]
    path = tmp_path / "prompts.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": turns}]), path)
    assert PromptSource(str(path)).rows()[0].prompt == turns


def test_dataset_name_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "arithmetic"
    folder.mkdir()
    for split, count in (("train", 3), ("test", 2)):
        lines = [json.dumps({"prompt": f"{split} {i}"}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    rows = PromptSource(f"{folder}:test").rows()
    assert [(row.index, row.prompt) for row in rows] == [(0, "test 0"), (1, "test 1")]
    assert rows[1].where == f"{folder}:test[1]"
    assert len(PromptSource(f"{folder}:default:train[:2]").rows()) == 2
    message = _refusal(folder)
    assert "splits train, test" in message and f"'{folder}:train'" in message
    assert "tset" in _refusal(f"{folder}:tset")
    (folder / "test.jsonl").unlink()
    assert len(PromptSource(str(folder)).rows()) == 3


def test_file_not_found_names_the_nearest(tmp_path: Path):
    (tmp_path / "prompts.jsonl").touch()
    message = _refusal(tmp_path / "promts.jsonl")
    assert "promts.jsonl: file not found. Did you mean prompts.jsonl?" in message
    assert "Files in" in _refusal(tmp_path / "x.csv") and "prompts.jsonl" in message
    assert f"no folder {tmp_path / 'none'}" in _refusal(tmp_path / "none" / "x.csv")


def test_name_that_is_no_dataset(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = _refusal("no-such-folder-or-dataset:train")
    assert "'no-such-folder-or-dataset:train' is neither a file nor a dataset" in message
    assert "NAME:CONFIG:SPLIT" in message
    assert "'a:b:c:d' is not a dataset name" in _refusal("a:b:c:d")


def test_folder_that_is_not_there(tmp_path: Path):
    (tmp_path / "prompts.csv").touch()
    message = _refusal(f"{tmp_path / 'prompts'}:train")
    assert "prompts:train: file or folder not found. Did you mean prompts.csv?" in message


def test_unknown_extension(tmp_path: Path):
    path = tmp_path / "prompts.jsonI"
    path.write_text("{}")
    message = _refusal(path)
    assert "'.jsonI' is not known. Did you mean .json" in message
    assert ".jsonl, .json, .csv, .parquet" in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            '{"prompt": "x"}\n\n{"prompt": oh}\n',
            r":3: not valid JSON .*\{\"prompt\": oh\}",
        ),
        (
            "a.jsonl",
            '{"prompt": "x"}\n["y"]\n',
            r":2: a list where an object was expected: \['y'\]",
        ),
        ("a.json", '[{"prompt": "x"},\n oops]', r":2: not valid JSON .*oops.*\.jsonl"),
        ("a.json", '{"prompt": "x"}', r"holds a dict.*list of objects.*\.jsonl"),
        ("a.json", '[{"prompt": "x"}, 3]', r"\[1\]: a int where an object was expected: 3"),
        ("a.json", "", r":1: not valid JSON"),
        ("a.csv", "prompt,task\nhi,add\nho,add,5\n", r":3: more cells than the 2 columns.*'5'"),
        ("a.csv", 'prompt,task\n"a"b,c\n', r":2: not valid CSV"),
        ("a.parquet", "prompt", r"a\.parquet: not a readable Parquet file"),
        ("a.jsonl", b'{"prompt": "\xff"}', r"a\.jsonl: not UTF-8 text"),
        ("a.jsonl", "\n", r"a\.jsonl: no rows\. Give a file"),
        ("a.json", "[]", r"a\.json: no rows"),
        ("a.csv", "prompt,task\n", r"a\.csv: no rows"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str | bytes, expected: str):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = _refusal(path)
    assert str(path) in message
    assert re.search(expected, message), message


def test_completions_for_all_rows_or_none(write_jsonl: Callable[..., str]):
    spec = write_jsonl({"prompt": "a", "completion": "b"}, {"prompt": "c"}, {"prompt": "d"})
    message = _refusal(spec)
    assert f"{spec}:2: no completion, but 1 of 3 rows have one" in message
    assert "off-policy" in message


def test_errors_are_short(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": ' + "x" * 5000 + "}")
    assert len(_refusal(path)) < 300 + len(str(path))
