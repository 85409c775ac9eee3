"""The loss alone: time and peak memory of forward and backward from hidden states, side by side.

    python benchmarks/loss.py [--small] [--threads 2]        # on a GPU where there is one
    python benchmarks/loss.py --vocab 151936 --tokens 1024 8192 --peaks     # some sizes, no times

From the last hidden states [N, D] of student and teacher and their heads [V, D], fp32, to the
gradients of the student's hidden states and head. Beside ours: TRL's chunked distillation loss
(what its DistillationTrainer calls) and Liger's chunked JSD, at the same divergence. For the time
the sides take turns in one process, and ratios are medians over the rounds; for the peak each runs
once in a process of its own, above the inputs and their gradients. Before the ratios count, values
and gradients of the same divergence must agree, and each of our losses must equal its dense
definition.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks import common
from opd_lightning import (
    ForwardKL,
    HeadTailReverseKL,
    JensenShannon,
    Objective,
    ReverseKL,
    Rollout,
    SampledTokenReverseKL,
    SequenceReverseKL,
    TokenDistribution,
    TopKReverseKL,
)

HIDDEN_SIZE = 896
OURS: dict[str, Callable[[], Objective]] = {
    "ReverseKL": ReverseKL,
    "JensenShannon": JensenShannon,
    "TopKReverseKL": TopKReverseKL,
    "TopKReverseKL, bucket": partial(TopKReverseKL, tail="bucket"),
    "ForwardKL": ForwardKL,
    "HeadTailReverseKL": HeadTailReverseKL,
    "SampledTokenReverseKL": SampledTokenReverseKL,
    "SequenceReverseKL": SequenceReverseKL,
}
THEIRS = {"TRL, beta=1": 1.0, "TRL, beta=0.5": 0.5, "Liger, beta=1": 1.0, "Liger, beta=0.5": 0.5}
# ours, theirs, how many times faster it is to be
TARGETS = [
    ("TopKReverseKL", "TRL, beta=1", 5.0),
    ("ReverseKL", "TRL, beta=1", 2.5),
    ("JensenShannon", "TRL, beta=0.5", 2.5),
    ("ReverseKL", "Liger, beta=1", 1.5),
    ("JensenShannon", "Liger, beta=0.5", 1.5),
]


def inputs(tokens: int, vocab: int) -> dict[str, Tensor]:
    """Return hidden states and heads of student and teacher, and sampled ids; some nats apart."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    hidden, weight = normal(tokens, HIDDEN_SIZE), normal(vocab, HIDDEN_SIZE)
    weight *= 2 / HIDDEN_SIZE**0.5
    made = {
        "hidden": hidden,
        "weight": weight,
        "teacher_hidden": normal(tokens, HIDDEN_SIZE).mul_(0.3).add_(hidden),
        "teacher_weight": normal(vocab, HIDDEN_SIZE).mul_(0.2 / HIDDEN_SIZE**0.5).add_(weight),
        "ids": torch.randint(vocab, (tokens,), generator=g),
    }
    made = {name: tensor.to(common.device()) for name, tensor in made.items()}
    made["hidden"].requires_grad_()
    made["weight"].requires_grad_()
    return made


def mean_loss(side: str, x: dict[str, Tensor], form: str = "chunked") -> Tensor:
    """Return the mean loss a token of `side`, with a gradient."""
    if side in OURS:
        return _ours(OURS[side](), x, form)
    if side.startswith("TRL"):
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        values, _ = ChunkedDivergenceFunction.apply(
            x["hidden"], x["weight"], None, x["teacher_hidden"], x["teacher_weight"], None,
            THEIRS[side],
        )  # fmt: skip
        return values.sum() / len(x["ids"])
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=THEIRS[side], compiled=False
    )
    return loss(x["hidden"], x["weight"], x["teacher_hidden"], x["teacher_weight"], x["ids"])


