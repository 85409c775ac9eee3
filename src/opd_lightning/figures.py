"""What the figures share: colours, a new figure, a grid without a box."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's eight, told apart by colour-blind readers too; the yellow is too pale for lines
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#888888"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches, its parts kept apart."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG and return `path`; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def tidy(axes: Axes, grid: str = "both") -> None:
    """Draw a light grid and leave out the box."""
    axes.grid(axis=grid, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Return label heights in the order of `heights` and close to them, at least `gap` apart."""
    groups: list[list[int]] = []  # labels that touch, each group centred on its own heights
    for i in sorted(range(len(heights)), key=lambda i: heights[i]):
        groups.append([i])
        while len(groups) > 1 and _bottom(groups[-1], heights, gap) < (
            _bottom(groups[-2], heights, gap) + gap * len(groups[-2])
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = list(heights)
    for group in groups:
        for rank, i in enumerate(group):
            placed[i] = _bottom(group, heights, gap) + gap * rank
    return placed


def _bottom(group: list[int], heights: Sequence[float], gap: float) -> float:
    return sum(heights[i] for i in group) / len(group) - gap * (len(group) - 1) / 2
