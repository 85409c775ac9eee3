"""The figures of Diagnostics, after figures 2 and 4 of arXiv 2603.25562."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opd_lightning.figures import COLORS, GREY, new_figure, tidy
from opd_lightning.metrics.tokens import TokenTable

BLUE, RED, GREEN = COLORS[:3]
_MOST_POINTS = 4000


def sampled_tokens(table: TokenTable) -> Figure:
    """Draw the teacher's probability of each sampled token against the student's (figure 2)."""
    figure, axes = _figure(4.6, 4.4)
    step = max(1, len(table["student_logprob"]) // _MOST_POINTS)
    student, teacher = (
        table[c][::step].exp().clamp(min=1e-12) for c in ("student_logprob", "teacher_logprob")
    )
    below = teacher < student
    axes.scatter(student[below], teacher[below], s=6, alpha=0.4, color=RED, label="A < 0")
    axes.scatter(student[~below], teacher[~below], s=6, alpha=0.4, color=BLUE, label="A ≥ 0")
    axes.plot([1e-12, 1], [1e-12, 1], color=GREY, linewidth=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(1e-6, 1.5),
        ylim=(1e-12, 2),
        xlabel="student's probability of the sampled token",
        ylabel="teacher's",
        title=f"{float(below.float().mean()):.0%} of the tokens have a negative advantage",
    )
    axes.legend(loc="lower right")
    return figure


def positions(buckets: list[dict[str, float]]) -> Figure:
    """Draw advantage (boxes) and entropies by position in the completion (figure 4)."""
    figure, (boxes, lines) = _figure(8.4, 3.6, columns=2)
    places = range(len(buckets))
    names = [f"{b['first']:.0f}" for b in buckets]
    boxes.bxp(
        [
            {
                "med": b["advantage_q50"],
                "q1": b["advantage_q10"],
                "q3": b["advantage_q90"],
                "whislo": b["advantage_q01"],
                "whishi": b["advantage_q99"],
                "label": name,
            }
            for b, name in zip(buckets, names, strict=True)
        ],
        showfliers=False,
        positions=list(places),
    )
    boxes.set(
        xlabel="first position of the bucket",
        ylabel="advantage, nats",
        title="advantage: 1, 10, 50, 90 and 99 %",
    )
    for column, colour, label in [
        ("student_entropy", BLUE, "student"),
        ("teacher_entropy", RED, "teacher"),
    ]:
        lines.plot(places, [b[column] for b in buckets], "o-", color=colour, label=label)
    lines.set_xticks(list(places), names)
    lines.set(xlabel="first position of the bucket", ylabel="entropy, nats", title="entropy")
    lines.set_ylim(bottom=0)
    lines.legend()
    return figure


def offending(entries: list[dict[str, Any]]) -> Figure:
    """Draw the tokens that carry most of the signal, with their share and mean advantage."""
    figure, axes = _figure(6.4, 0.9 + 0.32 * max(1, len(entries)))
    names = [_shown(e["string"]) for e in entries]
    places = list(range(len(entries)))[::-1]
    colours = [RED if e["advantage"] < 0 else BLUE for e in entries]
    axes.barh(places, [e["share"] for e in entries], color=colours)
    for place, entry in zip(places, entries, strict=True):
        axes.text(
            entry["share"],
            place,
            f"  A {entry['advantage']:.1f}, {entry['count']} times",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(places, names, fontfamily="monospace", fontsize=8)
    axes.set(xlabel="share of the sum of |A|", title="tokens that carry most of the signal")
    axes.margins(x=0.35)
    axes.set_xlim(left=0)
    return figure


def support(history: list[dict[str, Any]]) -> Figure:
    """Draw both models' mass on the teacher's support, and the overlap of supports, over steps."""
    figure, axes = _figure(6.4, 3.6)
    steps = [entry["step"] for entry in history]
    for key, colour, label in [
        ("support/teacher_mass", RED, "teacher's mass on its top K"),
        ("support/student_mass", BLUE, "student's mass on the teacher's top K"),
        ("support/overlap", GREEN, "share of the top K that both have"),
    ]:
        axes.plot(steps, [e["measures"][key] for e in history], "o-", color=colour, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="optimiser step", ylim=(0, 1.02), title="support")
    axes.legend(loc="lower right", fontsize=8)
    return figure


def _shown(string: str) -> str:
    """Return a token with its blanks and control characters made visible."""
    return repr(string)[1:-1].replace(" ", "␣").replace("$", r"\$") or "(empty)"


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = new_figure(width, height)
    axes = figure.subplots(1, columns)
    for one in [axes] if columns == 1 else axes:
        tidy(one)
    return figure, axes
