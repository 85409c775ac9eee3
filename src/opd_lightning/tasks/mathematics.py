"""Answers in mathematics, checked by math-verify in a process of its own."""

import re
from collections.abc import Sequence

from opd_lightning.errors import ConfigError
from opd_lightning.tasks.base import Task
from opd_lightning.tasks.worker import MathWorker

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_INTEGER = re.compile(r"[-+]?\d{1,100}")


class Math(Task):
    r"""1 where the last `\boxed{...}` of a completion equals the answer as mathematics, else 0.

    `\frac{1}{2}`, `0.5` and `\frac{2}{4}` are one answer; so are `x+1` and `1+x`. Equal text and
    whole numbers are decided at once; all else goes to math-verify, which reads LaTeX by a grammar
    (its reader of plain expressions, which evaluates text as Python, is never asked), in a worker
    process with limits on time and memory. An answer that exceeds one scores 0.

    The answers of data may stand alone, between dollars, in a box, or behind `####` (GSM8K).

    Example:
        >>> Math().score(r"so it is \boxed{42}.", "42")
        1.0

    Args:
        timeout_seconds: Processor time of one comparison, so that a busy machine changes no score.
        memory_mb: Address space of the worker process, 2^20 bytes each.
        max_characters: A longer answer scores 0 unread.

    Raises:
        ConfigError: If a limit is not above 0.
    """

    def __init__(
        self, timeout_seconds: float = 5.0, memory_mb: int = 2048, max_characters: int = 500
    ) -> None:
        limits = {
            "timeout_seconds": timeout_seconds,
            "memory_mb": memory_mb,
            "max_characters": max_characters,
        }
        for name, value in limits.items():
            if value <= 0:
                raise ConfigError(f"Math's {name} must be above 0; got {value}.")
        self.max_characters = max_characters
        self._worker = MathWorker(timeout_seconds, memory_mb)

    def score(self, completion: str, answer: str | None) -> float:
        """Return 1.0 or 0.0."""
        said, wanted = last_boxed(completion), reference(answer)
        if said is None or not (said := said.strip()) or len(said) > self.max_characters:
            return 0.0
        if said == wanted:
            return 1.0
        if _INTEGER.fullmatch(said) and _INTEGER.fullmatch(wanted):
            return float(int(said) == int(wanted))
        return float(self._worker.equal(wanted, said))

    def scores(self, completions: Sequence[str], answers: Sequence[str | None]) -> list[float]:
        """Return the score of each completion; equal pairs are compared once."""
        pairs = list(zip(completions, answers, strict=True))
        known = {pair: self.score(*pair) for pair in dict.fromkeys(pairs)}
        return [known[pair] for pair in pairs]


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last `\boxed{...}`; None without one that is closed.

    Example:
        >>> last_boxed(r"\boxed{1} or rather \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
    """
    for match in reversed(list(_BOX.finditer(text))):
        depth = 1
        for place in range(match.end(), len(text)):
            if text[place - 1] == "\\":  # an escaped brace
                continue
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[match.end() : place]
    return None


def reference(answer: str) -> str:
    """Return the bare answer of a row: without GSM8K's derivation, box and dollars."""
    bare = answer.rpartition("####")[2]
    boxed = last_boxed(bare)
    return (bare if boxed is None else boxed).strip().strip("$").strip()
