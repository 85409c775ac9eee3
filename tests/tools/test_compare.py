"""`opd compare` on tiny models, in this process: pairs, files, what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_lightning.cli import main
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `a` and `b`, and run.yaml with prompts that a random model solves sometimes."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "a", seed=1)
    save_tiny(folder / "b", seed=2)
    (folder / "vowels.py").write_text(
        "from opd_lightning import Task\n\n\nclass Vowels(Task):\n"
        "    def score(self, completion, answer):\n"
        "        return float(any(c in answer for c in completion))\n"
    )
    rows = [{"prompt": f"word {i}", "task": "vowels", "answer": "aeiou"} for i in range(6)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate = {"num_samples": 3, "pass_at": [2], "tasks": {"vowels": "vowels.Vowels"}}
    config = {
        "model": {
            "student": str(folder / "a"),
            "teacher": str(folder / "b"),
            "objective": "ReverseKL",
        },
        "data": {
            "train": str(folder / "test.jsonl"),
            "val": str(folder / "test.jsonl"),
            "prompts_per_step": 4,
        },
        "rollout": {"sampling": {"max_completion_length": 4}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder / "runs"),
            "callbacks": [{"class_path": "Evaluate", "init_args": evaluate}],
        },
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def opd(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.syspath_prepend(str(world))

    def run(*args: str, code: int | None = None) -> str:
        first = 3 if args[0] == "compare" else 1
        line = [*args[:first], "--config", str(world / "run.yaml"), *args[first:]]
        monkeypatch.setattr(sys, "argv", ["opd", *line])
        if code is None:
            main(line)
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as exit_:
            main(line)
        assert exit_.value.code == code
        return capsys.readouterr().err

    return run


def test_findings_are_those_of_the_completions(opd: Any, world: Path, tmp_path: Path):
    out = tmp_path / "out"
    printed = opd("compare", str(world / "a"), str(world / "b"), "--out", str(out))
    assert "3 completions a prompt, temperature 1.0" in printed and "pass@2" in printed
    scores = {}
    for side in ("first", "second"):
        records = [json.loads(line) for line in (out / f"{side}.jsonl").read_text().splitlines()]
        assert [(r["index"], r["generation"]) for r in records] == [
            (i, g) for i in range(6) for g in range(3)
        ]
        by_prompt = [[r["score"] for r in records if r["index"] == i] for i in range(6)]
        scores[side] = [sum(s) / 3 for s in by_prompt]
    assert scores["first"] != scores["second"], "the task must discriminate"
    found = {f["metric"]: f for f in json.loads((out / "comparison.json").read_text())["findings"]}
    average = found["avg@3"]
    apart = [b - a for a, b in zip(scores["first"], scores["second"], strict=True)]
    assert average["first"]["mean"] == pytest.approx(sum(scores["first"]) / 6)
    assert average["difference"]["mean"] == pytest.approx(sum(apart) / 6)
    assert average["wins"] == sum(d > 0 for d in apart) and average["prompts"] == 6
    assert average["losses"] == sum(d < 0 for d in apart)
    assert average["difference"]["low"] <= average["difference"]["mean"]


def test_a_checkpoint_against_the_folder_it_came_from(opd: Any, world: Path):
    """And a student against itself: no difference at all, as both draw the same numbers."""
    opd("fit", "--model.optimizer", "SGD", "--model.optimizer.lr", "1e-9")
    checkpoint = next((world / "runs").rglob("*.ckpt"))
    told = json.loads(opd("compare", str(checkpoint), str(world / "a"), "--format", "json"))
    assert told["first"] == str(checkpoint)
    for finding in told["findings"]:
        assert finding["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
        assert (finding["wins"], finding["losses"], finding["ties"]) == (0, 0, 6)
    logged = next((world / "runs").rglob("metrics.csv")).read_text()
    assert "eval/vowels/avg@3" in logged
    assert list((world / "runs").rglob("evaluations/eval_step_00000001.jsonl"))


def test_opd_test_evaluates(opd: Any, tmp_path: Path):
    printed = opd("test", "--trainer.default_root_dir", str(tmp_path))
    assert "test/vowels/pass@2/high" in printed and "test/kl/reverse" in printed
    assert list(tmp_path.rglob("evaluations/test_step_00000000.json"))


def test_refuses(opd: Any, world: Path):
    a = str(world / "a")
    assert "'nothing' is neither a checkpoint nor" in opd("compare", a, "nothing", code=2)
    assert "Set its num_samples" in opd("compare", a, a, "--num-samples", "2", code=2)
    assert "the two students first" in opd("compare", a, "--num-samples", "2", code=2)
    wrong = ("--rollout.tasks", '{"vowels": "Arithmetik"}')
    message = opd("compare", a, a, *wrong, code=2)
    assert "Arithmetik" in message and "Did you mean Arithmetic?" in message
