"""`opd report`: one page about one run or several side by side."""

import base64
import csv
import html
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.ticker import MaxNLocator

from opd_lightning.errors import ConfigError, nearest
from opd_lightning.figures import COLORS, new_figure, tidy
from opd_lightning.resume import leaves

_CURVES = {
    "val/kl/reverse": "reverse KL, held out, nats a token",
    "kl/reverse": "reverse KL of training rollouts, nats a token",
    "loss": "loss",
    "entropy": "entropy of the student, nats",
    "teacher/entropy": "entropy of the teacher, nats",
    "grad_norm": "gradient norm before clipping",
    "completions/mean_length": "completion length, tokens",
    "completions/clipped_ratio": "share of completions ended by the limit",
    "perf/tokens_per_second": "tokens a second",
    "diagnostics/support/overlap": "overlap of both top-K supports",
    "diagnostics/support/student_mass": "student's mass on the teacher's support",
    "diagnostics/imbalance/negative_frac": "share of tokens with a negative advantage",
    "diagnostics/imbalance/share_of_top_1pct": "share of Σ|A| of the top 1 % of tokens",
    "diagnostics/mismatch/extreme_frac": "share of tokens with A < −10",
    "diagnostics/repetition/ngrams": "share of repeated 4-grams",
}
_STYLE = """
body{font:15px/1.55 system-ui,sans-serif;color:#222;max-width:72rem;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.6rem} h2{margin-top:2.5rem;border-bottom:1px solid #ddd;padding-bottom:.2rem}
table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.25rem .7rem;border-bottom:1px solid #eee;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(20rem,1fr));gap:1rem}
img{max-width:100%} pre{white-space:pre-wrap;background:#f7f7f7;padding:.6rem;border-radius:4px}
iframe{width:100%;height:18rem;border:1px solid #ddd;border-radius:4px}
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}
"""


@dataclass
class Run:
    """What a run folder holds.

    Attributes:
        name: Shown; the shortest end of its path that no other run has.
        folder: Where it is.
        points: Log key -> (step, value) pairs, steps rising.
        summary: Of `summary.json`; empty while the run is under way.
        config: Dotted name -> value.
    """

    name: str
    folder: Path
    points: dict[str, list[tuple[int, float]]]
    summary: dict[str, Any]
    config: dict[str, Any]


def report(folders: list[str | Path], out: str | Path | None = None) -> Path:
    """Write the page with its pictures inside, and the pictures beside it; return its path.

    Args:
        folders: Run folders of `opd fit`, finished or under way.
        out: Folder to write; default: `report` in the first run's folder.

    Raises:
        ConfigError: If a folder holds no run.
    """
    paths = [_run_folder(Path(folder)) for folder in folders]
    runs = [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    target = Path(out) if out is not None else paths[0] / "report"
    target.mkdir(parents=True, exist_ok=True)
    body = [
        _results(runs),
        _curves(runs, target),
        *(_diagnostics(run) for run in runs),
        *(_completions(run) for run in runs),
        _differences(runs),
    ]
    page = target / "index.html"
    title = html.escape(", ".join(run.name for run in runs))
    page.write_text(
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title>"
        f"<style>{_STYLE}</style><h1>{title}</h1>{''.join(body)}</html>",
        encoding="utf-8",
    )
    return page


# ------------------------------------------------------------------------------------- reading


def _run_folder(folder: Path) -> Path:
    if (folder / "metrics.csv").is_file():
        return folder
    versions = sorted(folder.glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    if versions:
        return versions[-1].parent
    siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
    near = "" if folder.exists() else nearest(folder.name, siblings)
    raise ConfigError(
        f"{str(folder)!r} holds no run: metrics.csv is missing.{near} Give the folder that opd fit "
        "names at its end, such as runs/quickstart/version_0."
    )


def _names(folders: list[Path]) -> list[str]:
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"the same run was given twice: {', '.join(map(str, folders))}.")


def _read(folder: Path, name: str) -> Run:
    points: dict[str, list[tuple[int, float]]] = {}
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            for key, value in row.items():
                if key != "step" and value:
                    points.setdefault(key, []).append((int(float(row["step"])), float(value)))
    summary, config = folder / "summary.json", folder / "config.yaml"
    read = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return Run(
        name,
        folder,
        {key: sorted(found) for key, found in points.items()},
        json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {},
        dict(leaves(read)) if read else {},
    )


# ------------------------------------------------------------------------------------- sections


def _results(runs: list[Run]) -> str:
    keys = [
        key
        for key in dict.fromkeys(key for run in runs for key in run.points)
        if key.startswith(("val/", "eval/", "test/")) and not key.endswith(("/low", "/high"))
    ]
    rows = [
        f"<tr><td>{html.escape(key)}</td>{''.join(_before_after(run, key) for run in runs)}</tr>"
        for key in keys
    ]
    for key in ("steps", "seconds", "tokens", "tokens_per_second"):
        cells = "".join(f"<td class='n'>{run.summary.get(key, '–')}</td>" for run in runs)
        rows.append(f"<tr><td>{key.replace('_', ' ')}</td>{cells}</tr>")
    heads = "".join(
        f"<th><span class='key' style='background:{_colour(i)}'></span>{html.escape(run.name)}</th>"
        for i, run in enumerate(runs)
    )
    return (
        "<h2>Results</h2><p>First → last value, with the change, and the interval where one was "
        f"estimated.</p><table><tr><th></th>{heads}</tr>{''.join(rows)}</table>"
    )


def _before_after(run: Run, key: str) -> str:
    found = run.points.get(key)
    if not found:
        return "<td class='n'>–</td>"
    (_, first), (step, last) = found[0], found[-1]
    interval = [run.points.get(f"{key}/{end}", []) for end in ("low", "high")]
    bounds = [dict(ends)[step] for ends in interval if step in dict(ends)]
    shown = f"{last:.4g}"
    if len(found) > 1:
        change = f" ({(last - first) / abs(first):+.0%})" if first else ""
        shown = f"{first:.4g} → {shown}{change}"
    if len(bounds) == 2:
        shown += f" [{bounds[0]:.4g}, {bounds[1]:.4g}]"
    return f"<td class='n'>{shown}</td>"


def _curves(runs: list[Run], target: Path) -> str:
    evaluated = dict.fromkeys(
        key
        for run in runs
        for key in run.points
        if key.startswith("eval/") and not key.endswith(("/low", "/high"))
    )
    pictures = []
    for key, title in {**_CURVES, **{key: key for key in evaluated}}.items():
        drawn = [(i, run) for i, run in enumerate(runs) if key in run.points]
        if not drawn:
            continue
        figure = new_figure(4.6, 3)
        axes = figure.subplots()
        for i, run in drawn:
            style = "o-" if len(run.points[key]) < 30 else "-"
            axes.plot(
                *zip(*run.points[key], strict=True),
                style,
                markersize=3,
                color=_colour(i),
                label=run.name,
            )
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("optimiser step", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=8)
        tidy(axes)
        if len(runs) > 1:
            axes.legend(fontsize=7)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=120)
        (target / f"{key.replace('/', '_')}.png").write_bytes(data.getvalue())
        pictures.append(_image(data.getvalue(), title))
    return f"<h2>Curves</h2><div class='grid'>{''.join(pictures)}</div>"


