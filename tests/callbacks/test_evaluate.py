"""Evaluate in real runs: what it logs and writes, when, and that it changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.callbacks import Evaluate
from opd_lightning.data import OPDDataModule
from opd_lightning.errors import ConfigError
from opd_lightning.rollout import RolloutCallback, SamplingConfig
from opd_lightning.tasks import Task
from tests.module.harness import csv_logger, fit, logged, module, save_pair, until, weights


class Letters(Task):
    """1 where the completion has one of the answer's letters: random models do, sometimes."""

    def score(self, completion: str, answer: str | None) -> float:
        return float(any(c in answer for c in completion))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("models"))


def prompts(path: Path, *tasks: str) -> str:
    rows = [{"prompt": f"{t}{i}", "task": t, "answer": "aeiou"} for i, t in enumerate(tasks)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> OPDDataModule:
    train = prompts(tmp_path / "train.jsonl", *["a"] * 4)
    val = prompts(tmp_path / "val.jsonl", "a", "b", "a", "none", "b")
    return OPDDataModule(train, val=val, prompts_per_step=2, eval_prompts_per_step=2)


def rollouts() -> RolloutCallback:
    tasks = {"a": Letters()}
    return RolloutCallback(SamplingConfig(max_completion_length=4), tasks=tasks)


def evaluate(**settings: Any) -> Evaluate:
    tasks = {"a": Letters(), "b": Letters()}
    return Evaluate(**({"num_samples": 3, "pass_at": [1, 2], "tasks": tasks} | settings))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_logs_and_files_agree_with_the_completions(
    models: Path, data: OPDDataModule, tmp_path: Path
):
    options = until(3, logger=csv_logger(tmp_path), limit_val_batches=0)
    trainer = fit(module(models), data, rollouts(), evaluate(every_n_steps=2), **options)
    lines = [line for line in logged(tmp_path) if "eval/a/avg@3" in line]
    assert [line["step"] for line in lines] == [0, 2, 3]
    names = [f"eval/{t}/{n}" for t in "ab" for n in ("avg@3", "success_rate", "pass@1", "pass@2")]
    wanted = {f"{name}{end}" for name in names for end in ("", "/low", "/high")}
    assert all({k for k in line if k.startswith("eval/")} == wanted for line in lines)
    for line in lines:
        assert line["eval/a/pass@1"] == pytest.approx(line["eval/a/avg@3"])
        assert all(line[f"{n}/low"] <= line[n] <= line[f"{n}/high"] for n in names)
        stem = tmp_path / "evaluations" / f"eval_step_{int(line['step']):08d}"
        records = lines_of(stem.with_suffix(".jsonl"))
        assert [(r["index"], r["generation"]) for r in records] == [
            (i, g) for i in range(5) for g in range(3)
        ]
        assert all(r["score"] is None for r in records if r["task"] == "none")
        scores = {t: [r["score"] for r in records if r["task"] == t] for t in "ab"}
        for task, of_task in scores.items():
            assert line[f"eval/{task}/avg@3"] == pytest.approx(sum(of_task) / len(of_task))
        for record in records:
            if record["score"] is not None:
                assert record["score"] == Letters().score(record["completion"], "aeiou")
        summary = json.loads(stem.with_suffix(".json").read_text())
        assert summary["sampling"]["num_generations"] == 3 and summary["level"] == 0.95
        assert summary["estimates"]["eval/b/pass@2"]["mean"] == line["eval/b/pass@2"]
    assert {r["score"] for r in records} == {0.0, 1.0, None}, "the task must discriminate"
    assert "eval/a/avg@3" in trainer.callback_metrics, "for callbacks that monitor it"


def test_training_is_the_same_with_and_without(models: Path, data: OPDDataModule, tmp_path: Path):
    trained = []
    for callbacks in ([], [evaluate(every_n_steps=1)]):
        model = module(models)
        options = {"default_root_dir": tmp_path, "limit_val_batches": 0}
        fit(model, data, rollouts(), *callbacks, **until(2), **options)
        trained.append(weights(model))
    assert all(torch.equal(trained[0][key], trained[1][key]) for key in trained[0])


def test_test_stage_repeats_what_training_ended_with(
    models: Path, data: OPDDataModule, tmp_path: Path
):
    model, callback = module(models), evaluate(every_n_steps=0, at_start=False)
    options = until(2, logger=csv_logger(tmp_path), limit_val_batches=0)
    trainer = fit(model, data, rollouts(), callback, **options)
    (found,) = trainer.test(model, data, verbose=False)
    (line,) = [line for line in logged(tmp_path) if "eval/a/avg@3" in line]
    assert line["step"] == 2
    for key in ("a/avg@3", "b/pass@2", "b/pass@2/high"):
        assert found[f"test/{key}"] == pytest.approx(line[f"eval/{key}"])
    assert "test/kl/reverse" in found
    files = {path.name for path in (tmp_path / "evaluations").iterdir()}
    assert {"eval_step_00000002.jsonl", "test_step_00000002.jsonl"} <= files
    assert not any(name.endswith(".tmp") for name in files)


def test_batches_change_nothing(models: Path, data: OPDDataModule, tmp_path: Path):
    found = []
    for size in (2, 5):
        data.eval_prompts_per_step = size
        options = {"default_root_dir": tmp_path / str(size), "limit_val_batches": 0}
        fit(module(models), data, rollouts(), evaluate(every_n_steps=0), **until(1), **options)
        path = tmp_path / str(size) / "evaluations" / "eval_step_00000000"
        found.append(json.loads(path.with_suffix(".json").read_text())["estimates"])
    assert found[0] == found[1]


def test_several_updates_a_round_do_not_jump_over_a_step(
    models: Path, data: OPDDataModule, tmp_path: Path
):
    options = until(6, logger=csv_logger(tmp_path), limit_val_batches=0)
    model = module(models, mini_batches=2)
    fit(model, data, rollouts(), evaluate(every_n_steps=3, at_start=False), **options)
    assert [r["step"] for r in logged(tmp_path) if "eval/a/avg@3" in r] == [4, 6]


@pytest.mark.parametrize(("settings", "message"), [
    ({"every_n_steps": -1}, "every_n_steps must be at least 0; got -1"),
    ({"num_samples": 0}, "num_samples must be at least 1; got 0"),
    ({"pass_at": [4]}, "pass_at holds 4, but k is 1 to num_samples=3"),
    ({"sampling": SamplingConfig(num_generations=2)}, r"num_generations=2 and num_samples=3"),
    ({"level": 95.0}, "such as 0.95; got 95"),
])  # fmt: skip
def test_refuses_settings(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        evaluate(**settings)


def test_refuses_data_that_cannot_be_scored(models: Path, data: OPDDataModule):
    with pytest.raises(ConfigError, match=r"can score none .* are a, b, none, 3 of 3 kinds"):
        fit(module(models), data, rollouts(), Evaluate(tasks={}))
    with pytest.raises(ConfigError, match=r"no sampling, engine of its own.*no RolloutCallback"):
        fit(module(models), data, evaluate())
    data.sources["val"] = None
    data.tables = {}
    with pytest.raises(ConfigError, match=r"data\.val is not given"):
        fit(module(models), data, rollouts(), evaluate())
