"""One rank of two that dies ends the other, soon, and its own error is there to be read."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import SECONDS, Run, whole_checkpoints
from tests.faults.test_signals import FAULTY, SAVING, STRATEGIES

Start = Callable[..., Run]


@pytest.mark.parametrize(
    ("fault", "rank", "strategy", "words"),
    [
        ("raise", 1, "fsdp2", ["opd: Faulty failed on 2 prompts", "the sampler has broken down"]),
        (
            "kill",
            1,
            "ddp",
            ["another rank ended while this one waited", "opd: rank 1 was killed (SIGKILL)"],
        ),
        # the other is in no collective that could fail
        ("kill", 0, "ddp", ["the first rank has ended; this one ends too"]),
    ],
)
def test_one_rank_dies(
    world: Path, tmp_path: Path, start: Start, fault: str, rank: int, strategy: str, words: list
):
    run = start(
        "--config", str(world / "run.yaml"), "--trainer.default_root_dir", str(tmp_path / "run"),
        *STRATEGIES[strategy], "--trainer.devices", "2", "--trainer.accelerator", "cpu",
        "--data.val", "null",
        "--trainer.callbacks", SAVING,
        *FAULTY, fault, "--rollout.engine.step", "2", "--rollout.engine.rank", str(rank),
        "--rollout.engine.others_wait", str(rank == 0), "--rollout.engine.folder", str(tmp_path),
    )  # fmt: skip
    run.until(lambda: bool(list(tmp_path.rglob("step_00000002.ckpt.json"))))
    started = time.monotonic()
    assert run.end() != 0
    assert time.monotonic() - started < SECONDS
    for word in words:
        assert word in run.said
    assert whole_checkpoints(tmp_path / "run") == [1, 2]
