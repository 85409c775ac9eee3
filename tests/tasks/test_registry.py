"""Names, entry points, dotted paths; which task scores which row."""

import subprocess
import sys
from pathlib import Path

import pytest

from opd_lightning.errors import ConfigError
from opd_lightning.tasks import (
    ENVIRONMENTS,
    TASKS,
    Arithmetic,
    ExactMatch,
    GuessNumber,
    Math,
    Task,
    Verifiers,
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_task"


def test_names_resolve_whatever_their_case():
    assert TASKS.resolve("Math") is TASKS.resolve("math") is Math
    assert TASKS.find("arithmetic") is Arithmetic
    assert ENVIRONMENTS.resolve("GuessNumber") is GuessNumber
    assert TASKS.find("GuessNumber") is None and TASKS.find("default") is None


def test_an_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(ConfigError) as error:
        TASKS.resolve("Arithmetics")
    message = str(error.value)
    assert "task 'Arithmetics' is not known. Did you mean Arithmetic?" in message
    assert "Arithmetic, ExactMatch, Math" in message and "opd_lightning.tasks" in message
    with pytest.raises(ConfigError, match=r"not a subclass of opd_lightning.Environment"):
        ENVIRONMENTS.resolve("opd_lightning.tasks.Math")
    with pytest.raises(ConfigError, match="Tried to import it"):
        TASKS.resolve("no_such_package.Task")


def test_a_name_from_data_imports_nothing():
    assert TASKS.find("opd_lightning.tasks.Math") is None


def test_the_example_by_dotted_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    task = TASKS.resolve("reversal.Reversal")(length=3)
    row = task.prompts(1, seed=1)[0]
    assert task.score(row["answer"], row["answer"]) == 1.0
    assert task.score("xyzw", row["answer"]) == 0.0
    assert task.score(row["answer"][:2] + "?", row["answer"]) == pytest.approx(2 / 3)
    assert len((EXAMPLE / "reversal.py").read_text().splitlines()) < 40
    episode = ENVIRONMENTS.resolve("reversal.Spelling")()
    word = episode.reset(5).split()[1]
    turns = [episode.step(letter) for letter in reversed(word)]
    assert [t.reward for t in turns] == [0, 0, 0, 1] and [t.done for t in turns][-2:] == [0, 1]


def test_the_example_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert TASKS.find("Reversal") is None
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--target", str(tmp_path), str(EXAMPLE)],
        check=True,
    )  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    assert TASKS.find("reversal").__name__ == "Reversal"
    assert ENVIRONMENTS.resolve("Spelling").__name__ == "Spelling"
    assert Verifiers().scores(["Reversal"], ["ba"], ["ba"]) == [1.0]


def test_a_taken_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    info = tmp_path / "thief-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thief\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[opd_lightning.tasks]\nMath = opd_lightning.tasks:ExactMatch\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"entry point 'Math' .* takes the name of"):
        TASKS.known()


class Short(Task):
    needs_answer = False

    def score(self, completion: str, answer: str | None) -> float:
        return float(len(completion) < 3)


def test_rows_are_scored_by_their_task_and_others_are_not():
    verifiers = Verifiers({"capital": ExactMatch(ignore_case=True), "short": Short()})
    names = ["capital", "arithmetic", "default", "short", "arithmetic", "capital", "arithmetic"]
    answers = ["Rome", "5", "5", None, None, "Bern", "6"]
    said = ["rome", "2+3=5", "5", "no", "5", "Basel", "5"]
    assert verifiers.scores(names, answers, said) == [1.0, 1.0, None, 1.0, None, 0.0, 0.0]
    rows = zip(names, answers, strict=True)
    assert verifiers.scored_tasks(rows) == ["arithmetic", "capital", "short"]
    assert verifiers.scored_tasks([("default", "5"), ("arithmetic", None)]) == []


def test_a_given_task_replaces_the_registered_one():
    assert Verifiers({"math": ExactMatch()}).scores(["math"], ["7"], [r"\boxed{7}"]) == [0.0]


def test_given_tasks_that_score_nothing_are_refused():
    verifiers = Verifiers({"algebra": ExactMatch()})
    verifiers.check([("algebra", "1"), ("other", None)])
    with pytest.raises(ConfigError, match=r"names 'algebra'.*Did you mean algebre.*algebre, other"):
        verifiers.check([("algebre", "1"), ("other", "1")])
    with pytest.raises(ConfigError, match=r"ExactMatch for 'algebra', but rows .* no answer"):
        verifiers.check([("algebra", "1"), ("algebra", None)])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), None, "1"])
def test_a_score_is_a_finite_number(wrong: object):
    class Wrong(Task):
        def score(self, completion: str, answer: str | None) -> float:
            return wrong

    with pytest.raises(ConfigError, match=r"Wrong, for task 'x', gave 1 scores .* finite"):
        Verifiers({"x": Wrong()}).scores(["x"], ["1"], ["1"])
