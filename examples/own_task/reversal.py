"""A task and an environment of one's own: words written backwards."""

import random

from opd_lightning import Environment, Task, Turn

LETTERS = "abcdefghijklmnopqrstuvwxyz"


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
        """Return the share of letters that are right, 0 where their number is wrong."""
        said = completion.strip()
        right = sum(a == b for a, b in zip(said, answer, strict=False))
        return right / len(answer) if len(said) == len(answer) else 0.0


class Spelling(Environment):
    """Spell a random word backwards, one letter a turn; the first wrong one ends the episode."""

    def reset(self, seed: int) -> str:
        """Draw the word."""
        self.left = list(Reversal().prompts(1, seed)[0]["answer"][::-1])
        return f"Spell {''.join(self.left)} backwards, a letter a turn."

    def step(self, text: str) -> Turn:
        """Take a letter."""
        right = text.strip() == self.left.pop()
        done = not right or not self.left
        return Turn("Right." if right else "Wrong.", float(right and done), done)
