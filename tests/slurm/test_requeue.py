"""A real SLURM: jobs that are told to stop, go back to the queue and continue; array jobs."""

import csv
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from opd_lightning.cli import main
from tests.cli.conftest import QUESTIONS, ROOT, write_prompts
from tests.slurm.cluster import Cluster, why_not
from tests.tiny import save_tiny

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

Submit = Callable[..., tuple[str, str]]
HELD_AT, STEPS = 3, 6
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
JOB = ["--gpus", "0", "--cpus", "1", "--time", "10:00"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm") / "c") as cluster:
        yield cluster


@pytest.fixture
def submit(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Return f(arguments of opd submit) -> (job number, what was printed)."""
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # for the callback
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))

    def run(*args: str) -> tuple[str, str]:
        main(["submit", *JOB, *args])
        printed = capsys.readouterr().out
        return re.match(r"job (\d+) submitted", printed)[1], printed

    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "student", seed=1, **SMALL)
    save_tiny(folder / "teacher", seed=2, **SMALL)
    config = {
        "model": {
            "student": str(folder / "student"),
            "teacher": str(folder / "teacher"),
            "objective": "ReverseKL",
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-2}},
        },
        "data": {
            "train": write_prompts(
                folder / "train.jsonl", [f"{q} {i}" for q in QUESTIONS for i in range(3)]
            ),
            "val": write_prompts(folder / "val.jsonl", QUESTIONS),
            "prompts_per_step": 4,
        },
        "rollout": {"sampling": {"max_completion_length": 6}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "max_epochs": -1,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "tests.slurm.holding.Hold",
                    "init_args": {"step": HELD_AT, "folder": str(folder / "hold")},
                }
            ],
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def log_of(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))


def weights_of(folder: Path) -> str:
    return hashlib.sha256((folder / "student" / "model.safetensors").read_bytes()).hexdigest()


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The lines of metrics.csv without times and empty cells."""
    with (folder / "metrics.csv").open(newline="") as lines:
        return [
            {k: v for k, v in row.items() if v and not k.startswith("perf/")}
            for row in csv.DictReader(lines)
        ]


def test_a_requeued_job_ends_as_one_that_was_not_interrupted(
    world: Path, cluster: Cluster, submit: Submit, tmp_path: Path
):
    config = ["--config", str(world / "run.yaml"), "--tasks", "2"]
    config += ["--config", str(ROOT / "configs" / "trainer" / "slurm.yaml")]
    first, _ = submit(*config, "--folder", str(tmp_path / "whole"))
    cluster.wait(lambda: cluster.state(first) not in ("PENDING", "RUNNING"), "the whole run", 120)
    assert cluster.state(first) == "COMPLETED", log_of(tmp_path / "whole")

    (world / "hold").mkdir()
    job, printed = submit(*config, "--folder", str(tmp_path / "cut"))
    held = [world / "hold" / f"held_{rank}" for rank in range(2)]
    cluster.wait(lambda: all(path.exists() for path in held), "step 3 on both ranks", 120)
    cluster.ask("scancel", "--signal=USR1", job)
    log = tmp_path / "cut" / f"{job}.log"
    assert f"log: {log}" in printed
    cluster.wait(lambda: "SIGUSR1 received" in log.read_text(), "the signal")
    (world / "hold" / "release").touch()
    cluster.wait(lambda: cluster.facts(job).get("Restarts") == "1", "the requeue", 90)
    cluster.wait(lambda: cluster.state(job) == "PENDING", "the queue")
    told = f"stopped by SIGUSR1 after step {HELD_AT + 1}. Job {job} is back in the queue."
    assert told in log.read_text()
    # it would begin in two minutes by itself
    cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    cluster.wait(lambda: cluster.state(job) not in ("PENDING", "RUNNING"), "the rest", 120)
    assert cluster.state(job) == "COMPLETED", log.read_text()
    assert f"at step {HELD_AT + 1}" in log.read_text(), "it went on from the checkpoint"

    whole, cut = (tmp_path / name / "version_0" for name in ("whole", "cut"))
    assert weights_of(cut) == weights_of(whole)
    assert rows_of(cut) == rows_of(whole)
    assert [row["step"] for row in rows_of(cut) if "loss" in row] == [
        str(step) for step in range(1, STEPS + 1)
    ]
    assert [path.name for path in (tmp_path / "cut").glob("version_*")] == ["version_0"]
    assert not list((tmp_path / "cut").rglob("*hpc_ckpt*"))


def test_a_sweep_is_an_array_job_with_a_folder_for_each_run(
    world: Path, cluster: Cluster, submit: Submit, tmp_path: Path
):
    job, printed = submit(
        "--config", str(world / "run.yaml"), "--trainer.max_steps", "1",
        "--folder", str(tmp_path / "sweep"), "--sweep", "objective=ReverseKL,ForwardKL",
        "--trainer.num_sanity_val_steps", "0", "--data.val", "null",
    )  # fmt: skip
    names = ["objective=ReverseKL", "objective=ForwardKL"]
    assert [line.split()[-1] for line in printed.splitlines()[2:]] == names
    tasks = [f"{job}_{task}" for task in range(2)]

    def ended() -> bool:
        return all(cluster.state(task) not in ("PENDING", "RUNNING") for task in tasks)

    cluster.wait(ended, "the array", 120)
    assert [cluster.state(task) for task in tasks] == ["COMPLETED"] * 2, log_of(tmp_path / "sweep")
    losses = []
    for task, name in enumerate(names):
        folder = tmp_path / "sweep" / name / "version_0"
        saved = yaml.safe_load((folder / "config.yaml").read_text())
        assert saved["model"]["objective"]["class_path"].endswith(name.partition("=")[2])
        losses.append(rows_of(folder)[0]["loss"])
        assert (tmp_path / "sweep" / f"{job}_{task}.log").is_file()
    assert losses[0] != losses[1]
