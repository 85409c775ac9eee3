"""Jobs of several processes that run side by side."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_together(job: str, parts: list[tuple[Path, int, int]], timeout: float = 600) -> None:
    """Run `python -m job FOLDER RANK W PORT` for each part (folder, rank, W), all at once.

    What they say goes to a file of their folder; its end is shown if one of them fails.
    """
    port = str(free_port())
    running, places = [], []
    for folder, rank, processes in parts:
        places.append(folder / f"said_{rank}_of_{processes}.txt")
        command = [sys.executable, "-m", job, str(folder), str(rank), str(processes), port]
        with places[-1].open("w") as said:
            running.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                    stdout=said,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [process.wait(timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0] * len(codes), "\n".join(place.read_text()[-3000:] for place in places)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
