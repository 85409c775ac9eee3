"""Means over tokens and rows, right over micro-batches and ranks."""

from torch import Tensor
from torchmetrics import MeanMetric, Metric, SumMetric

from opd_lightning.records import Rollout


class TokenMeans:
    """A mean for every key that comes along; numerators and denominators are summed over ranks.

    Example:
        >>> means = TokenMeans()
        >>> means.update({"entropy": torch.tensor([1.0, 3.0])})
        >>> means.compute()
        {'entropy': 2.0}
    """

    def __init__(self) -> None:
        self._means: dict[str, Metric] = {}

    def update(self, values: dict[str, Tensor], keep: Tensor | None = None) -> None:
        """Add values [N] of each key, only those where `keep` [N] if it is given."""
        for key, value in values.items():
            if key not in self._means:
                self._means[key] = MeanMetric(nan_strategy="disable").to(value.device)
            self._means[key].update((value if keep is None else value[keep]).float())

    def add(self, key: str, value: Tensor) -> None:
        """Add a scalar to a key that is summed, not averaged: shares of one mean."""
        if key not in self._means:
            self._means[key] = SumMetric(nan_strategy="disable").to(value.device)
        self._means[key].update(value.float())

    def compute(self) -> dict[str, float]:
        """Return the mean of each key over all that came on all ranks since the last call."""
        result = {key: float(mean.compute()) for key, mean in sorted(self._means.items())}
        self._means = {}
        return result


def completion_measures(rollout: Rollout) -> dict[str, Tensor]:
    """Return measures of each row, [B]: its length in tokens and whether the limit ended it.

    Keys are TRL's: `completions/mean_length`, `completions/clipped_ratio`.
    """
    return {
        "completions/mean_length": rollout.completion_lengths.float(),
        "completions/clipped_ratio": rollout.truncated.float(),
    }
