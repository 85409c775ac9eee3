"""A whole training step beside TRL's `DistillationTrainer`, interleaved, whole and by part.

    python benchmarks/step.py [--small]        # on a GPU where there is one

Each side trains in a process of its own that waits before every step; the steps are called in turn.
Both have the same student and teacher (random Llamas), prompts, optimiser, threads and fp32, both
generate with transformers, and completions have the same lengths on both sides, ended by EOS
(`ForcedLengths`). Before anything is timed, both must give the same loss on the same rollout.

Parts: rollout; teacher: the forward of its decoder; student and loss: the student's forward, both
output heads, the loss and the backward pass; optimiser: clipping and step; other: the rest of the
time from one step to the next, with loops, logging and data.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common
from benchmarks.step_shared import SPREADS, completion_lengths, prompts, save_models
from benchmarks.step_sides import OURS, PARTS, TRL, losses

TARGETS = {"TopKReverseKL(k=32)": 2.5, "ReverseKL": 1.8}
TOLERANCE = 1e-5

SMALL = {
    "rows": 8,
    "longest": 64,
    "vocab_size": 32_000,
    "student": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8},
    "teacher": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 11},
    "learning_rate": 1e-5,
    # rows x padded length of a micro-batch of ours, by how the lengths are spread
    "micro_batch_tokens": {"uneven": 256, "equal": None},
    "variants": list(TARGETS),
    "warm_up": 1,
    "rounds": 3,
}
FULL = SMALL | {
    "rows": 16,
    "longest": 128,
    "micro_batch_tokens": {"uneven": 512, "equal": None},
    "variants": list(OURS),
    "rounds": 5,
}


# ---------------------------------------------------------------------------------------- the runs


def run(small: bool = False) -> dict[str, Any]:
    """Check the losses, then time the steps, with uneven and with equal lengths.

    Raises:
        BenchmarkError: If the losses differ, a side fails, or its completions have other lengths.
    """
    return measure(SMALL if small else FULL)


def measure(sizes: dict[str, Any]) -> dict[str, Any]:
    """As `run`, with other sizes."""
    result: dict[str, Any] = {"sizes": sizes, "targets": TARGETS, "cases": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result["parameters"] = save_models(folder, sizes)
        rounds = sizes["warm_up"] + sizes["rounds"] + 1
        with (folder / "prompts.jsonl").open("w") as lines:
            for ids in prompts(sizes["rows"], sizes["vocab_size"], rounds):
                prompt = " ".join(f"t{i}" for i in ids)
                print(json.dumps({"prompt": prompt}), file=lines)
        result["check"] = common.run_case(losses, folder=str(folder), sizes=sizes)
        for spread, check in result["check"].items():
            _check_equal(check, spread)
        for spread in SPREADS:
            result["cases"][spread] = _interleaved(spread, folder, sizes)
    return common.settings(result)


def _check_equal(check: dict[str, float], spread: str) -> None:
    for name in ("loss", "grad_norm"):
        if not check[f"{name}_relative_difference"] <= TOLERANCE:
            raise common.BenchmarkError(
                f"{name} on the same rollout ({spread} lengths): ours {check[f'{name}_ours']}, "
                f"TRL's {check[f'{name}_trl']}; they may differ by {TOLERANCE} relative. "
                "Times of different computations are no comparison."
            )


def _interleaved(spread: str, folder: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    sides: list[Side] = []
    try:
        for name in [TRL, *sizes["variants"]]:
            sides.append(Side(name, spread, folder, sizes))
        for side in sides:
            side.wait_until_ready()
        for side in sides:
            for _ in range(sizes["warm_up"]):
                side.step()
        found = common.interleave({side.name: side.step for side in sides}, sizes["rounds"])
    finally:
        for side in sides:
            side.stop()
    baselines = {side.name: side.baseline_bytes for side in sides}
    return _summary(found, baselines)


class Side:
    """The benchmark's end of a training process."""

    def __init__(self, name: str, spread: str, folder: Path, sizes: dict[str, Any]) -> None:
        self.name = name
        self._log = (folder / f"{len(list(folder.glob('*.log')))}.log").open("w+")
        given = {"name": name, "spread": spread, "folder": str(folder), "sizes": sizes}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step_sides", json.dumps(given)],
            cwd=common.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.baseline_bytes = 0
        self._expected = sorted(completion_lengths(spread, sizes["rows"], sizes["longest"]))

    def wait_until_ready(self) -> None:
        """Hear what memory it takes before it loads anything."""
        self.baseline_bytes = self._hear()["baseline_bytes"]

    def step(self) -> dict[str, Any]:
        """Let it do one step and return what it reports."""
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        report = self._hear()
        if report["lengths"] != self._expected:
            raise common.BenchmarkError(
                f"{self.name}: completions of {report['lengths']} tokens, where both sides should "
                f"have {self._expected}. Does its engine go past the model's decoder or head?"
            )
        return report

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _hear(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise common.BenchmarkError(
                f"{self.name} ended with code {self._process.returncode}:\n"
                f"{self._log.read()[-3000:]}"
            )
        return json.loads(line)


# --------------------------------------------------------------------------------------- the result


def _summary(found: dict[str, list[dict[str, Any]]], baselines: dict[str, int]) -> dict[str, Any]:
    """Return seconds, parts and memory of each side, and TRL's over ours."""
    cases = {}
    for name, steps in found.items():
        seconds = [step["seconds"] for step in steps]
        peak = max(step["highest_bytes"] for step in steps) - baselines[name]
        parts = {part: median(step["parts"].get(part, 0.0) for step in steps) for part in PARTS}
        cases[name] = {
            "seconds": median(seconds),
            "seconds_of_steps": seconds,
            "parts": parts,
            "peak_bytes": peak,
            "lengths": steps[0]["lengths"],
        }
    theirs = cases[TRL]
    for case in cases.values():
        case["time_ratio"] = common.ratio(theirs["seconds_of_steps"], case["seconds_of_steps"])
        case["memory_ratio"] = theirs["peak_bytes"] / case["peak_bytes"]
    return cases


def table(result: dict[str, Any]) -> str:
    """Return the checks and one table for each spread of lengths, as Markdown."""
    sizes, blocks = result["sizes"], []
    # fp32: both models; of the student also the gradient and AdamW's two averages
    fixed = 4 * (4 * result["parameters"]["student"] + result["parameters"]["teacher"])
    for spread, cases in result["cases"].items():
        check = result["check"][spread]
        lengths = cases[TRL]["lengths"]
        rows = []
        for name, case in cases.items():
            target = result["targets"].get(name)
            rows.append(
                [
                    name,
                    case["seconds"],
                    f"{case['time_ratio']:.2f}×" + (f" (target {target}×)" if target else ""),
                    *(case["parts"][part] for part in PARTS),
                    f"{common.mib(case['peak_bytes']):.0f}",
                    f"{case['memory_ratio']:.2f}×",
                    f"{common.mib(case['peak_bytes'] - fixed):.0f}",
                ]
            )
        header = ["", "step, s", "TRL / it", *(f"{p}, s" for p in PARTS), "peak, MiB", "TRL / it"]
        header.append("beyond weights, gradients and AdamW, MiB")
        blocks.append(
            f"{spread.capitalize()} lengths: {sizes['rows']} rows, {lengths[0]} to {lengths[-1]} "
            f"tokens, median {median(lengths):.0f}, median of {sizes['rounds']} steps. Loss on the "
            f"same rollout: ours {check['loss_ours']:.7f}, TRL's {check['loss_trl']:.7f} (relative "
            f"difference {check['loss_relative_difference']:.0e}; of the gradient's norm "
            f"{check['grad_norm_relative_difference']:.0e}).\n\n{common.markdown(header, rows)}"
        )
    return "\n\n".join(blocks)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path, help="write the result here too")
    given = parser.parse_args()
    started = time.perf_counter()
    result = run(given.small)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))
    print(table(result))
    print(f"\n{time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
