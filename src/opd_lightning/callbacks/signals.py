"""Ends a run that is told to end: after the step, with a checkpoint, on all ranks together."""

import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from opd_lightning.callbacks.checkpoint import is_last_round
from opd_lightning.errors import ConfigError, RunError, RunStopped

# a later one wins where a run gets several: the job is to go on
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# What a rank may still do once the first has ended, such as writing a last file.
_SECONDS_AFTER_FIRST_RANK = 10

# Between the loss of a rank's connection and its end.
_SECONDS_TO_END = 1.0


class StopOnSignal(L.Callback):
    """Ends training after SIGTERM, Ctrl-C (SIGINT) or SIGUSR1, with a checkpoint.

    The handlers only set a flag. At the end of a round, when all its optimiser steps are made, the
    ranks agree (one that got the signal is enough), all save, and training ends with `RunStopped`,
    for which `opd` exits with 0. An evaluation is broken off: the checkpoint is that of the round
    before it. Before the first round there is nothing to save. After the last round the run ends
    by itself. A second Ctrl-C ends the process at once.

    SIGUSR1 inside a SLURM job, which `sbatch --signal=USR1@120` sends before the time is up, also
    sends the job back to the queue (`scontrol requeue`).

    Hooks: `setup`, `on_train_start`, `on_train_batch_end`, `on_validation_start`,
    `on_validation_batch_end`, `on_save_checkpoint`, `teardown`, `on_exception`. Saves nothing of
    its own. Lightning's signal handlers are not installed: they run collectives and save inside
    the handler, at another place of the step on each rank, which can wait forever. Evaluations
    need equally many batches on all ranks. Put it last, so that others have done their part.

    A rank that Lightning's launcher started also ends, soon, when the first rank is gone.

    Raises:
        RunStopped: Out of `trainer.fit`, when a signal has ended the run.
        RunError: Out of `trainer.fit`, when SLURM does not take the job back.
    """

    def __init__(self) -> None:
        self._received = 0  # 1-based place in _SIGNALS; 0: nothing
        self._previous: dict[int, Any] = {}
        self._process = 0
        self._is_first_rank = True
        self._loops: dict[str, Any] | None = None  # as they were at the end of the last round
        self._saving = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Install the handlers for training; elsewhere signals keep their meaning."""
        if stage != "fit" or threading.current_thread() is not threading.main_thread():
            return
        self._received, self._loops = 0, None
        self._process, self._is_first_rank = os.getpid(), trainer.is_global_zero
        trainer._signal_connector.register_signal_handlers = lambda: None
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        if trainer.local_rank and isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            threading.Thread(target=_end_after_parent, args=[os.getppid()], daemon=True).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data worker, which the step to be finished may still need
        if not self._received:
            name = signal.Signals(number).name
            self._say(f"opd: {name} received; finishing the round, then saving.")
        self._received = max(self._received, _SIGNALS.index(number) + 1)
        if number == signal.SIGINT:
            # by the system itself, since a process that waits in a collective runs no handler
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            self._say(" Ctrl-C again stops at once.")
        self._say("\n")

    def _say(self, text: str) -> None:
        if self._is_first_rank:
            os.write(2, text.encode())  # print may be interrupted by this very handler

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop before the first round."""
        self._stop_if_told(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Stop at the end of a round."""
        self._loops = deepcopy(trainer.fit_loop.state_dict())
        self._stop_if_told(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop before an evaluation, such as the one before the first round."""
        self._stop_if_told(trainer)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Stop within an evaluation."""
        self._stop_if_told(trainer)

    def _stop_if_told(self, trainer: L.Trainer) -> None:
        # after the last round only the run's results are left to be written
        if not self._previous or (is_last_round(trainer) and not trainer.sanity_checking):
            return
        received = torch.tensor(self._received, device=trainer.strategy.root_device)
        received = int(trainer.strategy.reduce(received, reduce_op="max"))
        if not received:
            return
        number = _SIGNALS[received - 1]
        how = self._save(trainer)
        trainer.strategy.barrier("stopped")
        if not trainer.is_global_zero:
            raise RunStopped("")
        told = f"stopped by {number.name} after step {trainer.global_step}."
        job = slurm_job()
        if number == signal.SIGUSR1 and job is not None:
            requeue(job, f"{told} {how}")
            raise RunStopped(f"{told} Job {job} is back in the queue.")
        raise RunStopped(f"{told} {how}")

    def _save(self, trainer: L.Trainer) -> str:
        """Save on all ranks; return in words how to go on."""
        if self._loops is None and not trainer.ckpt_path:
            return "Nothing was trained yet, so nothing is saved."
        if self._loops is None:
            return (
                f"Nothing was trained since {trainer.ckpt_path}, which is the place to go on from"
            )
        self._saving = True
        option, path = save_checkpoint(trainer)
        self._saving = False
        return f"To go on, run the same command with {option} {path}"

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the loops as they were before an evaluation that is broken off."""
        if self._saving:
            checkpoint["loops"]["fit_loop"] = self._loops

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back; name the ranks that have ended, whose own words may be missing."""
        self._restore()
        for rank, process in enumerate(getattr(trainer.strategy.launcher, "procs", []), start=1):
            with suppress(subprocess.TimeoutExpired):
                if code := process.wait(_SECONDS_TO_END):
                    self._say(f"opd: rank {rank} {_ending(code)}\n")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._previous = {}


def _ending(code: int) -> str:
    """Return in words how a process ended: below 0 is the signal's number."""
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL): by hand, or by the system for want of memory."
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}."
    return f"ended with exit code {code}; see its own error."


