"""Tasks whose answers are compared as text or as numbers."""

import random
import re
from typing import Literal, get_args

from opd_lightning.errors import ConfigError, nearest
from opd_lightning.tasks.base import Row, Task

# At most so many digits: Python refuses to read integers of more than 4,300, and slowly before.
_INTEGER = re.compile(r"(?<![\w.])[-−]?\d[\d,]{0,99}(?![\d,]|\.\d)")


class ExactMatch(Task):
    """1 where the completion is the answer, white space at both ends left out.

    Args:
        ignore_case: Compare without regard to upper and lower case.
    """

    def __init__(self, ignore_case: bool = False) -> None:
        self.ignore_case = ignore_case

    def score(self, completion: str, answer: str | None) -> float:
        """Return 1.0 or 0.0."""
        said, wanted = completion.strip(), answer.strip()
        if self.ignore_case:
            said, wanted = said.casefold(), wanted.casefold()
        return float(said == wanted)


Operation = Literal["+", "-", "*"]


class Arithmetic(Task):
    """Sums, differences and products of whole numbers; the completion's last whole number counts.

    Example:
        >>> Arithmetic(largest=9).prompts(1, seed=0)
        [{'prompt': 'What is 7 + 6?', 'answer': '13', 'task': 'Arithmetic'}]

    Args:
        largest: Operands are 0 to this.
        operations: Which of +, - and * are asked for.

    Raises:
        ConfigError: If `largest` < 1, or there is no operation or an unknown one.
    """

    def __init__(self, largest: int = 99, operations: list[Operation] | None = None) -> None:
        known = get_args(Operation)
        self.operations = list(known[:2]) if operations is None else list(operations)
        if largest < 1:
            raise ConfigError(f"Arithmetic's largest must be at least 1; got {largest}.")
        unknown = [str(o) for o in self.operations if o not in known]
        if unknown or not self.operations:
            raise ConfigError(
                f"Arithmetic's operations are {self.operations}."
                f"{nearest(unknown[0], known) if unknown else ''} Give some of: {', '.join(known)}."
            )
        self.largest = largest

    def prompts(self, number: int, seed: int = 0) -> list[Row]:
        """Return `number` questions; the same first ones for a larger number."""
        draw = random.Random(seed)
        rows = []
        for _ in range(number):
            first, second = draw.randint(0, self.largest), draw.randint(0, self.largest)
            sign = draw.choice(self.operations)
            result = {"+": first + second, "-": first - second, "*": first * second}[sign]
            rows.append(
                {
                    "prompt": f"What is {first} {sign} {second}?",
                    "answer": str(result),
                    "task": type(self).__name__,
                }
            )
        return rows

    def score(self, completion: str, answer: str | None) -> float:
        """Return 1.0 where the last whole number of the completion is the answer's, else 0.0."""
        said, wanted = last_integer(completion), last_integer(answer)
        return float(said is not None and said == wanted)


def last_integer(text: str) -> int | None:
    """Return the last whole number of a text, thousands with or without commas; None without one.

    Example:
        >>> last_integer("12 and 30 make 42.")
        42
    """
    found = _INTEGER.findall(text)
    return int(found[-1].replace(",", "").replace("−", "-")) if found else None
