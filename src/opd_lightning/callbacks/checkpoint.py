"""RunCheckpoint: what a run needs to go on as if it had never been killed."""

import hashlib
import json
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from opd_lightning.callbacks.loggers import LogMarks, mark_logs
from opd_lightning.callbacks.whole import (
    WRITING,
    BrokenCheckpoint,
    Sums,
    WholeCheckpointIO,
    files_of,
    marker_of,
    read_marker,
    remove,
    rename,
    sums_of,
    sync_files,
    write_whole,
)
from opd_lightning.errors import ConfigError

FOLDER = "checkpoints"
RUN_FILE = "run.json"
"""Says that a folder is one of `opd fit`, and which run it holds."""
_NAME = "step_{:08d}.ckpt"


class RunCheckpoint(Checkpoint):
    """Saves a run at the end of a round, so that it continues from there bit for bit.

    Saved are every `every_n_steps` optimiser steps (at the end of the round in which they are
    reached), before each evaluation while `keep_best` is above 0, and at the end. Files are
    `checkpoints/step_N.ckpt` in the run folder, each with a marker `step_N.ckpt.json` that is
    written last; `last.ckpt` and `best.ckpt` are links. The checkpoint of the last step gets its
    name when all results of the run are written, so that a run killed before then does the last
    steps again. Once a step is saved, checkpoints of later steps, left from a run that was resumed
    further back, are removed.

    Between the updates of a round nothing is saved, but at the end: where `max_steps` ends a run
    within a round, its last checkpoint is not one to go on from (the round's other half would be
    lost), and the one before it is taken.

    Hooks: `setup`, `on_train_start`, `on_train_batch_start`, `on_train_batch_end`,
    `on_validation_end`, `on_train_end`. Saves the step, whether an evaluation was due, which is
    then made up for when the run goes on, and the best measures. Seeds torch, numpy and random
    from (seed, step, rank) after each round: no random state has to be saved.

    Args:
        every_n_steps: Optimiser steps between two checkpoints.
        keep_last: How many of the latest are kept.
        keep_best: How many of the best by `monitor` are kept as well; 0: none.
        monitor: Measure of the evaluation; where it is not logged there is no best.
        mode: Whether the smallest or the largest is best.

    Raises:
        ConfigError: If a number is too small.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        keep_last: int = 2,
        keep_best: int = 1,
        monitor: str = "val/kl/reverse",
        mode: str = "min",
    ) -> None:
        for name, value, least in [
            ("every_n_steps", every_n_steps, 1),
            ("keep_last", keep_last, 1),
            ("keep_best", keep_best, 0),
        ]:
            if value < least:
                raise ConfigError(f"RunCheckpoint: {name} must be at least {least}; got {value}.")
        if mode not in ("min", "max"):
            raise ConfigError(f"RunCheckpoint: mode is 'min' or 'max'; got {mode!r}.")
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.monitor = monitor
        self.mode = mode
        self.identity: dict[str, Any] = {}
        self.until: list[int | None] = []
        """What the run is and its limits, for the marker; see `opd_lightning.resume`."""
        self._folder: Path | None = None
        self._first_step = 0  # of the round that is being trained
        self._saved_step = 0
        self._best: dict[str, float] = {}  # step -> measure
        self._saving = False
        self._state: dict[str, Any] = {}
        self._logs: LogMarks = {}
        self._loaded: dict[str, Any] = {}
        self._held: tuple[Path, Path] | None = None  # the last step's: where it is, its name

    # ------------------------------------------------------------------------------- hooks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make every file that this run saves whole or not there; clear what a kill has left."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        if stage != "fit":
            return
        first = trainer.strategy.broadcast(str(trainer.ckpt_path))
        if first != str(trainer.ckpt_path):
            raise ConfigError(
                f"rank {trainer.global_rank} would resume from {trainer.ckpt_path}, rank 0 from "
                f"{first}. Does each node see the same run folder?"
            )
        # on all ranks: Lightning asks the first one where the logs go
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / FOLDER
        folder = self._folder
        if trainer.is_global_zero and self.identity:
            write_run_file(folder.parent, self.identity)
        if trainer.is_global_zero and folder.is_dir():
            for left in folder.glob(f"{WRITING}*"):
                remove(left)

    def state_dict(self) -> dict[str, Any]:
        """Return what belongs to the checkpoint being saved: numbers, strings, truth values."""
        return self._state if self._saving else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._loaded = state_dict
        self._saved_step = state_dict.get("step", 0)
        self._best = dict(state_dict.get("best", {}))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make up for the evaluation that was due when the run was saved.

        Raises:
            ConfigError: If the checkpoint was made between the updates of a round.
        """
        _seed_all(trainer)
        loaded, self._loaded = self._loaded, {}
        if loaded.get("mid_round"):
            raise ConfigError(
                f"checkpoint {trainer.ckpt_path} was made at step {loaded['step']}, between the "
                f"updates of a round (model.mini_batches={pl_module.mini_batches}), where max_steps"
                " had ended the run: the rest of that round is lost. Go on from an earlier one."
            )
        if loaded.get("evaluation_due"):
            _evaluate(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the round's first step."""
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save where it is time to."""
        reached = trainer.global_step // self.every_n_steps > self._first_step // self.every_n_steps
        for_best = self.keep_best > 0 and _evaluation_follows(trainer)
        if (reached or for_best or is_last_round(trainer)) and not trainer.fast_dev_run:
            self.save_now(trainer)
        _seed_all(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the measure of the checkpoint that was saved before this evaluation."""
        value = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or value is None or self._saved_step != trainer.global_step:
            return
        if trainer.state.fn == "fit" and self.keep_best and torch.isfinite(value):
            self._best[str(trainer.global_step)] = float(value)
            if self._held is None:
                self._tidy(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the last step's checkpoint its name; other callbacks have written their results."""
        if self._held is not None:
            beside, path = self._held
            trainer.strategy.barrier("results are written")
            self._publish(trainer, beside, path, finished=True)
            self._held = None

    # ------------------------------------------------------------------------------ saving

    def save_now(self, trainer: L.Trainer) -> Path:
        """Save the run as it is at the end of a round, and return the checkpoint's path.

        To be called on all ranks, in `on_train_batch_end` behind callbacks that have a state, or in
        an evaluation that is then broken off. A step is saved once. After the last round the path
        is that which the checkpoint gets when the results are written.

        Raises:
            RunError: If it cannot be written.
        """
        step = trainer.global_step
        path = self._folder / _NAME.format(step)
        if step == self._saved_step:
            return path
        self._state = {
            "step": step,
            "evaluation_due": trainer.validating or _evaluation_follows(trainer),
            "mid_round": step - self._first_step < getattr(_module(trainer), "mini_batches", 1),
            "best": self._best,
        }
        beside = path.with_name(f"{WRITING}{path.name}")
        if trainer.is_global_zero and beside.exists():
            remove(beside)
        trainer.strategy.barrier("nothing is left of an earlier checkpoint")
        self._saving = True
        trainer.save_checkpoint(beside, weights_only=False)
        self._saving = False
        self._saved_step = step
        if is_last_round(trainer):
            self._held = beside, path
        else:
            self._publish(trainer, beside, path, finished=False)
        return path

    def _publish(self, trainer: L.Trainer, beside: Path, path: Path, finished: bool) -> None:
        """Rename on rank 0 and write the marker; all ranks wait for it."""
        sums = _sums_of_all_ranks(trainer, beside)
        if trainer.is_global_zero:
            if beside.is_dir():
                sync_files(beside)
            marker_of(path).unlink(missing_ok=True)
            rename(beside, path)
            if path.is_file():
                sums = {path.name: next(iter(sums.values()))}
            facts = {
                "step": self._state["step"],
                "mid_round": self._state["mid_round"],
                "finished": finished,
                "until": self.until,
                "logs": self._logs,
                "identity": self.identity,
                "files": sums,
            }
            write_whole(marker_of(path), json.dumps(facts, indent=1))
            _link(path.parent / "last.ckpt", path)
        self._tidy(trainer)
        trainer.strategy.barrier("checkpoint is published")

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Mark how far the logs are written."""
        if self._saving and trainer.is_global_zero:
            self._logs = mark_logs(trainer.loggers, self._folder.parent)

    def _tidy(self, trainer: L.Trainer) -> None:
        """Keep the latest and the best checkpoints up to this step; remove the others."""
        if not trainer.is_global_zero:
            return
        folder, done = self._folder, {}
        for path in _checkpoints(folder):
            with suppress(BrokenCheckpoint):
                facts = read_marker(path)
                if facts["step"] <= trainer.global_step:
                    done[path] = facts
        latest = sorted(done, key=lambda path: done[path]["step"])
        resumable = [path for path in latest if not done[path]["mid_round"]]
        ranked = sorted(
            (path for path in latest if str(done[path]["step"]) in self._best),
            key=lambda path: self._best[str(done[path]["step"])],
            reverse=self.mode == "max",
        )
        kept = {*latest[-1:], *resumable[-self.keep_last :], *ranked[: self.keep_best]}
        if ranked[: self.keep_best]:
            _link(folder / "best.ckpt", ranked[0])
        for path in _checkpoints(folder):
            if path not in kept and marker_of(path).exists():
                remove(path)


def write_run_file(folder: Path, identity: dict[str, Any]) -> None:
    """Write `run.json` into a run folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RUN_FILE, json.dumps({"identity": identity}, indent=1))


def _module(trainer: L.Trainer) -> L.LightningModule:
    return trainer.lightning_module


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*.ckpt") if not path.is_symlink())


def _link(link: Path, target: Path) -> None:
    beside = link.with_name(f"{WRITING}{link.name}")
    with suppress(OSError, NotImplementedError):  # file systems without links do without them
        beside.unlink(missing_ok=True)
        beside.symlink_to(target.name)
        os.replace(beside, link)


def _sums_of_all_ranks(trainer: L.Trainer, beside: Path) -> Sums:
    """Return the sums of a checkpoint's files; of a sharded one each rank reads its own shards."""
    if not beside.is_dir():
        if not trainer.is_global_zero:
            return {}
        io = trainer.strategy.checkpoint_io
        known = io.sums.get(str(beside)) if isinstance(io, WholeCheckpointIO) else None
        return {beside.name: known} if known else sums_of([beside], beside.parent)
    world, rank = trainer.world_size, trainer.global_rank
    mine = [path for number, path in enumerate(files_of(beside)) if number % world == rank]
    sums = sums_of(mine, beside)
    if world == 1:
        return sums
    gathered: list[Sums] = [{} for _ in range(world)]
    torch.distributed.all_gather_object(gathered, sums)
    return {name: value for part in gathered for name, value in part.items()}


def _evaluation_follows(trainer: L.Trainer) -> bool:
    """Whether Lightning evaluates after this round, for another reason than being stopped."""
    if not sum(trainer.num_val_batches):
        return False
    loop = trainer.fit_loop
    stop, trainer.should_stop = trainer.should_stop, False
    try:
        return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
    finally:
        trainer.should_stop = stop


def _evaluate(trainer: L.Trainer) -> None:
    """Run the evaluation that Lightning, which resumes behind it, leaves out."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    trainer.validating = True
    loop.restarting = False
    loop.run()
    trainer.training = True


def is_last_round(trainer: L.Trainer) -> bool:
    """Whether training ends with this round by its limits."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    loop, epochs = trainer.fit_loop, trainer.max_epochs
    if epochs in (None, -1) or loop.epoch_progress.current.processed + 1 < epochs:
        return False
    return loop.epoch_loop._num_ready_batches_reached()


def _seed_all(trainer: L.Trainer) -> None:
    """Seed what draws from global random states (nothing of this package does)."""
    seed = os.environ.get("PL_GLOBAL_SEED", "0")
    text = f"{seed}/{trainer.global_step}/{trainer.global_rank}"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
