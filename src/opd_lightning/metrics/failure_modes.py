"""The failure modes of on-policy distillation as numbers (arXiv 2603.25562, sections 4 and 5).

A = log q(y) - log pi(y) is a sampled token's advantage; nats, q the teacher, pi the student.
"""

import math

import torch
from torch import Tensor

from opd_lightning.metrics.tokens import TokenTable

# A token is as good as certain for the student (above) and as good as impossible for the teacher.
SURE, IMPOSSIBLE = -1.0, -10.0
# Sampled, and yet below 1e-4 for the student: only without top-p.
UNLIKELY = math.log(1e-4)
# Loops of fewer tokens are usual: lists, dashes, code.
LOOP_TOKENS = 64


def imbalance(table: TokenTable) -> dict[str, float]:
    """Return how unevenly the signal is spread: few tokens carry it, most are negative."""
    advantage = table.advantage.double()
    size = advantage.abs()
    total = size.sum().clamp(min=1e-12)
    ordered = size.sort(descending=True).values.cumsum(0)

    def share_of(fraction: float) -> float:
        return float(ordered[max(1, round(fraction * len(ordered))) - 1] / total)

    by_id = _sums_by_id(table["token_id"], size)[1].sort(descending=True).values
    low, q01, median, q99, high = _quantiles(advantage, [0.0, 0.01, 0.5, 0.99, 1.0])
    return {
        "imbalance/negative_frac": float((advantage < 0).double().mean()),
        "imbalance/positive_frac": float((advantage > 0).double().mean()),
        "imbalance/positive_part": float(advantage.clamp(min=0).sum() / total),
        "imbalance/share_of_top_1pct": share_of(0.01),
        "imbalance/share_of_top_10pct": share_of(0.1),
        "imbalance/share_of_top_10_ids": float(
            by_id.topk(min(10, len(by_id))).values.sum() / total
        ),
        "imbalance/advantage_mean": float(advantage.mean()),
        "imbalance/advantage_min": low,
        "imbalance/advantage_q01": q01,
        "imbalance/advantage_median": median,
        "imbalance/advantage_q99": q99,
        "imbalance/advantage_max": high,
    }


def unreliable_teacher(table: TokenTable) -> dict[str, float]:
    """Return how far the student's text is from what the teacher knows."""
    advantage, repeated = table.advantage, table["repeated"] > 0
    entropies = table["student_entropy"], table["teacher_entropy"]
    values = {
        "support/overlap": table["overlap"],
        "support/overlap_student_mass": table["overlap_student_mass"],
        "support/overlap_teacher_mass": table["overlap_teacher_mass"],
        "support/student_mass": table["student_support_mass"],
        "support/teacher_mass": table["teacher_support_mass"],
        "support/miss_rate": 1 - table["in_support"],
        "teacher_reliability/entropy_gap": entropies[0] - entropies[1],
        "teacher_reliability/logprob": table["teacher_logprob"],
        "teacher_reliability/unlikely_samples": table["student_logprob"] < UNLIKELY,
        "repetition/tokens": repeated,
        "repetition/advantage_inside": advantage[repeated],
        "repetition/advantage_outside": advantage[~repeated],
        "repetition/ngrams": table.row("repeated_ngrams"),
        "repetition/longest_loop": table.row("longest_loop").max()[None],
        "repetition/loop_rows": table.row("longest_loop") >= LOOP_TOKENS,
        "truncation/rows": table.row("truncated"),
        "truncation/mean_length": table.row("length"),
    }
    means = {key: float(value.double().mean()) for key, value in values.items() if len(value)}
    return {key: mean for key, mean in means.items() if mean == mean}


