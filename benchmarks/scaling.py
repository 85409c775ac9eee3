"""How time and memory grow as one size doubles and the others stay.

    python benchmarks/scaling.py [--small] [--figure scaling.png]

Loss: forward and backward of an objective on given hidden states, over tokens N, vocabulary V and
support size K. Update: teacher, student, loss and backward pass over sequence length L, rows and
depth of both models; rollout: the generation of the same rows. Each axis has a process of its own;
its points are measured in turn. An exponent is the slope of a straight line through the logarithms:
1 is linear, 0 is constant.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import common
from opd_lightning import (
    CausalPolicy,
    Objective,
    PromptBatch,
    ReverseKL,
    Rollout,
    SamplingConfig,
    TokenDistribution,
    TopKReverseKL,
    TransformersEngine,
)

Work = Callable[[], Any]
AXES = {
    "tokens": "tokens N",
    "vocab_size": "vocabulary V",
    "k": "support K",
    "length": "sequence length L",
    "rows": "rows",
    "depth": "decoder layers",
}
_LOSS_AXES = ("tokens", "vocab_size", "k")
# Attention is quadratic in L, and so is reading the cache at every decode step; all else is linear
_LIMITS = {"length": 2.0}
# what a fit over few points may be off by
_TIME_SLACK, _MEMORY_SLACK = 0.2, 0.1
# below this a peak is the allocator's pages and small tensors
_LEAST_PEAK = 4 * common.MIB
_PROMPT_LENGTH = 8

SMALL = {
    "loss": {"tokens": 512, "vocab_size": 4096, "k": 32, "hidden_size": 256},
    "step": {"length": 64, "rows": 8, "depth": 2, "hidden_size": 128, "vocab_size": 2048},
    "points": {
        "tokens": [256, 512, 1024, 2048],
        "vocab_size": [2048, 4096, 8192, 16384],
        "k": [16, 32, 64, 128],
        "length": [32, 64, 128, 256],
        "rows": [4, 8, 16, 32],
        "depth": [2, 4, 8],
    },
    "repeats": 5,
}
FULL = {
    "loss": {"tokens": 2048, "vocab_size": 32768, "k": 32, "hidden_size": 896},
    "step": {"length": 256, "rows": 8, "depth": 4, "hidden_size": 512, "vocab_size": 32000},
    "points": {
        "tokens": [1024, 2048, 4096, 8192],
        "vocab_size": [16384, 32768, 65536, 131072],
        "k": [16, 32, 64, 128],
        "length": [128, 256, 512, 1024, 2048],
        "rows": [4, 8, 16, 32],
        "depth": [4, 8, 16, 32],
    },
    "repeats": 5,
}


# ------------------------------------------------------------------------------------ what is timed


def loss_work(
    objective: Objective, tokens: int, vocab_size: int, hidden_size: int, device: torch.device
) -> Work:
    """Return the forward and backward pass of `objective` on random hidden states."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    student, teacher = normal(tokens, hidden_size), normal(tokens, hidden_size)
    heads = [normal(vocab_size, hidden_size) / math.sqrt(hidden_size) for _ in range(2)]
    ids = torch.randint(vocab_size, (tokens,), generator=generator).to(device)
    rollout = Rollout.from_flat(ids, torch.arange(tokens, device=device) // 128)
    weights = torch.full((tokens,), 1.0 / tokens, device=device)
    leaves = [student.requires_grad_(), heads[0].requires_grad_()]

    def work() -> None:
        for leaf in leaves:
            if leaf.grad is not None:
                leaf.grad.zero_()
        output = objective(
            TokenDistribution.from_hidden(student, heads[0]),
            TokenDistribution.from_hidden(teacher, heads[1]),
            rollout,
            weights,
        )
        output.loss.backward()

    return work


def step_works(
    length: int, rows: int, depth: int, hidden_size: int, vocab_size: int, device: torch.device
) -> dict[str, Work]:
    """Return the rollout of `rows` sequences of `length` tokens, and an update on them."""
    policies = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=depth,
            num_attention_heads=hidden_size // 64,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            # nothing ends a completion but the limit
            eos_token_id=None,
        )
        policies.append(CausalPolicy(LlamaForCausalLM(config)).to(device))
    student, teacher = policies
    teacher.requires_grad_(False)
    objective = TopKReverseKL(k=32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (rows, length), generator=generator).tolist()
    prompts = PromptBatch.from_token_ids([row[:_PROMPT_LENGTH] for row in ids]).to(device)
    answers = [row[_PROMPT_LENGTH:] for row in ids]
    rollout = Rollout.from_completions(prompts, answers, truncated=[True] * rows)
    weights = torch.full((rollout.num_tokens,), 1.0 / rollout.num_tokens, device=device)
    sampling = SamplingConfig(max_completion_length=length - _PROMPT_LENGTH)

    def update() -> None:
        # kept, so that they are in the baseline of the memory
        student.zero_grad(set_to_none=False)
        output = teacher.read(
            rollout,
            lambda q: student.read(rollout, lambda p: objective(p, q, rollout, weights)),
        )
        output.loss.backward()

    def generate() -> None:
        TransformersEngine().generate(student, prompts, sampling, seed=0)

    return {"update": update, "rollout": generate}


