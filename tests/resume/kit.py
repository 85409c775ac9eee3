"""Runs of `opd fit` in real processes that are killed and started again, and what they left.

A fork server has everything imported, so that a process begins within a moment.
"""

import csv
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import safetensors.torch
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
import yaml
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy  # noqa: F401
from matplotlib import pyplot  # noqa: F401
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

from opd_lightning.cli import main
from opd_lightning.records import PromptBatch
from tests.module.harness import save_pair, write_prompts

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
SECONDS = 120
"""After which a process counts as hanging."""


class RolloutLog(L.Callback):
    """Appends each round's step and a hash of its tokens to a file of this rank."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        tokens = batch.rollout.input_ids[batch.rollout.attention_mask.bool()]
        digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        line = json.dumps([trainer.global_step, digest]) + "\n"
        name = f"rollouts_{trainer.global_rank}_of_{trainer.world_size}.jsonl"
        with (Path(self.folder) / name).open("a") as file:
            file.write(line)


class DrawsAtRandom(L.Callback):
    """Uses the global random state, as a user's code might: it moves the weights a little."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        noise = trainer.strategy.broadcast(float(torch.rand(())))  # ranks hold the same weights
        with torch.no_grad():
            for parameter in pl_module.student.parameters():
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                local.add_(1e-4 * noise)


def write_world(folder: Path) -> Path:
    """Write two models, prompts and `run.yaml`: 24 steps, evaluated each 6, saved each 4."""
    save_pair(folder)
    config = {
        "model": {
            "student": str(folder / "student"),
            "teacher": str(folder / "teacher"),
            "objective": {"class_path": "TopKReverseKL", "init_args": {"k": 8}},
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-2}},
            "lr_scheduler": {"class_path": "CosineAnnealingLR", "init_args": {"T_max": 24}},
        },
        "data": {
            "train": write_prompts(folder / "train.jsonl", 11),
            "val": write_prompts(folder / "val.jsonl", 5),
            "prompts_per_step": 4,
        },
        "rollout": {"sampling": {"max_completion_length": 6}},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 24,
            "max_epochs": -1,
            "val_check_interval": 6,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "RunCheckpoint", "init_args": {"every_n_steps": 4}},
            ],
        },
        "resume": "auto",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def run_process(
    args: list[str], log: str, environment: dict[str, str], prepare: Callable[[], None] | None
) -> None:
    """What a forked process does: `opd fit`, with its output in a file."""
    os.setsid()
    os.environ.update(environment)
    torch.set_num_threads(1)
    number = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(number, 1)
    os.dup2(number, 2)
    sys.argv = ["opd", *args]
    if prepare is not None:
        prepare()
    main(args)


class Run:
    """`opd fit` on the world's configuration, in `ranks` processes, again and again."""

    def __init__(self, world: Path, folder: Path, *args: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.log = folder, folder / "log.txt"
        callbacks = [
            {"class_path": "tests.resume.kit.RolloutLog", "init_args": {"folder": str(folder)}},
            {"class_path": "tests.resume.kit.DrawsAtRandom"},
        ]
        self.args = ["fit", "--config", str(world / "run.yaml"), *args]
        self.args += ["--trainer.default_root_dir", str(folder / "runs")]
        self.args += [f"--trainer.callbacks+={json.dumps(one)}" for one in callbacks]
        self.processes: list[Any] = []

    def start(self, *args: str, ranks: int = 1, prepare: Callable[[], None] | None = None) -> None:
        """Fork the processes."""
        environment: list[dict[str, str]] = [{}]
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
            environment = [shared | {"LOCAL_RANK": str(rank)} for rank in range(ranks)]
        line = [*self.args, *args, f"--trainer.devices={ranks}"]
        self.processes = [
            CONTEXT.Process(target=run_process, args=(line, str(self.log), own, prepare))
            for own in environment
        ]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        """Send SIGKILL to all processes, at the same instant as nearly as can be."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def wait(self, seconds: float = SECONDS) -> list[int | None]:
        """Wait for the end of all processes and return their exit codes; None: still running.

        Where one process was killed, the others, which would wait for it, are killed too.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(p.is_alive() for p in self.processes):
            time.sleep(0.02)
            if any(p.exitcode is not None and p.exitcode < 0 for p in self.processes):
                self.kill()
        return [process.exitcode for process in self.processes]

    def finish(self, *args: str, ranks: int = 1, **options: Any) -> None:
        """Run to the end, which must be reached."""
        self.start(*args, ranks=ranks, **options)
        codes = self.wait()
        assert codes == [0] * ranks, f"{codes}\n{self.log.read_text()[-3000:]}"

    # ------------------------------------------------------------------------- what is left

    @property
    def run_folder(self) -> Path:
        """The one run folder: a run that goes on makes no second one."""
        (folder,) = (self.folder / "runs").iterdir()
        return folder

    def steps_saved(self) -> list[int]:
        """Steps of the checkpoints that have a marker."""
        markers = (self.run_folder / "checkpoints").glob("step_*.ckpt.json")
        return sorted(json.loads(marker.read_text())["step"] for marker in markers)

    def weights(self) -> str:
        """sha256 of the student's tensors."""
        tensors = safetensors.torch.load_file(self.run_folder / "student" / "model.safetensors")
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def metrics(self) -> list[dict[str, str]]:
        """Rows of metrics.csv, without times."""
        with (self.run_folder / "metrics.csv").open(newline="") as lines:
            return [
                {k: v for k, v in row.items() if not k.startswith("perf/") or "padding" in k}
                for row in csv.DictReader(lines)
            ]

    def events(self) -> dict[str, list[tuple[int, float]]]:
        """TensorBoard's scalars, without times: all records that the event files hold."""
        events = EventAccumulator(str(self.run_folder), purge_orphaned_data=False).Reload()
        return {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if not tag.startswith("perf/") or "padding" in tag
        }

    def summary(self) -> dict[str, Any]:
        """summary.json, without times and paths."""
        summary = json.loads((self.run_folder / "summary.json").read_text())
        for name in ("seconds", "tokens_per_second", "config"):
            summary.pop(name)
        return summary

    def rollouts(self) -> dict[str, dict[int, str]]:
        """Rank -> step -> hash of the tokens; a step that was made again must have the same."""
        found: dict[str, dict[int, str]] = {}
        for path in sorted(self.folder.glob("rollouts_*.jsonl")):
            steps = found.setdefault(path.stem, {})
            for line in path.read_text().splitlines():
                step, digest = json.loads(line)
                assert steps.setdefault(step, digest) == digest, f"{path.stem}: step {step} differs"
        return found

    def left(self) -> dict[str, Any]:
        """All that must not depend on whether the run was killed."""
        return {
            "weights": self.weights(),
            "metrics": self.metrics(),
            "events": self.events(),
            "summary": self.summary(),
            "rollouts": self.rollouts(),
        }


def assert_equal(run: Run, other: Run) -> None:
    """Compare all that two runs have left, naming what differs."""
    ours, theirs = run.left(), other.left()
    for name in ours:
        assert ours[name] == theirs[name], name
