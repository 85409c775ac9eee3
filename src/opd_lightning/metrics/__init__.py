"""What is measured: pure functions of distributions, and torchmetrics that collect them."""

from opd_lightning.metrics.clock import StepClock
from opd_lightning.metrics.divergence import on_policy_measures
from opd_lightning.metrics.means import TokenMeans, completion_measures
from opd_lightning.metrics.success import (
    AverageAtK,
    Comparison,
    Estimate,
    PassAtK,
    SuccessRate,
    compare_pairs,
)

__all__ = [
    "AverageAtK",
    "Comparison",
    "Estimate",
    "PassAtK",
    "StepClock",
    "SuccessRate",
    "TokenMeans",
    "compare_pairs",
    "completion_measures",
    "on_policy_measures",
]
