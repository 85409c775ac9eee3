"""How often prompts are solved: avg@k, pass@k, success rate, with bootstrap intervals over prompts.

P prompts, n completions of each.
"""

from abc import abstractmethod
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from opd_lightning.errors import ConfigError

# Numbers held at once while means are drawn: 32 MB of indices.
_DRAWS_AT_ONCE = 4_000_000


class Estimate(NamedTuple):
    """A mean over prompts and its bootstrap interval: `Estimate(0.5, 0.4, 0.6)`."""

    mean: float
    low: float
    high: float


class PromptMetric(Metric):
    """A number for each prompt, and their mean with a percentile bootstrap interval over prompts.

    Prompts are drawn anew with replacement, completions are not: the interval says what other
    prompts of the kind would have given with completions drawn alike. It is a function of the
    numbers and the seed: prompts are put in order of their index first, so that their split over
    batches and ranks changes nothing. All ranks must call `update` equally often, with empty
    batches too.

    Args:
        level: Of the interval, in (0, 1).
        resamples: Bootstrap means, >= 1.
        seed: Of the bootstrap.

    Raises:
        ConfigError: If an argument is out of its range.
    """

    full_state_update = False
    higher_is_better = True
    index: list[Tensor]
    value: list[Tensor]

    def __init__(self, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> None:
        super().__init__()
        check_bootstrap(level, resamples)
        self.level = level
        self.resamples = resamples
        self.seed = seed
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self.add_state("value", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def of_prompts(self, scores: Tensor) -> Tensor:
        """Return the number of each prompt, float64 [P]; `scores` is [P, n]."""

    def update(self, scores: Tensor, index: Tensor) -> None:
        """Add prompts.

        Args:
            scores: [P, n], of each completion.
            index: [P] int64, number of each prompt in its source; each prompt once.
        """
        self.index.append(index.to(self.device, torch.int64))
        self.value.append(self.of_prompts(scores.to(self.device)).double())

    def compute(self) -> Estimate:
        """Return the estimate over all prompts of all ranks; NaN where there was none."""
        values = self.by_prompt()[1]
        if not len(values):
            return Estimate(float("nan"), float("nan"), float("nan"))
        low, high = interval(bootstrap_means(values, self.resamples, self.seed), self.level)
        return Estimate(float(values.mean()), low, high)

    def by_prompt(self) -> tuple[Tensor, Tensor]:
        """Return the indices [P], ascending, and the numbers [P]; of this rank, outside compute."""
        index, value = _joined(self.index, torch.int64), _joined(self.value, torch.float64)
        order = index.argsort()
        return index[order], value[order]


class AverageAtK(PromptMetric):
    """avg@k: the mean score of k completions, estimated by all n of a prompt; n >= 1."""

    def of_prompts(self, scores: Tensor) -> Tensor:
        """Return the mean score of each prompt."""
        return scores.double().mean(dim=1)


class SuccessRate(PromptMetric):
    """The share of completions whose score is at least `threshold`, averaged over prompts.

    Args:
        threshold: Score from which on a prompt is solved.
        level: Of the interval.
        resamples: Bootstrap means.
        seed: Of the bootstrap.
    """

    def __init__(
        self, threshold: float = 1.0, level: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> None:
        super().__init__(level, resamples, seed)
        self.threshold = threshold

    def of_prompts(self, scores: Tensor) -> Tensor:
        """Return the share of each prompt."""
        return (scores >= self.threshold).double().mean(dim=1)


class PassAtK(SuccessRate):
    """pass@k: the probability that one of k completions solves the prompt; the unbiased estimate.

    1 - C(n - c, k) / C(n, k) of n >= k completions of which c solve it (arXiv 2107.03374, eq. 1);
    1 - (1 - c/n)^k would be biased.

    Args:
        k: Completions that one has, >= 1.
        threshold: Score from which on a prompt is solved.
        level: Of the interval.
        resamples: Bootstrap means.
        seed: Of the bootstrap.

    Raises:
        ConfigError: If `k` < 1; in `update`, if there are fewer than k completions a prompt.
    """

    def __init__(
        self,
        k: int,
        threshold: float = 1.0,
        level: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(threshold, level, resamples, seed)
        if k < 1:
            raise ConfigError(f"pass@k needs a k of at least 1; got {k}.")
        self.k = k

    def of_prompts(self, scores: Tensor) -> Tensor:
        """Return the estimate of each prompt."""
        n = scores.shape[1]
        if n < self.k:
            raise ConfigError(
                f"pass@{self.k} needs at least {self.k} completions a prompt; there are {n}."
            )
        solved = (scores >= self.threshold).sum(dim=1).tolist()
        return torch.tensor(
            [1 - comb(n - c, self.k) / comb(n, self.k) for c in solved],
            dtype=torch.float64,
            device=scores.device,
        )


class Comparison(NamedTuple):
    """Two lists of numbers of the same prompts, second minus first.

    Attributes:
        difference: Mean difference with its paired bootstrap interval.
        wins: Prompts where the second is higher.
        losses: Prompts where it is lower.
        ties: Prompts where both are equal.
    """

    difference: Estimate
    wins: int
    losses: int
    ties: int


def compare_pairs(
    first: Tensor, second: Tensor, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Comparison:
    """Return the paired comparison of two lists of numbers [P], P >= 1: prompts are drawn in pairs.

    Raises:
        ConfigError: If the lists differ in length or are empty, or an argument is out of its range.
    """
    check_bootstrap(level, resamples)
    if first.shape != second.shape or not len(first):
        raise ConfigError(
            f"{len(first)} and {len(second)} prompts cannot be compared in pairs. Give the same "
            "prompts, at least one, to both."
        )
    apart = second.double() - first.double()
    low, high = interval(bootstrap_means(apart, resamples, seed), level)
    wins, losses = int((apart > 0).sum()), int((apart < 0).sum())
    difference = Estimate(float(apart.mean()), low, high)
    return Comparison(difference, wins, losses, len(apart) - wins - losses)


def bootstrap_means(values: Tensor, resamples: int, seed: int) -> Tensor:
    """Return the means [resamples] of as many draws with replacement of all `values` [P].

    The draws are those of one seed, whatever the device.
    """
    values = values.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _DRAWS_AT_ONCE // len(values))
    means = []
    for start in range(0, resamples, at_once):
        shape = (min(at_once, resamples - start), len(values))
        means.append(values[torch.randint(len(values), shape, generator=generator)].mean(dim=1))
    return torch.cat(means)


def interval(means: Tensor, level: float) -> tuple[float, float]:
    """Return the central interval that holds the share `level` of bootstrap means."""
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype)
    low, high = means.quantile(ends).tolist()
    return low, high


def check_bootstrap(level: float, resamples: int) -> None:
    """Refuse what is no level or no number of means.

    Raises:
        ConfigError: If `level` is not in (0, 1) or `resamples` < 1.
    """
    if not 0 < level < 1:
        raise ConfigError(f"level must be between 0 and 1, such as 0.95; got {level}.")
    if resamples < 1:
        raise ConfigError(f"resamples must be at least 1; got {resamples}.")


def _joined(parts: list[Tensor] | Tensor, dtype: torch.dtype) -> Tensor:
    # a tensor, where torchmetrics has joined those of all ranks
    if isinstance(parts, Tensor):
        return parts
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)