def peaks(name: str, sizes: dict[str, Any]) -> dict[str, list[int]]:
    """Return peak bytes above inputs and gradients at each point of one axis, by measure."""
    device = common.device()
    found: dict[str, list[int]] = {}
    for works in _works(name, sizes):
        for what, work in works.items():
            # the first run makes what stays: gradients, and what libraries set up once
            work()
            peak = common.measure(work, device=device)["peak_bytes"]
            found.setdefault(what, []).append(peak)
    return found


def seconds(name: str, sizes: dict[str, Any]) -> dict[str, list[float]]:
    """Return the seconds at each point of one axis, by what is measured, the points in turn."""
    device = common.device()
    works = list(_works(name, sizes))
    found = {}
    for what in works[0]:
        cases = {
            str(i): partial(common.measure, work[what], device=device)
            for i, work in enumerate(works)
        }
        for case in cases.values():
            case()
        timed = common.interleave(cases, sizes["repeats"])
        # what the machine does besides only ever adds
        found[what] = [min(run["seconds"] for run in timed[case]) for case in cases]
    return found


def _works(name: str, sizes: dict[str, Any]) -> Iterator[dict[str, Work]]:
    """Yield what is measured at each point of one axis, by name."""
    for point in sizes["points"][name]:
        if name in _LOSS_AXES:
            yield _loss_works(name, point, sizes["loss"], common.device())
        else:
            yield step_works(**(sizes["step"] | {name: point}), device=common.device())


def _loss_works(
    name: str, point: int, base: dict[str, int], device: torch.device
) -> dict[str, Work]:
    given = base | {name: point}
    k = given.pop("k")
    label = "TopKReverseKL" if name == "k" else f"TopKReverseKL(k={k})"
    objectives: dict[str, Objective] = {label: TopKReverseKL(k=k)}
    if name != "k":
        objectives["ReverseKL"] = ReverseKL()
    return {
        what: loss_work(objective, **given, device=device) for what, objective in objectives.items()
    }


# ----------------------------------------------------------------------------------------- the runs


def run(small: bool = False) -> dict[str, Any]:
    """Measure all axes.

    Raises:
        BenchmarkError: If memory grows faster than it may.
    """
    return measure(SMALL if small else FULL)


def measure(sizes: dict[str, Any]) -> dict[str, Any]:
    """As `run`, with other sizes."""
    axes: dict[str, Any] = {}
    for name, points in sizes["points"].items():
        bytes_of = common.run_case(peaks, name=name, sizes=sizes)
        seconds_of = common.run_case(seconds, exact_memory=False, name=name, sizes=sizes)
        axes[name] = {
            what: {
                "points": points,
                "seconds": taken,
                "peak_bytes": bytes_of[what],
                "time_exponent": exponent(points, taken),
                "memory_exponent": exponent(points, [max(p, _LEAST_PEAK) for p in bytes_of[what]]),
                "limit": _LIMITS.get(name, 1.0),
            }
            for what, taken in seconds_of.items()
        }
    result = common.settings({"sizes": sizes, "axes": axes})
    if faster := _above(result, "memory_exponent", _MEMORY_SLACK):
        raise common.BenchmarkError(
            f"memory grows faster than it may: {'; '.join(faster)}. Which tensor has both sizes?"
        )
    result["time_above_limit"] = _above(result, "time_exponent", _TIME_SLACK)
    return result


