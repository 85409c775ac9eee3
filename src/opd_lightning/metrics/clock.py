"""Where the time of a step goes."""

import time
from collections import defaultdict

import torch


class StepClock:
    """A stopwatch with laps: each lap's seconds are added to a name.

    On a GPU a lap waits for the work that was queued, so that it counts where it was asked for.

    Example:
        >>> clock = StepClock(torch.device("cpu"))
        >>> clock.lap("teacher")
        >>> list(clock.take())
        ['teacher']
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._last = self._now()

    def lap(self, name: str) -> None:
        """Add the seconds since the last lap (or the start) to `name`."""
        now = self._now()
        self._seconds[name] += now - self._last
        self._last = now

    def add(self, name: str, seconds: float) -> None:
        """Add seconds measured elsewhere."""
        self._seconds[name] += seconds

    def take(self) -> dict[str, float]:
        """Return the seconds by name and start again from zero."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
