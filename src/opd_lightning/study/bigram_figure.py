"""The figure of `opd study bigram`."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from opd_lightning.figures import COLORS, new_figure, save, tidy
from opd_lightning.study.tables import Row

_MARKERS = "osD^v"


def draw(exact: Sequence[Row], sampled: Sequence[Row], path: Path) -> Path:
    """Draw bias and variance over gamma (exact), and variance over length (sampled).

    Args:
        exact: As `exact_rows` returns them.
        sampled: As `sampled_rows` returns them.
        path: The PNG to write.

    Returns:
        `path`.
    """
    figure = new_figure(14, 4.6)
    left, middle, right = figure.subplots(1, 3)
    _over_gamma(left, exact, "relative_bias")
    left.set(ylabel="bias / norm of the exact gradient", title="relative bias, exact")
    left.legend(frameon=False, title="completion of")
    _over_gamma(middle, exact, "variance")
    middle.set_yscale("log")
    middle.set(ylabel="total variance (nats²)", title="variance, exact")
    _over_length(right, sampled)
    figure.suptitle("Sequence-level reverse KL of a bigram model: Gₜ = rₜ + γ Gₜ₊₁")
    return save(figure, path)


def _over_gamma(axes: Axes, exact: Sequence[Row], key: str) -> None:
    plain = [row for row in exact if row["baseline"] == "none"]
    lengths = sorted({int(row["tokens"]) for row in plain})
    for i, length in enumerate(lengths):
        rows = [row for row in plain if row["tokens"] == length]
        axes.plot(
            [row["gamma"] for row in rows],
            [row[key] for row in rows],
            marker=_MARKERS[i % len(_MARKERS)],
            color=COLORS[i % len(COLORS)],
            label=f"{length} token{'s' if length > 1 else ''}",
        )
    axes.set(xlabel="γ  (0 = token level, 1 = sequence level)", xticks=[0, 0.25, 0.5, 0.75, 1])
    tidy(axes)


def _over_length(axes: Axes, sampled: Sequence[Row]) -> None:
    keys = [key for key in sampled[0] if key.startswith("variance_")]
    lengths = [int(key.removeprefix("variance_")) for key in keys]
    for i, row in enumerate(sampled):
        axes.plot(
            lengths,
            [row[key] for key in keys],
            marker=_MARKERS[i % len(_MARKERS)],
            color=COLORS[i % len(COLORS)],
            label=f"{str(row['estimator']).replace('gamma', 'γ =')}: slope {row['slope']:.2f}",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="tokens a completion, T", ylabel="total variance (nats²)")
    axes.set_title("variance by length, sampled")
    axes.legend(frameon=False, title="slope over the last three")
    tidy(axes)
