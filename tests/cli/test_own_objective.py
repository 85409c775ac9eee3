"""An objective of the user's own, by dotted path and by entry point; the Python example."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opd_lightning import Rollout, TokenDistribution
from tests.cli.conftest import ROOT, run_opd

EXAMPLE = ROOT / "examples" / "own_objective"


def fit(world: Path, out: Path, objective: str, path: Path) -> subprocess.CompletedProcess:
    return run_opd(
        "fit", "--config", str(world / "run.yaml"), "--trainer.max_steps", "1",
        "--trainer.default_root_dir", str(out), "--model.objective", objective,
        "--model.objective.sharpness", "1.5", PYTHONPATH=str(path),
    )  # fmt: skip


def test_by_dotted_path(world: Path, tmp_path: Path):
    done = fit(world, tmp_path, "sharpened_objective.SharpenedReverseKL", EXAMPLE)
    assert done.returncode == 0, done.stderr


def test_by_entry_point_once_installed(
    refused: Callable[..., str], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert "'SharpenedReversKL' is not known" in refused("--model.objective", "SharpenedReversKL")
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--target", str(site), str(EXAMPLE)],
        check=True,
    )  # fmt: skip
    done = fit(world, tmp_path, "SharpenedReverseKL", site)
    assert done.returncode == 0, done.stderr
    monkeypatch.syspath_prepend(str(site))
    message = refused("--model.objective", "SharpenedReversKL")
    assert (
        "Did you mean SharpenedReverseKL?" in message
        and "SequenceReverseKL, SharpenedRev" in message
    )


def test_a_taken_name_is_refused(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    info = tmp_path / "thief-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thief\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[opd_lightning.objectives]\nReverseKL = opd_lightning.objectives:ForwardKL\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    message = refused()
    assert "entry point 'ReverseKL' (opd_lightning.objectives:ForwardKL)" in message
    assert "takes the name of opd_lightning.objectives" in message and "Rename one" in message


def test_the_example_is_zero_at_the_sharpened_teacher(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from sharpened_objective import SharpenedReverseKL

    logits = torch.randn(3, 7, dtype=torch.float64)
    rollout = Rollout.from_flat(torch.tensor([1, 2, 3]), torch.tensor([0, 0, 1]))
    teacher = TokenDistribution.from_logits(logits)
    there = SharpenedReverseKL(1.5).token_loss(
        TokenDistribution.from_logits(1.5 * logits), teacher, rollout
    )
    assert there.loss.abs().max() < 1e-12
    assert (SharpenedReverseKL(1.5).token_loss(teacher, teacher, rollout).loss > 1e-3).all()


def test_the_audit_judges_the_example():
    named = "sharpened_objective.SharpenedReverseKL"
    done = run_opd(
        "audit", "--objective", named, f"{named}(sharpness=2.0)", PYTHONPATH=str(EXAMPLE)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("its own") == 4, done.stdout


def test_python_example_trains_and_exports(world: Path, tmp_path: Path):
    script = ROOT / "examples" / "python_api.py"
    args = [str(world / "student"), str(world / "teacher"), str(tmp_path / "run"), "1"]
    done = subprocess.run(
        [sys.executable, str(script), *args], capture_output=True, text=True, cwd=ROOT, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    readme = (ROOT / "README.md").read_text()
    for line in script.read_text().splitlines():
        if line.startswith(("data =", "rollout =", "trainer.fit")):
            assert line in readme
