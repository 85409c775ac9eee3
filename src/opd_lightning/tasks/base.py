"""What a task and an environment are: one class in one file each."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from opd_lightning.errors import ConfigError

Row = dict[str, Any]


class Task(ABC):
    """Prompts and a verifier; the constructor's arguments are its configuration.

    A row of data whose column `task` is the name of a task, and which has an `answer` where the
    task needs one, is scored by that task.

    Example:
        >>> class Echo(Task):
        ...     def score(self, completion: str, answer: str | None) -> float:
        ...         return float(answer in completion)
        >>> Echo().score("I say 5.", "5")
        1.0

    Attributes:
        needs_answer: Whether `score` needs a reference answer; False where the completion alone
            decides.
    """

    needs_answer: bool = True

    @abstractmethod
    def score(self, completion: str, answer: str | None) -> float:
        """Return how good a completion is: finite, 1 for solved and 0 for not, or between.

        Completions are untrusted text: never evaluate them.

        Args:
            completion: The text of the completion, special tokens left out.
            answer: The row's reference answer, None only where `needs_answer` is False.
        """

    def scores(self, completions: Sequence[str], answers: Sequence[str | None]) -> list[float]:
        """Return the score of each completion; override it where many at once are cheaper."""
        return [self.score(c, a) for c, a in zip(completions, answers, strict=True)]

    def prompts(self, number: int, seed: int = 0) -> list[Row]:
        """Return `number` rows of data, a function of the seed: `prompt`, `answer` and `task`.

        Raises:
            ConfigError: If the task makes no prompts of its own.
        """
        name = type(self).__name__
        raise ConfigError(
            f"{name} makes no prompts of its own ({number} asked for). Give a file or a dataset "
            f"with the columns prompt, answer and task: {name}."
        )


class Turn(NamedTuple):
    """What an environment answers: `Turn("Lower.", 0.0, False)`.

    Attributes:
        observation: Text that the student sees next.
        reward: Of this turn; the sum over an episode is its score.
        done: Whether the episode is over.
    """

    observation: str
    reward: float
    done: bool


class Environment(ABC):
    """One episode at a time: `reset`, then `step` until done.

    An episode is a function of the seed and of what was said: no other randomness, no clock. What
    the student says is untrusted text: never evaluate it.
    """

    @abstractmethod
    def reset(self, seed: int) -> str:
        """Begin an episode and return the first observation: rules, goal, what is seen."""

    @abstractmethod
    def step(self, text: str) -> Turn:
        """Take what the student said and return the next observation, the reward and the end.

        Nonsense is answered, never raised. After the end, or before `reset`, a step is an error.

        Raises:
            RunError: If there is no episode under way.
        """
