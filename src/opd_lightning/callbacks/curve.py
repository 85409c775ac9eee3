"""The learning curve as a picture."""

import csv
from pathlib import Path

from opd_lightning.figures import new_figure, tidy

_TRAINING, _HELD_OUT = "kl/reverse", "val/kl/reverse"


def draw_learning_curve(metrics: Path, picture: Path) -> None:
    """Draw reverse KL over optimiser steps, of training rollouts and held out, as a PNG.

    Args:
        metrics: The CSVLogger's `metrics.csv`; without either column nothing is drawn.
        picture: The PNG to write.
    """
    if not metrics.is_file():
        return
    with metrics.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    curves = {
        key: [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
        for key in (_TRAINING, _HELD_OUT)
    }
    if not any(curves.values()):
        return
    figure = new_figure(7, 4)
    axes = figure.subplots()
    styles = {_TRAINING: ("-", "training rollouts"), _HELD_OUT: ("o-", "held out")}
    for key, points in curves.items():
        if points:
            style, label = styles[key]
            axes.plot(*zip(*sorted(points), strict=True), style, label=label)
    axes.set(xlabel="optimiser step", ylabel="reverse KL to the teacher (nats a token)")
    axes.set_ylim(bottom=0)
    tidy(axes)
    axes.legend()
    figure.savefig(picture, dpi=120)
