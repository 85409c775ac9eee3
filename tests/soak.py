"""Trains twice, once with faults and once without, and compares all that is left, again and again.

python -m tests.soak --minutes 30

A phase is some more steps with one or two processes (DDP). The run with faults is killed by SIGKILL
at random instants, told to stop by SIGTERM and started again, and finds its newest checkpoint cut
off. At the end of each phase both must have the same weights, logs, summary and rollouts.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from opd_lightning.callbacks import whole
from tests.resume.kit import Run, write_world

_STEPS = (8, 30)
"""Of a phase, at least and at most."""
_FAULTS = (1, 4)
_FASTEST_STEP_SECONDS = 0.1


def main() -> None:
    """Run phases until the time is up; exit with 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    until = time.monotonic() + 60 * given.minutes
    draw, counts = random.Random(given.seed), Counter()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        world = write_world(Path(folder))
        args = ["--model.mini_batches=2", "--trainer.strategy=ddp"]
        faulty, clean = (Run(world, Path(folder) / name, *args) for name in ("faulty", "clean"))
        steps, ranks = 0, 1
        while time.monotonic() < until:
            steps += 2 * (draw.randint(*_STEPS) // 2)
            before, ranks = ranks, draw.choice([1, 2])
            counts["world-size changes"] += steps > 0 and before != ranks
            _phase(draw, faulty, clean, steps, ranks, counts)
            print(f"{steps} steps, {ranks} process(es): {_told(counts)}", flush=True)
    print(f"soak: {steps} steps done, {_told(counts)}")
    sys.exit(counts["mismatches"] > 0)


def _phase(
    draw: random.Random, faulty: Run, clean: Run, steps: int, ranks: int, counts: Counter
) -> None:
    limit = f"--trainer.max_steps={steps}"
    began = time.monotonic()
    clean.finish(limit, ranks=ranks)
    seconds = time.monotonic() - began
    for _ in range(draw.randint(*_FAULTS)):
        faulty.start(limit, ranks=ranks)
        faulty.wait(draw.uniform(_FASTEST_STEP_SECONDS, seconds))
        _fault(draw, faulty, counts)
    faulty.finish(limit, ranks=ranks)
    ours, theirs = faulty.left(), clean.left()
    for name in ours:
        if ours[name] != theirs[name]:
            counts["mismatches"] += 1
            print(f"MISMATCH at step {steps}: {name}", flush=True)


def _fault(draw: random.Random, run: Run, counts: Counter) -> None:
    """Do one of the faults to a run that may be anywhere, or at its end already."""
    if all(process.exitcode == 0 for process in run.processes):
        counts["too late"] += 1
    elif draw.random() < 0.3:
        for process in run.processes:
            os.kill(process.pid, signal.SIGTERM)
        run.wait()
        counts["SIGTERM"] += 1
        run.kill()
    else:
        run.kill()
        counts["SIGKILL"] += 1
        begun = (run.folder / "runs").is_dir()
        if draw.random() < 0.3 and begun and len(run.steps_saved()) > 1:
            _cut_off_newest(run)
            counts["checkpoints cut off"] += 1


def _cut_off_newest(run: Run) -> None:
    newest = run.run_folder / "checkpoints" / f"step_{run.steps_saved()[-1]:08d}.ckpt"
    part = max(whole.files_of(newest), key=lambda file: file.stat().st_size)
    os.truncate(part, part.stat().st_size // 2)


def _told(counts: Counter) -> str:
    kinds = ("SIGKILL", "SIGTERM", "checkpoints cut off")
    faults = ", ".join(f"{counts[kind]} {kind}" for kind in kinds)
    return (
        f"{sum(counts[kind] for kind in kinds)} faults survived ({faults}), "
        f"{counts['world-size changes']} world-size changes, {counts['mismatches']} mismatches"
    )


if __name__ == "__main__":
    main()