def _diagnostics(run: Run) -> str:
    folder = run.folder / "diagnostics"
    measured = sorted(folder.glob("step_*.json"))
    if not measured:
        return ""
    found = json.loads(measured[-1].read_text(encoding="utf-8"))
    offending = "".join(
        f"<tr><td><code>{html.escape(repr(entry['string']))}</code></td>"
        f"<td class='n'>{entry['token_id']}</td><td class='n'>{entry['count']}</td>"
        f"<td class='n'>{entry['share']:.1%}</td><td class='n'>{entry['advantage']:.2f}</td>"
        f"<td class='n'>{entry['student_logprob']:.2f}</td>"
        f"<td class='n'>{entry['teacher_logprob']:.2f}</td></tr>"
        for entry in found["offending_tokens"]
    )
    pictures = [
        _image(path.read_bytes(), path.stem)
        for kind in ("sampled_tokens", "positions")
        for path in sorted(folder.glob(f"step_*_{kind}.png"))[-1:]
    ]
    pages = sorted(folder.glob("step_*.html"))
    heat_map = html.escape(pages[-1].read_text(encoding="utf-8")) if pages else ""
    return (
        f"<h2>Diagnostics of {html.escape(run.name)}, step {found['step']}</h2>"
        f"<div class='grid'>{''.join(pictures)}</div>"
        "<h3>Tokens that carry most of the signal</h3><table><tr><th>token</th><th>id</th>"
        "<th>count</th><th>share of Σ|A|</th><th>mean A</th><th>log π</th><th>log q</th></tr>"
        f"{offending}</table><h3>One completion by advantage</h3>"
        f"<iframe sandbox title='advantage by token' srcdoc=\"{heat_map}\"></iframe>"
    )


def _completions(run: Run) -> str:
    samples = run.summary.get("samples") or {}
    if not samples:
        return ""
    columns = [
        f"<div><h3>{when}</h3>"
        + "".join(
            f"<p><b>{html.escape(s.get('prompt', ''))}</b></p>"
            f"<pre>{html.escape(s.get('completion', ''))}</pre>"
            for s in samples.get(when, [])
        )
        + "</div>"
        for when in ("before", "after")
    ]
    return (
        f"<h2>Completions of {html.escape(run.name)}</h2><div class='grid'>{''.join(columns)}</div>"
    )


def _differences(runs: list[Run]) -> str:
    if len(runs) < 2:
        return ""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    missing = object()
    rows = []
    for key in keys:
        values = [run.config.get(key, missing) for run in runs]
        if any(value != values[0] for value in values):
            cells = "".join(
                f"<td>{'–' if v is missing else html.escape(str(v))}</td>" for v in values
            )
            rows.append(f"<tr><td><code>{html.escape(key)}</code></td>{cells}</tr>")
    heads = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    table = "".join(rows) or f"<tr><td colspan='{len(runs) + 1}'>none</td></tr>"
    return f"<h2>Settings that differ</h2><table><tr><th></th>{heads}</tr>{table}</table>"


def _colour(i: int) -> str:
    return COLORS[i % len(COLORS)]


def _image(data: bytes, title: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f"<img alt='{html.escape(title)}' src='data:image/png;base64,{encoded}'>"
