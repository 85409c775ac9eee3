"""A small environment, as an example and for tests."""

import random

from opd_lightning.errors import ConfigError, RunError
from opd_lightning.tasks.base import Environment, Turn
from opd_lightning.tasks.simple import last_integer


class GuessNumber(Environment):
    """Find a whole number by guesses; reward 1 for the right one, 0 for all others.

    Example:
        >>> game = GuessNumber(largest=1)
        >>> game.reset(seed=0)
        'I think of a whole number from 1 to 1. Guess it.'
        >>> game.step("Is it 1?")
        Turn(observation='Right.', reward=1.0, done=True)

    Args:
        largest: The number is 1 to this.
        max_turns: Guesses before the episode ends.

    Raises:
        ConfigError: If an argument is below 1.
    """

    def __init__(self, largest: int = 20, max_turns: int = 6) -> None:
        for name, value in {"largest": largest, "max_turns": max_turns}.items():
            if value < 1:
                raise ConfigError(f"GuessNumber's {name} must be at least 1; got {value}.")
        self.largest = largest
        self.max_turns = max_turns
        self._number: int | None = None
        self._turns_left = 0

    def reset(self, seed: int) -> str:
        """Think of another number."""
        self._number = random.Random(seed).randint(1, self.largest)
        self._turns_left = self.max_turns
        return f"I think of a whole number from 1 to {self.largest}. Guess it."

    def step(self, text: str) -> Turn:
        """Take the last whole number of the text as the guess.

        Raises:
            RunError: If there is no episode under way.
        """
        if self._number is None:
            raise RunError("GuessNumber has no episode under way (its number: None). Call reset.")
        guess, number = last_integer(text), self._number
        self._turns_left -= 1
        if guess == number or self._turns_left == 0:
            self._number = None
            right = guess == number
            return Turn("Right." if right else f"It was {number}.", float(right), True)
        if guess is None:
            return Turn("Say a whole number.", 0.0, False)
        return Turn("Lower." if guess > number else "Higher.", 0.0, False)
