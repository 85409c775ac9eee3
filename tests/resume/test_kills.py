"""Runs killed with SIGKILL at any instant, started again, end as one that was never killed.

All compared: sha256 of the student's weights, metrics.csv and TensorBoard's records (each step
once), summary.json, and the tokens of every round on every rank.
"""

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from opd_lightning.callbacks import whole
from tests.resume.kit import Run, assert_equal

ONE = "one process, two updates a round"
DDP = "two processes (DDP)"
FSDP = "two processes (FSDP2), sharded checkpoints"
GATHERED = "two processes (FSDP2), one file"
FSDP2 = ["--trainer.strategy=opd_lightning.FSDP2Strategy", "--trainer.max_steps=14"]
DESIGNS = {
    ONE: (1, ["--model.mini_batches=2"]),
    DDP: (2, ["--trainer.strategy=ddp", "--trainer.max_steps=14"]),
    FSDP: (2, [*FSDP2, "--trainer.strategy.save_distributed_checkpoint=true"]),
    GATHERED: (2, [*FSDP2, "--trainer.strategy.save_distributed_checkpoint=false"]),
}


@pytest.fixture(scope="module")
def design(request: pytest.FixtureRequest, world: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run that was never killed, how long it took, and what makes another like it."""
    ranks, args = DESIGNS[request.param]
    folder = tmp_path_factory.mktemp("kills")
    whole_run = Run(world, folder / "whole", *args)
    began = time.monotonic()
    whole_run.finish(ranks=ranks)
    seconds = time.monotonic() - began
    return whole_run, seconds, ranks, lambda name: Run(world, folder / name, *args)


def of(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("design", names, indirect=True, scope="module")


@of(ONE, DDP, FSDP)
def test_killed_at_random_instants(design: tuple):
    """Each kill at an instant drawn from the whole length of the run: 10 for all designs."""
    whole_run, seconds, ranks, another = design
    draw, run = random.Random(ranks), another("random")
    for _ in range(4 if ranks == 1 else 3):
        run.start(ranks=ranks)
        run.wait(draw.uniform(0.2, 1.0) * seconds)
        run.kill()
    run.finish(ranks=ranks)
    assert_equal(run, whole_run)


def die_at(call: int) -> None:
    """Have this process kill itself within its `call`-th change of a name or sync of a file."""
    seen = 0

    def patched(name: str) -> None:
        original = getattr(os, name)

        def counted(*args: object, **kwargs: object) -> object:
            nonlocal seen
            seen += 1
            if seen == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, name, counted)

    for name in ("replace", "fsync", "unlink", "truncate"):
        patched(name)


@of(ONE)
def test_killed_between_the_calls_that_write_a_checkpoint(design: tuple):
    """The instants that matter most, around names: after each kill the next is further on."""
    whole_run, _, ranks, another = design
    run = another("calls")
    for call in (3, 5, 8, 11, 14, 16):
        run.start(ranks=ranks, prepare=partial(die_at, call))
        assert run.wait()[0] == -signal.SIGKILL, run.log.read_text()[-2000:]
    run.finish(ranks=ranks)
    assert_equal(run, whole_run)


def die_while_writing(blocks: int) -> None:
    """Have this process kill itself when `blocks` blocks of a checkpoint are written."""
    write, seen = whole._Summed.write, 0

    def counted(self: whole._Summed, block: object) -> int:
        nonlocal seen
        seen += 1
        if seen == blocks:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, block)

    whole._Summed.write = counted


def die_in_evaluation(batches: int) -> None:
    """Have this process kill itself in its `batches`-th batch of an evaluation."""
    from opd_lightning.module import OPDModule

    step, seen = OPDModule.validation_step, 0

    def counted(self: OPDModule, *args: object) -> object:
        nonlocal seen
        seen += 1
        if seen == batches:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    OPDModule.validation_step = counted


def die_while_results_are_written() -> None:
    """Have this process kill itself after the last evaluation, when the student is exported."""
    from opd_lightning.module import OPDModule

    OPDModule.export = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


@of(ONE, DDP)
def test_killed_while_writing_evaluating_and_ending(design: tuple):
    whole_run, _, ranks, another = design
    run = another("within")
    for prepare in (
        partial(die_in_evaluation, 1),  # the one before the first step
        partial(die_while_writing, 40),
        partial(die_in_evaluation, 6),  # of two a time: one in the middle of the run
        die_while_results_are_written,
    ):
        run.start(ranks=ranks, prepare=prepare)
        assert run.wait()[0] == -signal.SIGKILL, run.log.read_text()[-2000:]
    run.finish(ranks=ranks)
    assert_equal(run, whole_run)


@of(ONE, FSDP, GATHERED)
def test_killed_before_a_copy_was_complete(design: tuple):
    """The newest checkpoint is cut off: it is named, and the run goes on from the one before."""
    whole_run, _, ranks, another = design
    run = another("cut off")
    run.start(ranks=ranks, prepare=partial(die_in_evaluation, 6))
    assert run.wait()[0] == -signal.SIGKILL
    newest, before = run.steps_saved()[-1], run.steps_saved()[-2]
    path = run.run_folder / "checkpoints" / f"step_{newest:08d}.ckpt"
    part = max(whole.files_of(path), key=lambda file: file.stat().st_size)
    os.truncate(part, part.stat().st_size - 1000)
    run.finish(ranks=ranks)
    said = run.log.read_text()
    assert f"{path} is not whole and passed over: {part.name} has" in said
    assert f"at step {before}\n" in said
    assert_equal(run, whole_run)