def token_mismatch(table: TokenTable, watched: dict[int, str]) -> dict[str, float]:
    """Return signs that the two models spell something differently.

    Args:
        table: Of one update.
        watched: Ids to look at one by one (special tokens), with their strings.
    """
    ids, advantage = table["token_id"], table.advantage
    total = advantage.abs().sum().clamp(min=1e-12)
    mismatched = _mismatched(table)
    is_watched = torch.isin(ids, torch.tensor(list(watched), dtype=torch.long))
    values = {
        "mismatch/extreme_frac": float((advantage < IMPOSSIBLE).double().mean()),
        "mismatch/watched_share": float(advantage.abs()[is_watched].sum() / total),
        "mismatch/masked_frac": table.masked_fraction,
    }
    for token_id, string in watched.items():
        found = ids == token_id
        if bool(found.any()):
            values[f"mismatch/ratio/{string}"] = float(mismatched[found].double().mean())
            values[f"mismatch/advantage/{string}"] = float(advantage[found].double().mean())
    return values


def engine_mismatch(table: TokenTable, truncated_sampling: bool) -> dict[str, float]:
    """Return how far the engine's probabilities of the samples are from the student's.

    With top-p or top-k the engine's are renormalised on the tokens that it kept: their log ratio to
    the student's is then the student's mass on those, log pi(nucleus), as a mean.
    """
    sampling, student = table["sampling_logprob"].double(), table["student_logprob"].double()
    if not len(sampling) or bool(sampling.isnan().any()):
        return {}
    if truncated_sampling:
        return {"rollout/log_nucleus_mass": float((student - sampling).mean())}
    difference = (sampling.exp() - student.exp()).abs()
    return {
        "rollout/probs_diff_max": float(difference.max()),
        "rollout/probs_diff_mean": float(difference.mean()),
        "rollout/probs_diff_std": float(difference.std(correction=0)),
    }


def by_position(table: TokenTable, width: int) -> list[dict[str, float]]:
    """Return measures of each bucket of `width` positions that holds a token."""
    position, buckets = table["position"], []
    columns = {
        "advantage": table.advantage,
        "teacher_logprob": table["teacher_logprob"],
        "teacher_entropy": table["teacher_entropy"],
        "student_entropy": table["student_entropy"],
        "overlap": table["overlap"],
        "student_support_mass": table["student_support_mass"],
    }
    for bucket in (position // width).unique().tolist():
        inside = position // width == bucket
        found: dict[str, float] = {"first": bucket * width, "tokens": int(inside.sum())}
        for name, values in columns.items():
            found[name] = float(values[inside].double().mean())
        quantiles = _quantiles(columns["advantage"][inside].double(), [0.01, 0.1, 0.5, 0.9, 0.99])
        names = ["q01", "q10", "q50", "q90", "q99"]
        found |= {f"advantage_{n}": q for n, q in zip(names, quantiles, strict=True)}
        buckets.append(found)
    return buckets


def offending_tokens(table: TokenTable, number: int = 10) -> list[dict[str, float]]:
    """Return the ids that carry most of sum |A|: id, count, their share, mean A and log-probs."""
    ids, advantage = table["token_id"], table.advantage.double()
    kinds, sums, counts = _sums_by_id(ids, advantage.abs())
    mismatched = _mismatched(table)
    order = sums.argsort(descending=True)[:number]
    total = sums.sum().clamp(min=1e-12)
    offending = []
    for i in order.tolist():
        found = ids == kinds[i]
        offending.append(
            {
                "token_id": int(kinds[i]),
                "count": int(counts[i]),
                "share": float(sums[i] / total),
                "advantage": float(advantage[found].mean()),
                "student_logprob": float(table["student_logprob"][found].double().mean()),
                "teacher_logprob": float(table["teacher_logprob"][found].double().mean()),
                "mismatched": int(mismatched[found].sum()),
            }
        )
    return offending


def _mismatched(table: TokenTable) -> Tensor:
    return (table["student_logprob"] > SURE) & (table["teacher_logprob"] < IMPOSSIBLE)


def _sums_by_id(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kinds, places, counts = ids.unique(return_inverse=True, return_counts=True)
    return kinds, torch.zeros(len(kinds), dtype=values.dtype).index_add(0, places, values), counts


def _quantiles(values: Tensor, levels: list[float]) -> list[float]:
    # torch.quantile refuses more than 16 million numbers
    ordered = values.sort().values
    places = [min(len(ordered) - 1, round(level * (len(ordered) - 1))) for level in levels]
    return [float(ordered[place]) for place in places]