def _end_after_parent(parent: int) -> None:
    """End this process soon after `parent` has ended; a collective on a GPU might wait forever."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(_SECONDS_AFTER_FIRST_RANK)
    os.write(2, b"opd: the first rank has ended; this one ends too.\n")
    os._exit(1)


def save_checkpoint(trainer: L.Trainer) -> tuple[str, Path]:
    """Save the run as it is at the end of a round, on all ranks.

    By the first callback that has `save_now`, such as RunCheckpoint; else by Lightning alone.

    Returns:
        The option of `opd fit` that goes on from there, and the path.
    """
    for callback in trainer.callbacks:
        if hasattr(callback, "save_now"):
            return "--resume", callback.save_now(trainer)
    folder = Path(trainer.lightning_module.run_folder) / "checkpoints"
    path = folder / f"stopped-step={trainer.global_step}.ckpt"
    trainer.save_checkpoint(path)
    return "--ckpt_path", path


def slurm_job() -> str | None:
    """Return the SLURM job of this process, as `scontrol` takes it; None outside of one.

    A task of an array is ARRAY_TASK: one task's own number may be that of the whole array.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def requeue(job: str, told: str) -> None:
    """Send a job back to the queue.

    Args:
        job: The job or the task of an array.
        told: What happened so far, for the error.

    Raises:
        RunError: If `scontrol` is missing or refuses.
    """
    reason = "scontrol is not on the PATH"
    if shutil.which("scontrol") is not None:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if done.returncode == 0:
            return
        reason = f"scontrol requeue {job}: {done.stderr.strip() or done.stdout.strip()}"
    raise RunError(f"{told} The job did not go back to the queue ({reason}). Submit it again.")


def refuse_foreign_checkpoint(folder: str | Path, ckpt_path: str | None) -> None:
    """Refuse a folder from which Lightning would silently resume another job's run.

    Inside `srun`, a run without a checkpoint takes the newest `hpc_ckpt_*.ckpt` of its folder,
    whoever left it there.

    Raises:
        ConfigError: If there is one, and no checkpoint is asked for.
    """
    if ckpt_path is not None or not SLURMEnvironment.detect():
        return
    for found in sorted(Path(folder).glob("*hpc_ckpt_*")):
        raise ConfigError(
            f"{found} is left from some job, and Lightning would resume from it unasked. Give "
            "--ckpt_path hpc if that is meant, move it away, or use another "
            "trainer.default_root_dir."
        )
