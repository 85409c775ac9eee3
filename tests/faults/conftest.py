"""Runs of `opd fit` in processes of their own, to which something happens."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opd_lightning.callbacks.whole import WRITING, check_whole
from opd_lightning.cli import main
from tests.cli.conftest import ROOT, world  # noqa: F401  a fixture

SECONDS = 60
"""Within which a run has to end once something has happened."""


class Run:
    """`opd fit` in a session of its own, as a terminal's foreground job.

    Args:
        args: Behind `opd fit`.
        output: File for what it prints.
    """

    def __init__(self, args: list[str], output: Path) -> None:
        self.output = output
        self.process = subprocess.Popen(
            [sys.executable, "-m", "opd_lightning.cli", "fit", *args],
            stdout=output.open("w"),
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )

    @property
    def said(self) -> str:
        return self.output.read_text()

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.05)

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(number) for number in path.read_text().split()]

    def send_to_all(self, number: signal.Signals) -> None:
        """As a terminal does for Ctrl-C."""
        os.killpg(self.process.pid, number)

    def end(self, seconds: float = SECONDS) -> int:
        """Wait for all processes of the run and return the first one's exit code."""
        stop = time.monotonic() + seconds
        code = self.process.wait(seconds)
        while self.is_alive():
            assert time.monotonic() < stop, f"a rank still runs. {self.said}"
            time.sleep(0.05)
        return code

    def is_alive(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Return f(arguments) -> a started Run; what still runs at the end is killed."""
    runs: list[Run] = []

    def run(*args: str) -> Run:
        runs.append(Run(list(args), tmp_path / f"said_{len(runs)}.txt"))
        return runs[-1]

    yield run
    for one in runs:
        if one.is_alive():
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()


def failed(capsys: pytest.CaptureFixture, *args: str) -> tuple[int, str]:
    """Run `opd` in this process; return its exit code and its one message."""
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    said = capsys.readouterr().err
    (message,) = [line for line in said.splitlines() if line.startswith("opd: ")]
    return exit_.value.code, message


def whole_checkpoints(folder: Path) -> list[int]:
    """The steps of the checkpoints below `folder`, each checked; nothing half-written is there."""
    assert not [path for path in folder.rglob("*") if path.name.startswith(WRITING)]
    paths = [p for p in folder.rglob("step_*.ckpt") if not p.is_symlink()]
    return sorted(check_whole(path)["step"] for path in paths)
