"""The findings as a table, as JSON and as the page docs/objectives.md."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill

from opd_lightning.errors import ConfigError
from opd_lightning.objectives import known_objectives, known_terms
from opd_lightning.tools.audit.judge import EXACT, SEEDS, SIZES, Finding

MARKER = "<!-- What follows is written by: opd audit --write docs/objectives.md -->"
_SECTIONS = ("Loss", "Gradient", "Detached", "Source", "Needs", "Choose")
_COLUMNS = (
    "objective",
    "declares",
    "follows",
    "bias",
    "variance",
    "at teacher",
    "off support",
    "needs",
    "head rows",
    "teacher numbers",
    "chunked",
    "differences",
)


def setting() -> str:
    """Return in one paragraph what was enumerated."""
    sizes = " and ".join(f"{v} tokens, {t} a completion" for v, t in SIZES)
    return (
        f"Exact enumeration in float64 of all completions of small languages ({sizes}; seeds "
        f"{', '.join(map(str, SEEDS))}; k = 3), gradients on logits, a completion's token losses "
        "summed. bias: relative distance of the expected gradient from that of the declared "
        "divergence, or else of the nearest. variance: of one completion's gradient, by length of "
        "completion. at teacher: norm of the expected gradient where student = teacher. off "
        "support: whether a step moves mass off the teacher's top 3 (out) or back (in), at the "
        "teacher / with half of their mass moved off. head rows, teacher numbers: read a token, V "
        "the vocabulary. differences: the gradient is that of the loss's value, by finite "
        "differences; estimators have none."
    )


def _cells(finding: Finding) -> list[str]:
    difference = finding.difference_error
    return [
        finding.name,
        finding.target or "-",
        finding.follows,
        _number(finding.bias),
        " / ".join(_number(v) for v in finding.variance),
        _number(finding.norm_at_teacher),
        " / ".join(finding.pull),
        finding.needs,
        finding.head_rows,
        finding.teacher_numbers,
        "= dense" if finding.chunked_error < EXACT else "differs",
        "-" if difference is None else "agree" if difference < 1e-6 else "differ",
    ]


def _number(value: float) -> str:
    """Return three digits; what float64 cannot tell from 0 is 0."""
    return "0" if abs(value) < EXACT else f"{value:.3g}"


def as_table(findings: Sequence[Finding]) -> str:
    """Return the findings as aligned text, complaints and reasons below."""
    rows = [list(_COLUMNS), *[_cells(finding) for finding in findings]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    reasons = [f"{f.name}: no target: {f.target_reason}" for f in findings if f.target_reason]
    complaints = [f"FAILED {f.name} {f.complaint}" for f in findings if f.complaint]
    blocks = ["\n".join(lines), "\n".join(reasons), "\n".join(complaints), fill(setting(), 100)]
    return "\n\n".join(block for block in blocks if block)


def as_json(findings: Sequence[Finding]) -> str:
    """Return the findings with all digits; an infinite number is null."""
    cleaned = [
        {k: None if isinstance(v, float) and not v < float("inf") else v for k, v in row.items()}
        for row in map(asdict, findings)
    ]
    return json.dumps({"setting": setting(), "findings": cleaned}, indent=2)


def as_markdown(findings: Sequence[Finding]) -> str:
    """Return a section for each class, with its equations, and the table of its settings."""
    classes = known_objectives() | known_terms()
    by_class: dict[str, list[Finding]] = {}
    for finding in findings:
        by_class.setdefault(finding.name.split("(")[0], []).append(finding)
    blocks = ["## What the audit found", setting(), _markdown_table(findings)]
    reasons = [f"- `{f.name}`: {f.target_reason}" for f in findings if f.target_reason]
    blocks += ["No target is declared by:", "\n".join(reasons)] if reasons else []
    for name, own in by_class.items():
        blocks.append(f"## {name}")
        if name in classes:
            blocks += _from_docstring(classes[name].__doc__)
        blocks.append(_markdown_table(own))
    return "\n\n".join(blocks) + "\n"


def _markdown_table(findings: Sequence[Finding]) -> str:
    rows = [list(_COLUMNS), ["---"] * len(_COLUMNS)]
    rows += [[f"`{cells[0]}`", *cells[1:]] for cells in map(_cells, findings)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _from_docstring(text: str) -> list[str]:
    """Return the first sentence and the list of Loss, Gradient, Detached, Source, Needs, Choose."""
    lines = [line.strip() for line in text.split("\n")]
    items: list[str] = []
    inside = False
    for line in lines[1:]:
        if re.match(rf"({'|'.join(_SECTIONS)})\b[^:]*:", line):
            head, _, rest = line.partition(":")
            items.append(f"- **{head}**:{rest}")
            inside = True
        elif not line:
            inside = False
        elif inside:
            items[-1] += f" {line}"
    return [lines[0], "\n".join(items)]


def write_page(path: str, findings: Sequence[Finding]) -> None:
    """Replace what follows the marker in the page at `path`.

    Raises:
        ConfigError: If there is no such file, or no marker in it.
    """
    page = Path(path)
    text = page.read_text() if page.is_file() else ""
    if MARKER not in text:
        raise ConfigError(
            f"{path!r} is no page with the line {MARKER!r}. Name docs/objectives.md, or use "
            "--format markdown and redirect it."
        )
    page.write_text(text.split(MARKER)[0] + MARKER + "\n\n" + as_markdown(findings))