def _ours(objective: Objective, x: dict[str, Tensor], form: str) -> Tensor:
    tokens = len(x["ids"])
    row = torch.arange(tokens, device=x["ids"].device) // 128  # completions of 128 tokens
    rollout = Rollout.from_flat(x["ids"], row)
    weights = torch.full((tokens,), 1 / tokens, device=x["ids"].device)
    if form == "dense":
        student = TokenDistribution.from_logits(x["hidden"] @ x["weight"].T)
        teacher = TokenDistribution.from_logits(x["teacher_hidden"] @ x["teacher_weight"].T)
    else:
        student = TokenDistribution.from_hidden(x["hidden"], x["weight"])
        teacher = TokenDistribution.from_hidden(x["teacher_hidden"], x["teacher_weight"])
    return objective(student, teacher, rollout, weights).loss


def peak_case(side: str, tokens: int, vocab: int, threads: int) -> dict[str, float]:
    """Run forward and backward once and return the peak in bytes, and what has to agree."""
    torch.set_num_threads(threads)
    few = inputs(8, 640)
    mean_loss(side, few).backward()  # loads what is loaded once
    x = inputs(tokens, vocab)
    loss = torch.zeros(())

    def work() -> None:
        nonlocal loss
        loss = mean_loss(side, x)
        loss.backward()

    peak = common.measure(work, device=common.device())["peak_bytes"]
    gradients = [x["hidden"].grad, x["weight"].grad]
    return {
        "peak_bytes": max(0, peak - sum(g.nbytes for g in gradients)),
        "loss": loss.item(),
        "hidden_norm": gradients[0].norm().item(),
        "weight_norm": gradients[1].norm().item(),
    }