def exponent(sizes: list[int], values: list[float]) -> float:
    """Return the slope of the least-squares line of log value on log size."""
    x = [math.log(size) for size in sizes]
    y = [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def _above(result: dict[str, Any], which: str, slack: float) -> list[str]:
    return [
        f"{what} over {AXES[name]}: exponent {one[which]:.2f}, limit {one['limit']:.0f}"
        for name, measured in result["axes"].items()
        for what, one in measured.items()
        if one[which] > one["limit"] + slack
    ]


def table(result: dict[str, Any]) -> str:
    """Return the table of exponents as Markdown."""
    rows = []
    for name, measured in result["axes"].items():
        for what, one in measured.items():
            points = one["points"]
            rows.append(
                [
                    what,
                    f"{AXES[name]}, {points[0]} to {points[-1]}",
                    f"{one['time_exponent']:.2f}",
                    f"{one['memory_exponent']:.2f}",
                    f"{one['limit']:.0f}",
                    f"{one['seconds'][0]:.3g} → {one['seconds'][-1]:.3g}",
                    " → ".join(f"{common.mib(one['peak_bytes'][i]):.0f}" for i in (0, -1)),
                ]
            )
    header = [
        "",
        "doubles",
        "time",
        "memory",
        "at most",
        "seconds",
        "peak above inputs and gradients, MiB",
    ]
    flagged = result["time_above_limit"]
    verdict = (
        f"**Time grows faster than it should: {'; '.join(flagged)}.**"
        if flagged
        else "Nothing grows faster than linearly, except with L, where attention is quadratic."
    )
    loss, step = result["sizes"]["loss"], result["sizes"]["step"]
    base = (
        f"Base: N = {loss['tokens']}, V = {loss['vocab_size']}, K = {loss['k']}, D = "
        f"{loss['hidden_size']} for the loss; {step['rows']} rows of L = {step['length']}, "
        f"{step['depth']} layers, D = {step['hidden_size']}, V = {step['vocab_size']} for update "
        "and rollout."
    )
    return f"{base}\n\n{common.markdown(header, rows)}\n\n{verdict}"


def figure(result: dict[str, Any], path: Path) -> None:
    """Draw time and memory over each axis, as multiples of the first point, to a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # pages and sums that the table shows stay away from the picture of the slopes
    plots, panels = plt.subplots(2, len(AXES), figsize=(16, 6), sharex="col", squeeze=False)
    for column, (name, measured) in enumerate(result["axes"].items()):
        for row, key in enumerate(("seconds", "peak_bytes")):
            panel = panels[row][column]
            for what, one in measured.items():
                values = one[key] if row == 0 else [common.mib(v) for v in one[key]]
                panel.plot(one["points"], values, marker="o", label=what)
                low = min(values) if what == next(iter(measured)) else None
                if low:
                    linear = [low * p / one["points"][0] for p in one["points"]]
                    panel.plot(one["points"], linear, "--", color="0.6", label="linear")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.grid(alpha=0.3)
            panel.xaxis.set_major_formatter("{x:.0f}")
            panel.yaxis.set_major_formatter("{x:.3g}")
        panels[0][column].set_title(AXES[name])
        panels[0][column].legend(fontsize=7)
    panels[0][0].set_ylabel("seconds")
    panels[1][0].set_ylabel("peak above inputs and gradients, MiB")
    plots.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    # no date or version in the file: the same numbers give the same bytes
    plots.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(plots)


def main() -> None:
    """Print the table; the exit code is 1 where something grows too fast."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--figure", type=Path, help="draw it to this file too")
    given = parser.parse_args()
    result = run(given.small)
    print(table(result))
    if given.figure:
        figure(result, given.figure)
    sys.exit(1 if result["time_above_limit"] else 0)


if __name__ == "__main__":
    main()
