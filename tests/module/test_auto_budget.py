"""`micro_batch_tokens: auto`: within the limit, without traces, the same on all ranks."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from opd_lightning import memory
from opd_lightning.cli import main
from opd_lightning.data import OPDDataModule
from opd_lightning.errors import ConfigError
from opd_lightning.module import OPDModule
from tests.module.harness import (
    answered,
    csv_logger,
    distance,
    fit,
    logged,
    module,
    rollouts,
    until,
    write_prompts,
)
from tests.module.test_two_ranks import ended

ROOT = Path(__file__).parents[2]
COMMAND = [
    *("fit", "--model.student", "x", "--model.teacher", "y", "--model.objective", "ReverseKL"),
    *("--data.train", "p.jsonl"),
]


def test_a_real_run_stays_within_the_limit(tmp_path: Path):
    limit = 1.5
    done = subprocess.run(
        [sys.executable, "-m", "tests.module.within_limit", str(tmp_path), str(limit)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parameters"] > 20e6
    assert found["steps"] == 3
    assert found["untouched"], "weights, gradients or random state are not as they were"
    assert found["peak_gb"] <= limit
    assert found["peak_of_twice_gb"] > limit, "less than half of what would fit was chosen"


def test_the_budget_is_said_logged_and_kept(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    data = OPDDataModule(write_prompts(tmp_path / "p.jsonl", 8), prompts_per_step=4)
    model = module(models, micro_batch_tokens="auto", memory_limit_gb=50, mini_batches=2)
    with caplog.at_level(logging.INFO, "opd_lightning"):
        trainer = fit(model, data, rollouts(), **until(2), logger=csv_logger(tmp_path))
    longest = data.longest_prompt + 5
    budget = model.micro_batch_tokens
    assert budget == 2 * longest, "all rows of an update fit, and more are not needed"
    assert f"auto -> {budget} (rows of up to {longest} tokens, limit 50.00 GB" in caplog.text
    assert [line["perf/micro_batch_tokens"] for line in logged(tmp_path)] == [budget] * 2
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    def resumed(limit: float) -> int:
        again = module(models, micro_batch_tokens="auto", memory_limit_gb=limit, mini_batches=2)
        again._largest_budget = lambda: 77
        fit(again, data, rollouts(), ckpt_path=tmp_path / "last.ckpt", **until(4))
        return again.micro_batch_tokens

    assert resumed(50) == budget, "a resumed run computes as the interrupted one"
    assert resumed(60) == 77


def test_auto_changes_no_weight_that_a_number_gives(models: Path):
    ends = []
    for budget in ("auto", None):
        limit = {"memory_limit_gb": 1.0} if budget == "auto" else {}
        model = module(models, dtype="float64", micro_batch_tokens=budget, **limit)
        fit(model, [answered(seed=i) for i in range(2)])
        ends.append({k: v.clone() for k, v in model.student.model.state_dict().items()})
    assert distance(*ends) < 1e-12


def test_two_ranks_search_together(models: Path, tmp_path: Path):
    """It ends, so they agreed on what to measure; and they train as one does."""
    one = ended(models, tmp_path / "one", 1)
    settings = {"micro_batch_tokens": "auto", "memory_limit_gb": 60}
    two = ended(models, tmp_path / "two", 2, **settings)
    assert distance(two, one) < 1e-12
    lines = [line for line in logged(tmp_path / "two") if "loss" in line]
    assert len(lines) == 2
    assert {line["perf/micro_batch_tokens"] for line in lines} == {64 * 256}


def test_ranks_take_the_highest_peak_and_the_lowest_limit(models: Path, monkeypatch):  # noqa: ANN001
    """The other rank needs 2 GB more and has 3 GB less."""
    given = {}

    def search(peak_of, longest, limit, later, rows):  # noqa: ANN001
        given["peak"], given["limit"] = peak_of(1, 4), limit
        return 512

    def gathered(self: OPDModule, value: torch.Tensor) -> torch.Tensor:
        if value.dim():  # the counts of an update: this rank is alone
            return value[None]
        other = 3 * 10**9 if value < 0 else 2 * 10**9
        return torch.stack([value, value + other])

    monkeypatch.setattr(memory, "largest_budget", search)
    monkeypatch.setattr(memory, "peak_bytes", lambda device, run: 10**9)
    monkeypatch.setattr(OPDModule, "all_gather", gathered)
    model = module(models, micro_batch_tokens="auto", memory_limit_gb=60)
    fit(model, [answered()])
    assert given == {"peak": 3 * 10**9, "limit": 57 * 10**9}


def test_a_limit_that_is_too_small_says_the_numbers(models: Path):
    model = module(models, micro_batch_tokens="auto", memory_limit_gb=0.01)
    with pytest.raises(ConfigError, match=r"one row of 256 tokens needs about .* is 0\.01"):
        fit(model, [answered()])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"micro_batch_tokens": "many"}, "a number, None or 'auto'; got 'many'"),
        ({"memory_limit_gb": 4.0}, "memory_limit_gb=4.0 with micro_batch_tokens=None"),
        ({"memory_limit_gb": 4.0, "micro_batch_tokens": 9}, "micro_batch_tokens=9"),
        ({"memory_limit_gb": 0.0, "micro_batch_tokens": "auto"}, "above 0"),
    ],
)
def test_settings_without_effect_or_meaning_are_refused(models: Path, settings: dict, said: str):
    with pytest.raises(ConfigError) as error:
        module(models, **settings)
    assert said in str(error.value)


@pytest.mark.parametrize(("given", "value"), [("auto", "auto"), ("512", 512), ("null", None)])
def test_the_command_line_takes_it(given: str, value: object, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main([*COMMAND, "--model.micro_batch_tokens", given, "--print_config"])
    assert ended.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["micro_batch_tokens"] == value


@pytest.mark.parametrize("given", ["many", "1.5"])
def test_the_command_line_refuses_another_word(given: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main([*COMMAND, "--model.micro_batch_tokens", given])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"model.micro_batch_tokens '{given}'" in said
    assert "auto" in said
