"""Math: what counts as equal, and what hostile answers can do, which is nothing."""

import importlib.util
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opd_lightning.errors import ConfigError, RunError
from opd_lightning.tasks import Math, worker
from opd_lightning.tasks.mathematics import last_boxed, reference
from opd_lightning.tasks.worker import MathWorker

PAST_TIME = r"9^{9^{9^{9}}}"


@pytest.fixture(scope="module")
def task() -> Iterator[Math]:
    task = Math(timeout_seconds=0.5)
    yield task
    task._worker.close()


@pytest.mark.parametrize(("said", "wanted"), [
    (r"\frac{2}{4}", "0.5"), ("0.50", r"\frac12"), ("1+x", "x+1"), (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\{1,2\}", r"\{2,1\}"), (r"50\%", "0.5"), ("1,234", "1234"), (r"\text{(B)}", "B"),
    ("007", "7"), ("x^2+2x+1", "(x+1)^2"), ("42", "It is 6*7. #### 42"), ("3", r"$\boxed{3}$"),
])  # fmt: skip
def test_equal_as_mathematics(task: Math, said: str, wanted: str):
    assert task.score(rf"Thus \boxed{{{said}}}.", wanted) == 1.0


@pytest.mark.parametrize(("completion", "wanted"), [
    (r"\boxed{0.51}", r"\frac12"), (r"\boxed{x+2}", "x+1"), (r"\boxed{7} no, \boxed{8}", "7"),
    ("7", "7"), (r"\boxed{7", "7"), (r"\boxed{}", "7"), (r"\boxed{ }", ""), ("", "7"),
    (r"\boxed{" + "1" * 600 + "}", "1" * 600),
])  # fmt: skip
def test_not_equal_or_no_answer(task: Math, completion: str, wanted: str):
    assert task.score(completion, wanted) == 0.0


def test_the_last_closed_box_counts():
    assert last_boxed(r"\boxed{1} \boxed {\frac{1}{2}} \boxed{3") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{\{1\}}") == r"\{1\}"
    assert last_boxed("none") is None
    assert reference(r"3 + 4 #### $\frac{1}{2}$ ") == r"\frac{1}{2}"


@pytest.mark.parametrize("said", [
    PAST_TIME, r"9^{9^{9^{9^9}}} + x", r"(10^{9})!", r"10^{10^{10}}",
    r"\sum_{n=1}^{10^{12}} \frac{1}{n}", "(" * 240 + "1" + ")" * 240, "\\frac{" * 60, "\x00\n\r",
])  # fmt: skip
def test_hostile_answers_score_nothing_and_leave_a_worker_that_answers(task: Math, said: str):
    before = time.process_time()
    assert task.score(rf"\boxed{{{said}}}", "5") == 0.0
    assert time.process_time() - before < 1, "computed here and not in the worker"
    assert task.score(r"\boxed{\frac{10}{2}}", "5") == 1.0


@pytest.mark.parametrize("form", [
    "__import__('os').mkdir({path!r})", r"\text{{__import__('os').mkdir({path!r})}}",
    "[c for c in ().__class__.__base__.__subclasses__()][0]({path!r})", "open({path!r}, 'w')",
    "1 + eval(\"open({path!r}, 'w')\")", r"\mathrm{{open}}({path!r}, 'w')",
])  # fmt: skip
@pytest.mark.parametrize("place", ["answer", "completion"])
def test_no_text_is_run_as_python(task: Math, tmp_path: Path, form: str, place: str):
    target = tmp_path / "touched"
    text = form.format(path=str(target))
    pair = (rf"\boxed{{{text}}}", "5") if place == "completion" else (r"\boxed{x}", text)
    assert task.score(*pair) == 0.0
    assert not target.exists()


def test_the_reader_of_plain_expressions_is_not_among_the_readers():
    program = importlib.util.spec_from_file_location("math_program", worker._PROGRAM)
    loaded = importlib.util.module_from_spec(program)
    program.loader.exec_module(loaded)
    assert {type(reader).__name__ for reader in loaded._READER} == {"LatexExtractionConfig"}


def test_the_premise_that_the_other_reader_would_run_it(tmp_path: Path):
    """math-verify's default configuration evaluates such text: why it is not used."""
    code = (
        "import math_verify; math_verify.parse('The answer is 2*len(str(7))', "
        "[math_verify.ExprExtractionConfig()], parsing_timeout=None); "
        "from sympy.parsing import parse_expr; "
        f"parse_expr(\"__import__('os').mkdir({str(tmp_path / 'made')!r})\")"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (tmp_path / "made").exists()


def test_works_in_threads(task: Math):
    """Where signals, which math-verify's own time limit needs, cannot be used."""
    scores: dict[int, float] = {}

    def score(number: int) -> None:
        said = PAST_TIME if number == 1 else rf"\frac{{{2 * number}}}{{2}}"
        scores[number] = task.score(rf"\boxed{{{said}}}", str(number))

    threads = [threading.Thread(target=score, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == {0: 1.0, 1: 0.0, 2: 1.0, 3: 1.0}


def test_a_forked_process_gets_a_worker_of_its_own(task: Math):
    assert task.score(r"\boxed{\frac{6}{2}}", "3") == 1.0
    mine = task._worker._process.pid

    def in_child(results: multiprocessing.Queue) -> None:
        results.put((task.score(r"\boxed{\frac{8}{2}}", "4"), task._worker._process.pid))
        task._worker.close()

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=in_child, args=(results,))
    child.start()
    score, its = results.get(timeout=240)
    child.join()
    assert score == 1.0 and its != mine
    assert task.score(r"\boxed{\frac{6}{2}}", "3") == 1.0 and task._worker._process.pid == mine


def test_a_copy_starts_its_own_worker_and_ends_it(task: Math):
    task.score(r"\boxed{\frac{6}{2}}", "3")
    copy = pickle.loads(pickle.dumps(task))
    assert copy._worker._process is None
    copy.score(r"\boxed{\frac{6}{2}}", "3")
    pid = copy._worker._process.pid
    assert pid != task._worker._process.pid
    del copy
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_killed_worker_is_replaced(task: Math):
    task.score(r"\boxed{\frac{6}{2}}", "3")
    task._worker._process.kill()
    task._worker._process.wait()
    assert task.score(r"\boxed{\frac{6}{2}}", "3") == 1.0


def test_a_worker_that_cannot_start_is_an_error():
    with pytest.raises(RunError, match=r"did not start.*1 MB \(memory_mb\)"):
        MathWorker(1.0, 1).equal("1", "x")


def test_equal_pairs_are_asked_once(task: Math, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(task._worker, "equal", lambda *pair: asked.append(pair) or True)
    assert task.scores([r"\boxed{x}"] * 3 + [r"\boxed{y}"], ["1"] * 4) == [1.0] * 4
    assert asked == [("1", "x"), ("1", "y")]


@pytest.mark.parametrize("name", ["timeout_seconds", "memory_mb", "max_characters"])
def test_limits_are_above_zero(name: str):
    with pytest.raises(ConfigError, match=f"{name} must be above 0; got 0"):
        Math(**{name: 0})
