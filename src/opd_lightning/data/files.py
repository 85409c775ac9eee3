"""Readers of local files: every record knows its file and line."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from opd_lightning.data.rows import Record, excerpt
from opd_lightning.errors import ConfigError, nearest


def read_file(path: Path) -> list[Record]:
    """Return the records of a file, read according to its extension.

    Raises:
        ConfigError: If the extension is not known, or the content is not what the extension says.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            f"{path}: the extension '{path.suffix}' is not known.{nearest(path.suffix, READERS)} "
            f"Known: {', '.join(READERS)}."
        )
    try:
        return list(reader(path))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text ({error.reason}, byte {error.start})."
        ) from error


def _read_jsonl(path: Path) -> Iterator[Record]:
    index = 0
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                columns = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"{where}: not valid JSON ({error.msg}, column {error.colno}): "
                    f"{excerpt(line.rstrip())}. Give one JSON object a line."
                ) from error
            yield _record(index, where, columns)
            index += 1


def _read_json(path: Path) -> Iterator[Record]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if text.strip() else ""
        raise ConfigError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}): {excerpt(line)}. "
            "Give one list of objects; with one object a line, name the file .jsonl."
        ) from error
    if not isinstance(items, list):
        raise ConfigError(
            f"{path}: holds a {type(items).__name__}: {excerpt(items)}. Give a list of objects; "
            "with one object a line, name the file .jsonl."
        )
    for index, columns in enumerate(items):
        yield _record(index, f"{path}[{index}]", columns)


def _read_csv(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines, strict=True)
        try:
            for index, columns in enumerate(table):
                where = f"{path}:{table.line_num}"
                if None in columns:
                    raise ConfigError(
                        f"{where}: more cells than the {len(table.fieldnames)} columns of the "
                        f"header: {excerpt(columns[None])}. Quote cells that hold commas."
                    )
                yield Record(index, where, {name: cell or None for name, cell in columns.items()})
        except csv.Error as error:
            raise ConfigError(
                f"{path}:{table.reader.line_num}: not valid CSV ({error}). Mend the line, or use "
                ".jsonl."
            ) from error


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet  # slow to import, and of use here only

    try:
        items = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a readable Parquet file ({error}).") from error
    for index, columns in enumerate(items):
        yield Record(index, f"{path}[{index}]", columns)


def _record(index: int, where: str, columns: object) -> Record:
    if not isinstance(columns, dict):
        raise ConfigError(
            f"{where}: a {type(columns).__name__} where an object was expected: "
            f"{excerpt(columns)}. "
            'Give for example {"prompt": "..."}.'
        )
    return Record(index, where, columns)


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
