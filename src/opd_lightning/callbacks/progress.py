"""The progress bar of a run."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

_PARTS = ("rollout", "teacher", "student", "optimizer")


class OPDProgressBar(TQDMProgressBar):
    """Lightning's bar with loss, reverse KL, tokens a second and where a step's time goes."""

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands behind the bar: `split` is in per cent of the step."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        seconds = [metrics.pop(f"perf/{part}_seconds", 0.0) for part in _PARTS]
        metrics.pop("perf/step_seconds", None)
        if speed := metrics.pop("perf/tokens_per_second", None):
            metrics["tok/s"] = f"{speed:.0f}"
        if total := sum(seconds):
            names = "/".join(part[:4] for part in _PARTS)
            metrics[names] = "/".join(f"{100 * s / total:.0f}" for s in seconds) + "%"
        return metrics
