"""A task and an environment of one's own: words written backwards."""

import random
from string import ascii_lowercase as LETTERS

from opd_lightning import Environment, Task, Turn


class Reversal(Task):
    """The completion is the word of the prompt, backwards."""

    def __init__(self, length: int = 4) -> None:
        self.length = length

    def prompts(self, number: int, seed: int = 0) -> list[dict]:
        """Return `number` random words to reverse."""
        draw = random.Random(seed)
        words = ["".join(draw.choices(LETTERS, k=self.length)) for _ in range(number)]
        return [{"prompt": f"Reverse {w}.", "answer": w[::-1], "task": "Reversal"} for w in words]

    def score(self, completion: str, answer: str | None) -> float:
        """Return the share of letters that are right."""
        right = [a == b for a, b in zip(completion.strip(), answer, strict=False)]
        return sum(right) / max(len(completion.strip()), len(answer))


class Spelling(Environment):
    """Spell a random word backwards, one letter a turn; the first wrong one ends the episode."""

    def reset(self, seed: int) -> str:
        """Draw the word."""
        self.left = list(Reversal().prompts(1, seed)[0]["answer"][::-1])
        return f"Spell {''.join(self.left)} backwards, a letter a turn."

    def step(self, text: str) -> Turn:
        """Take a letter."""
        if text.strip() != self.left.pop():
            return Turn("Wrong.", 0.0, True)
        return Turn("Right.", float(not self.left), not self.left)
