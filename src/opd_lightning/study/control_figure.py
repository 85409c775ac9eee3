"""The figures of `opd study control`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.image import AxesImage

from opd_lightning.figures import COLORS, new_figure, save, tidy
from opd_lightning.study.control_policy import BINS, FARTHEST, GOALS, STARTS, STEPS, TASKS
from opd_lightning.study.tables import Row

_SHOWN_GAMMAS = (0.0, 0.5, 1.0)
_MARKERS = "osD^v"


def _values(rows: Sequence[Row], key: str, **where: object) -> list[float]:
    return [float(r[key]) for r in rows if all(r[name] == v for name, v in where.items())]


def _log_scale(axes: Axes) -> None:
    """Make the vertical axis logarithmic, over a decade at least.

    What overflowed has no place on it.
    """
    heights = []
    for line in axes.lines:
        y = np.asarray(line.get_ydata(), dtype=float)
        line.set_ydata(np.where(np.isfinite(y) & (y > 0), y, np.nan))
        heights.append(line.get_ydata())
    if np.isnan(heights).all():
        axes.set_yticks([])
        axes.text(0.5, 0.5, "all overflowed", ha="center", transform=axes.transAxes)
    else:
        axes.relim()
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        wider = max(1.0, (20 * low / high) ** 0.5)
        axes.set_ylim(low / wider, high * wider)


def _gammas(rows: Sequence[Row]) -> list[float]:
    return sorted({float(row["gamma"]) for row in rows})


def draw_variances(curves: Sequence[Row], title: str, path: Path) -> Path:
    """Draw the variance of each gamma over the iterations, one panel a task.

    Args:
        curves: Of one seed: `gamma`, `task`, `iteration`, `variance`.
        title: Of the whole.
        path: The PNG to write.

    Returns:
        `path`.
    """
    figure = new_figure(12, 4.4)
    panels = figure.subplots(1, len(TASKS), sharey=True)
    for axes, task, start, goal in zip(panels, TASKS, STARTS, GOALS, strict=True):
        for i, gamma in enumerate(_gammas(curves)):
            axes.plot(
                _values(curves, "iteration", task=task, gamma=gamma),
                _values(curves, "variance", task=task, gamma=gamma),
                color=COLORS[i % len(COLORS)],
                linewidth=1.3,
                label=f"{gamma:g}",
            )
        _log_scale(axes)
        axes.set(
            xlabel="iteration", title=f"{task}: from {start:+g} to {goal:+g}".replace("-", "−")
        )
        tidy(axes)
    panels[0].set_ylabel("variance of the output layer's gradient")
    panels[1].legend(frameon=False, title="γ", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(title)
    return save(figure, path)


def draw_visits(rows: Sequence[Row], visits: Sequence[Row], title: str, path: Path) -> Path:
    """Draw how often each position is visited at each step: a row a task, a column a gamma.

    Args:
        rows: Of one seed, as `findings` returns them.
        visits: The same seed's filled bins.
        title: Of the whole.
        path: The PNG to write.

    Returns:
        `path`.
    """
    shown = [gamma for gamma in _gammas(rows) if gamma in _SHOWN_GAMMAS]
    figure = new_figure(3.4 * len(shown) + 1.2, 6.6)
    panels = figure.subplots(len(TASKS), len(shown), sharex=True, sharey=True, squeeze=False)
    image = None
    for task, line in zip(TASKS, panels, strict=True):
        for gamma, axes in zip(shown, line, strict=True):
            (row,) = [r for r in rows if (r["task"], r["gamma"]) == (task, gamma)]
            seen = [r for r in visits if (r["task"], r["gamma"]) == (task, gamma)]
            image = _heat_map(axes, seen, row)
            axes.set_title(f"{task}, γ = {gamma:g}", fontsize=11)
        line[0].set_ylabel("position")
    for axes in panels[-1]:
        axes.set(xlabel="step", xticks=range(0, STEPS + 1, 5))
    bar = figure.colorbar(image, ax=panels, shrink=0.7, ticks=[0, 0.05, 0.25, 0.5, 1])
    bar.set_label("visits / most visits (square-root scale)")
    figure.suptitle(title)
    return save(figure, path)


def _heat_map(axes: Axes, seen: Sequence[Row], row: Row) -> AxesImage:
    counts = np.zeros((BINS, STEPS + 1))
    for r in seen:
        counts[int(r["bin"]), int(r["step"])] = r["count"]
    image = axes.imshow(
        counts / max(1, counts.max()),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, STEPS + 0.5, -FARTHEST, FARTHEST),
        norm=PowerNorm(0.5, vmin=0, vmax=1),
        cmap="magma",
    )
    axes.axhline(GOALS[TASKS.index(str(row["task"]))], color="white", linestyle="--", linewidth=1)
    said = f"|s₂₀ − goal| = {row['distance']:.2f}"
    if float(row["outside"]) >= 0.0005:
        said += f"\n{row['outside']:.1%} outside"
    low = row["task"] == "right"
    axes.text(0.96, 0.05 if low else 0.95, said, color="white", fontsize=9, ha="right",
              va="bottom" if low else "top", transform=axes.transAxes)  # fmt: skip
    return image


def draw_summary(
    rows: Sequence[Row], fixed: Mapping[int, Mapping[float, float]], name: str, path: Path
) -> Path:
    """Draw over gamma, a line a seed: variance at initialisation and late, KL and distance.

    Args:
        rows: As `findings` returns them; drawn as means over the two tasks.
        fixed: As `fixed_ratios` returns them.
        name: Of the setting.
        path: The PNG to write.

    Returns:
        `path`.
    """
    figure = new_figure(15, 4.2)
    panels = figure.subplots(1, 4)
    gammas = _gammas(rows)
    labels = {
        "late_ratio": "late variance / that of γ = 0",
        "sequence_kl": "sequence KL at the end (nats)",
        "distance": "mean |s₂₀ − goal| at the end",
    }
    panels[0].set_title("variance at initialisation / γ = 0", fontsize=11)
    for axes, (key, label) in zip(panels[1:], labels.items(), strict=True):
        axes.set_title(label, fontsize=11)
        axes.set_label(key)
    for i, (seed, ratios) in enumerate(fixed.items()):
        style = {
            "color": COLORS[i % len(COLORS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "markersize": 5,
            "label": f"seed {seed}",
        }
        panels[0].plot(gammas, [ratios[g] for g in gammas], **style)
        for axes in panels[1:]:
            key = str(axes.get_label())
            means = [np.mean(_values(rows, key, seed=seed, gamma=g)) for g in gammas]
            axes.plot(gammas, means, **style)
    for axes in panels:
        axes.set(xlabel="γ", xticks=[0, 0.25, 0.5, 0.75, 1])
        _log_scale(axes)
        tidy(axes)
    panels[0].legend(frameon=False)
    figure.suptitle(f"What γ costs, {name}: means over the two tasks")
    return save(figure, path)
