"""Tiny models, prompts and a configuration on disk, and the command in a process or in this one."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GenerationConfig

from opd_lightning.cli import main
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
QUESTIONS = ["Why is the sky blue?", "How do I boil an egg?", "Name a fruit.", "What is 2 + 2?"]


def run_opd(*args: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run `opd` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "opd_lightning.cli", *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )


def write_prompts(path: Path, prompts: list[str]) -> str:
    """Write one JSON object a prompt."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with student, teacher, prompts and `run.yaml`; and `unread.yaml`, the same with
    models whose weights cannot be read, for what must be refused before they are."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "student", seed=1, num_hidden_layers=2)
    save_tiny(folder / "teacher", seed=2, num_hidden_layers=3)
    # two end tokens and a setting of its own, as chat models have
    GenerationConfig(eos_token_id=[1, 7], pad_token_id=1, do_sample=True, top_k=11).save_pretrained(
        folder / "student"
    )
    config: dict[str, Any] = {
        "model": {
            "student": str(folder / "student"),
            "teacher": str(folder / "teacher"),
            "objective": {"class_path": "TopKReverseKL", "init_args": {"k": 8}},
            "weights": ["SpecialTokenMask"],
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-2}},
        },
        "data": {
            "train": write_prompts(
                folder / "train.jsonl", [f"{q} {i}" for q in QUESTIONS for i in range(3)]
            ),
            "val": write_prompts(folder / "val.jsonl", QUESTIONS),
            "prompts_per_step": 4,
        },
        "rollout": {"sampling": {"max_completion_length": 6, "top_p": 0.9}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "max_epochs": -1,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder / "runs"),
            "callbacks": [
                {
                    "class_path": "RunCheckpoint",
                    "init_args": {"every_n_steps": 2},
                }
            ],
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    for name in ("student", "teacher"):
        shutil.copytree(folder / name, folder / "unread" / name)
        (folder / "unread" / name / "model.safetensors").write_bytes(b"no weights")
        config["model"][name] = str(folder / "unread" / name)
    config["trainer"]["default_root_dir"] = str(folder / "refused")
    (folder / "unread.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def refused(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run `opd` in this process, expect it to be refused, and return its one message.

    The models' weights cannot be read, so a refusal is one before they are.
    """

    def run(*args: str, code: int = 2, verb: str | None = "fit") -> str:
        line = [verb, "--config", str(world / "unread.yaml"), *args] if verb else list(args)
        monkeypatch.setattr(sys, "argv", ["opd", *line])
        with pytest.raises(SystemExit) as exit_:
            main(line)
        said = capsys.readouterr()
        assert exit_.value.code == code, said.err
        messages = [part for part in said.err.split("\n") if part.startswith("opd: ")]
        assert len(messages) == 1, said.err
        assert "Traceback" not in said.err and "Expected a" not in said.err
        assert "cannot load the model" not in said.err, "weights were read first"
        return messages[0]

    return run
