"""The rows that a study returns: to a CSV file, and as aligned text."""

import csv
from collections.abc import Sequence
from pathlib import Path

Row = dict[str, str | int | float]


def write_csv(rows: Sequence[Row], path: Path) -> Path:
    """Write rows of the same columns at full precision and return `path`; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_csv(path: Path) -> list[Row]:
    """Return the rows that `write_csv` wrote: whole numbers as int, other numbers as float."""
    with path.open(newline="") as lines:
        return [{k: _parsed(v) for k, v in row.items()} for row in csv.DictReader(lines)]


def table(rows: Sequence[Row], columns: Sequence[str] | None = None, digits: int = 4) -> str:
    """Return rows of the same columns as aligned text: words to the left, numbers to the right.

    Args:
        rows: At least one.
        columns: Those to show, in this order; default all.
        digits: Significant digits of a float; below 1e-9 it is shown as 0.

    Example:
        >>> print(table([{"objective": "ReverseKL", "steps": 9}]))
        objective  steps
        ReverseKL      9
    """
    names = list(rows[0] if columns is None else columns)
    lines = [names, *[[_shown(row[name], digits) for name in names] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    words = [isinstance(rows[0][name], str) for name in names]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, words, strict=True)
        ).rstrip()
        for line in lines
    )


def _shown(value: str | int | float, digits: int) -> str:
    if not isinstance(value, float):
        return str(value)
    if abs(value) < 1e-9:
        return "0"
    return f"{value:.{digits}g}"


def _parsed(text: str) -> str | int | float:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
