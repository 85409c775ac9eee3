"""A full disk, a broken line, a broken engine: a clear error, and the last checkpoint intact."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opd_lightning.cli import main
from tests.faults.conftest import failed, whole_checkpoints
from tests.faults.test_signals import FAULTY, SAVING, results


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a file system of its own can be mounted by root only")
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"tmpfs cannot be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_disk_full(world: Path, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    config = ["fit", "--config", str(world / "run.yaml"), "--trainer.callbacks", SAVING]
    config += ["--data.val", "null", "--trainer.max_steps", "30"]
    root = ["--trainer.default_root_dir", str(small_disk)]
    code, message = failed(capsys, *config, *root)
    assert code == 1
    assert "cannot write the checkpoint" in message and "No space left" in message
    assert "Earlier checkpoints are intact" in message
    saved = whole_checkpoints(small_disk)
    assert saved and saved == list(range(1, len(saved) + 1))
    last = small_disk / "version_0" / "checkpoints" / f"step_{saved[-1]:08d}.ckpt"
    # with room again it goes on
    steps = ["--trainer.max_steps", str(saved[-1] + 1)]
    other = ["--trainer.default_root_dir", str(tmp_path / "on")]
    main([*config, *steps, *other, "--ckpt_path", str(last)])
    assert whole_checkpoints(tmp_path / "on") == [saved[-1] + 1]


def test_a_line_in_the_middle_that_cannot_be_read(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    lines = (world / "train.jsonl").read_text().splitlines()
    lines[6] = lines[6][:-1]
    (tmp_path / "broken.jsonl").write_text("\n".join(lines))
    code, message = failed(
        capsys, "fit", "--config", str(world / "run.yaml"), "--data.train",
        str(tmp_path / "broken.jsonl"), "--trainer.default_root_dir", str(tmp_path / "run"),
    )  # fmt: skip
    assert code == 2
    assert f"{tmp_path / 'broken.jsonl'}:7: not valid JSON" in message
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("metrics.csv"))


def test_an_engine_that_raises_in_the_middle(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    config = ["fit", "--config", str(world / "run.yaml"), "--trainer.callbacks", SAVING]
    cut = ["--trainer.default_root_dir", str(tmp_path / "cut")]
    code, message = failed(capsys, *config, *cut, *FAULTY, "raise", "--rollout.engine.step", "3")
    assert code == 1
    assert "Faulty failed on 4 prompts (lines [" in message
    assert "the sampler has broken down. The last checkpoint is intact." in message
    assert whole_checkpoints(tmp_path / "cut") == [1, 2, 3]
    last = tmp_path / "cut" / "version_0" / "checkpoints" / "step_00000003.ckpt"
    repaired = ["--resume", str(last), "--resume.allow_change", "rollout"]
    main([*config, *cut, *repaired])
    main([*config, "--trainer.default_root_dir", str(tmp_path / "whole")])
    weights, rows = results(tmp_path / "cut" / "version_0")
    expected, expected_rows = results(tmp_path / "whole" / "version_0")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert rows == expected_rows