def time_case(
    sides: list[str], tokens: int, vocab: int, threads: int, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each side's forward and backward, round by round."""
    torch.set_num_threads(threads)
    x = inputs(tokens, vocab)

    def timed(side: str) -> dict[str, float]:
        x["hidden"].grad = x["weight"].grad = None
        return common.measure(lambda: mean_loss(side, x).backward(), device=common.device())

    for side in sides:
        mean_loss(side, inputs(8, 640)).backward()
    found = common.interleave({side: partial(timed, side) for side in sides}, rounds)
    return {side: [r["seconds"] for r in results] for side, results in found.items()}


def check_against_dense(threads: int) -> float:
    """Return the largest relative difference between our losses and their dense definitions.

    Raises:
        BenchmarkError: If it is above 1e-5.
    """
    torch.set_num_threads(threads)
    worst = 0.0
    for side in OURS:
        found = {}
        for form in ("dense", "chunked"):
            x = inputs(48, 8000)
            loss = mean_loss(side, x, form)
            loss.backward()
            found[form] = [loss.detach(), x["hidden"].grad, x["weight"].grad]
        for a, b in zip(*found.values(), strict=True):
            worst = max(worst, float((a - b).norm() / a.norm()))
    if not worst < 1e-5:
        raise common.BenchmarkError(f"a chunked loss differs from its definition by {worst:.2g}")
    return worst


def check_pairs(results: dict[str, dict[str, float]]) -> float:
    """Return the largest relative difference between sides of one divergence.

    Raises:
        BenchmarkError: If it is above 1e-3 (of fp32 sums over the vocabulary in other orders).
    """
    worst = 0.0
    for ours, theirs, _ in TARGETS:
        if ours == "TopKReverseKL":
            continue
        for key in ("loss", "hidden_norm", "weight_norm"):
            a, b = results[ours][key], results[theirs][key]
            worst = max(worst, abs(a - b) / abs(b))
    if not worst < 1e-3:
        raise common.BenchmarkError(f"two sides of one divergence differ by {worst:.2g}")
    return worst


def run(
    small: bool,
    threads: int = 2,
    vocabularies: list[int] | None = None,
    numbers: list[int] | None = None,
) -> dict[str, Any]:
    """Return seconds and peaks of the sides at every size, and the ratios."""
    vocabularies = vocabularies or ([32_000] if small else [32_000, 151_936])
    numbers = numbers or ([1024] if small else [1024, 4096, 8192])
    compared = list(dict.fromkeys(side for ours, theirs, _ in TARGETS for side in (ours, theirs)))
    sides = compared if small else [*OURS, *THEIRS]
    differences, sizes = [check_against_dense(threads)], []
    for vocab in vocabularies:
        for tokens in numbers:
            size = {"tokens": tokens, "vocab": vocab, "threads": threads}
            peaks = {side: common.run_case(peak_case, side=side, **size) for side in sides}
            differences.append(check_pairs(peaks))
            rounds = 3 if tokens * vocab < 5e7 else 1
            seconds = common.run_case(
                time_case, exact_memory=False, sides=sides, rounds=rounds, **size
            )
            sizes.append(_summary(vocab, tokens, seconds, peaks))
    return common.settings(
        {
            "threads": threads,
            "hidden_size": HIDDEN_SIZE,
            "largest_difference": max(differences),
            "sizes": sizes,
        }
    )


def peak_table(vocabularies: list[int], numbers: list[int], threads: int) -> str:
    """Return the peaks of our losses as Markdown: one row a loss, one column a size."""
    columns = [(vocab, tokens) for vocab in vocabularies for tokens in numbers]
    rows = []
    for side in OURS:
        found = [
            common.run_case(peak_case, side=side, tokens=tokens, vocab=vocab, threads=threads)
            for vocab, tokens in columns
        ]
        rows.append([side, *(f"{common.mib(case['peak_bytes']):.0f}" for case in found)])
        print(*rows[-1], file=sys.stderr, flush=True)
    return common.markdown(["peak, MiB", *(f"V={v}, N={n}" for v, n in columns)], rows)


def _summary(
    vocab: int, tokens: int, seconds: dict[str, list[float]], peaks: dict[str, dict[str, float]]
) -> dict[str, Any]:
    return {
        "vocab": vocab,
        "tokens": tokens,
        "seconds": {side: median(values) for side, values in seconds.items()},
        "peak_mib": {side: common.mib(found["peak_bytes"]) for side, found in peaks.items()},
        "ratios": [
            {
                "ours": ours,
                "theirs": theirs,
                "faster": common.ratio(seconds[theirs], seconds[ours]),
                "target": target,
            }
            for ours, theirs, target in TARGETS
        ],
    }


def table(result: dict[str, Any]) -> str:
    """Return the ratios, then seconds and peaks, as Markdown."""
    sizes = result["sizes"]
    names = [f"V={s['vocab']}, N={s['tokens']}" for s in sizes]
    ratios = [
        [f"{r['ours']} / {r['theirs']}", *(s["ratios"][i]["faster"] for s in sizes), r["target"]]
        for i, r in enumerate(sizes[0]["ratios"])
    ]
    rows = [
        [side, *(f"{s['seconds'][side]:.2f} s, {s['peak_mib'][side]:.0f} MiB" for s in sizes)]
        for side in sizes[0]["seconds"]
    ]
    return "\n\n".join(
        [
            "How many times faster, forward and backward:",
            common.markdown(["ours / theirs", *names, "target"], ratios),
            "Time and peak memory above the inputs and their gradients:",
            common.markdown(["loss", *names], rows),
            f"Largest relative difference between sides that must agree: "
            f"{result['largest_difference']:.1e}.",
        ]
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="one size, about three minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab", type=int, nargs="+", help="sizes of the vocabulary")
    parser.add_argument("--tokens", type=int, nargs="+", help="numbers of tokens")
    parser.add_argument("--peaks", action="store_true", help="the peaks of our losses, no times")
    given = parser.parse_args()
    if given.peaks:
        vocabularies, numbers = given.vocab or [32_000, 151_936], given.tokens or [1024, 8192]
        print(peak_table(vocabularies, numbers, given.threads))
    else:
        print(table(run(given.small, given.threads, given.vocab, given.tokens)))


if __name__ == "__main__":
    main()
