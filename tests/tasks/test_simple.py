"""ExactMatch, Arithmetic, and what the interfaces promise."""

import pytest

from opd_lightning.errors import ConfigError, RunError
from opd_lightning.tasks import Arithmetic, ExactMatch, GuessNumber, Math, Turn
from opd_lightning.tasks.simple import last_integer


def test_exact_match():
    assert ExactMatch().score(" Paris\n", "Paris") == 1.0
    assert ExactMatch().score("paris", "Paris") == 0.0
    assert ExactMatch(ignore_case=True).score("paris", "PARIS ") == 1.0
    assert ExactMatch().scores(["a", "b"], ["a", "a"]) == [1.0, 0.0]


@pytest.mark.parametrize(("text", "number"), [
    ("12 and 30 make 42.", 42), ("-7", -7), ("−7", -7), ("5-3", 3), ("5 - 3 = 2", 2),
    ("1,234", 1234), ("3.5", None), ("It is 4, not 3.5", 4), ("none", None), ("", None),
    ("7" * 5000, None), ("x2", None), ("2 = 2", 2), ("**13**", 13), ("13!", 13),
])  # fmt: skip
def test_last_integer(text: str, number: int | None):
    assert last_integer(text) == number


def test_arithmetic_asks_what_it_can_check():
    task = Arithmetic(largest=20, operations=["+", "-", "*"])
    rows = task.prompts(200, seed=3)
    signs = set()
    for row in rows:
        first, sign, second = row["prompt"].removeprefix("What is ").removesuffix("?").split()
        signs.add(sign)
        a, b = int(first), int(second)
        assert min(a, b) >= 0 and max(a, b) <= 20
        assert int(row["answer"]) == {"+": a + b, "-": a - b, "*": a * b}[sign]
        assert row["task"] == "Arithmetic"
        assert task.score(f"That makes {row['answer']}.", row["answer"]) == 1.0
        assert task.score(f"That makes {int(row['answer']) + 1}.", row["answer"]) == 0.0
    assert signs == {"+", "-", "*"}
    assert task.prompts(50, seed=3) == rows[:50] and task.prompts(50, seed=4) != rows[:50]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"largest": 0}, "largest must be at least 1; got 0"),
    ({"operations": []}, r"operations are \[\]"),
    ({"operations": ["/"]}, r"operations are \['/'\].*\+, -, \*"),
])  # fmt: skip
def test_arithmetic_refuses(arguments: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Arithmetic(**arguments)


def test_a_task_without_prompts_says_so():
    with pytest.raises(ConfigError, match=r"Math makes no prompts of its own.*task: Math"):
        Math().prompts(3)


def test_guess_number_by_bisection():
    for seed in range(20):
        game, low, high = GuessNumber(largest=20, max_turns=6), 1, 20
        assert "1 to 20" in game.reset(seed)
        turn = Turn("", 0.0, False)
        while not turn.done:
            guess = (low + high) // 2
            turn = game.step(f"I say {guess}")
            low, high = (guess + 1, high) if turn.observation == "Higher." else (low, guess - 1)
        assert turn == Turn("Right.", 1.0, True), seed


def test_guess_number_ends_and_is_a_function_of_the_seed():
    game = GuessNumber(largest=9, max_turns=2)
    numbers = []
    for seed in (0, 0, 1, 2, 3):
        game.reset(seed)
        assert game.step("no idea") == Turn("Say a whole number.", 0.0, False)
        turn = game.step("100")
        assert turn.reward == 0 and turn.done
        numbers.append(turn.observation)
        with pytest.raises(RunError, match="Call reset"):
            game.step("1")
    assert numbers[0] == numbers[1] and len(set(numbers)) > 1
    with pytest.raises(ConfigError, match="max_turns must be at least 1; got 0"):
        GuessNumber(max_turns=0)
