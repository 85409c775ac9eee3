"""The figures of `opd study landing`."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from opd_lightning.figures import COLORS, GREY, new_figure, save, spread, tidy
from opd_lightning.study.tables import Row

# those whose way is drawn; the others arrive at the teacher, or near one of these
_DRAWN = {
    "reverse KL": (COLORS[6], "-"),
    "top-3": (COLORS[1], "-"),
    "student's top-3": (COLORS[1], "--"),
    "both top-3": (COLORS[1], ":"),
    "top-3 and sampled": (COLORS[4], "-"),
    "top-3, not renormalised": (COLORS[3], "-"),
    "top-3, sampled tail as published": (COLORS[3], "--"),
    "top-3, tail bucket": (COLORS[0], "--"),
    "top-3 − 0.1 log π(S)": (COLORS[2], "-"),
}


def draw_landing(
    table: Sequence[Row], paths: Sequence[Row], teacher_mass: float, path: Path
) -> Path:
    """Draw where the objectives end, and the student's mass on S on the way there.

    Args:
        table: As `landing_rows` returns it, the start first.
        paths: The same.
        teacher_mass: q(S).
        path: The PNG to write.

    Returns:
        `path`.
    """
    figure = new_figure(14, 6.4)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.0, 0.8, 1.9])
    _draw_ends(left, table, "support_mass", "π(S), student mass on\nthe teacher's top 3")
    _draw_ends(middle, table, "total_variation", "total variation\nto the teacher")
    middle.set_yticklabels([])
    left.axvline(teacher_mass, color="black", linewidth=1)
    left.text(teacher_mass, 1.005, f"q(S) = {teacher_mass:.2f}", ha="center", fontsize=9,
              transform=left.get_xaxis_transform())  # fmt: skip
    _draw_paths(right, paths, teacher_mass)
    figure.suptitle(
        "Where gradient descent on each objective's expected gradient ends "
        "(one prefix, 10 tokens, free logits)"
    )
    return save(figure, path)


def _draw_ends(axes: Axes, table: Sequence[Row], key: str, label: str) -> None:
    names = [str(row["objective"]) for row in table]
    colors = [_DRAWN.get(name, (GREY, ""))[0] for name in names]
    values = [float(row[key]) for row in table]
    axes.barh(names, values, color=colors, height=0.6)
    for place, value in enumerate(values):
        axes.text(1.02, place, f"{value:.3f}", va="center", fontsize=9,
                  transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set(xlabel=label, xlim=(0, 1.05 * max(values)), ylim=(len(names) - 0.4, -0.6))
    tidy(axes, "x")


def _draw_paths(axes: Axes, paths: Sequence[Row], teacher_mass: float) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in paths:
        if row["objective"] in _DRAWN:
            at = (float(row["step"]), float(row["support_mass"]))
            curves.setdefault(str(row["objective"]), []).append(at)
    if not curves:
        return
    last = max(points[-1][0] for points in curves.values())
    heights = spread([points[-1][1] for points in curves.values()], 0.032)
    for (name, points), height in zip(curves.items(), heights, strict=True):
        color, style = _DRAWN[name]
        # what has arrived stays there
        whole = [*points, (last, points[-1][1])]
        axes.plot(*zip(*whole, strict=True), style, color=color, linewidth=1.8)
        axes.annotate(name, (last, height), xytext=(6, 0), textcoords="offset points",
                      va="center", fontsize=9, color=color)  # fmt: skip
    axes.axhline(teacher_mass, color="black", linewidth=1, alpha=0.5)
    axes.text(1, teacher_mass + 0.01, f"q(S) = {teacher_mass:.2f}", fontsize=9)
    axes.set_xscale("symlog", linthresh=1)
    axes.set(xlabel="gradient step (size 0.5 on the logits)", ylabel="π(S)", xlim=(0, last))
    tidy(axes)


def draw_imbalance(rows: Sequence[Row], path: Path) -> Path:
    """Draw how uneven sampled advantages are, and how noisy one sample's gradient.

    Args:
        rows: As `imbalance_rows` returns them.
        path: The PNG to write.

    Returns:
        `path`.
    """
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    shares = {
        "probability of A < 0": "negative_probability",
        "positive part of Σ|A|": "positive_share",
        "Σ|A| in the top 10 % of tokens": "top_10_percent_share",
        "Σ|A| in the top 1 %": "top_1_percent_share",
    }
    _grouped_bars(left, rows, shares, "share")
    left.set_ylim(0, 1)
    left.axhline(0.5, color="black", linewidth=0.8, alpha=0.5)
    sizes = {
        "variance of one sample's gradient": "one_sample_variance",
        "squared norm of the exact gradient": "squared_gradient",
    }
    _grouped_bars(right, rows, sizes, "nats² a prefix")
    right.set_yscale("log")
    right.set_ylim(top=60)
    figure.suptitle("One sampled token: A = log q(y) − log π(y)")
    return save(figure, path)


def _grouped_bars(axes: Axes, rows: Sequence[Row], keys: dict[str, str], label: str) -> None:
    width = 0.8 / len(keys)
    for i, (name, key) in enumerate(keys.items()):
        at = [place + (i - (len(keys) - 1) / 2) * width for place in range(len(rows))]
        bars = axes.bar(
            at, [float(row[key]) for row in rows], width * 0.9, color=COLORS[i], label=name
        )
        axes.bar_label(bars, fmt="{:.3g}", fontsize=8)
    axes.set_xticks(range(len(rows)), [f"τ = {r['tau']:g}, σ = {r['sigma']:g}" for r in rows])
    axes.set_xlabel("teacher sharpness τ, student noise σ")
    axes.set_ylabel(label)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    tidy(axes, "y")
