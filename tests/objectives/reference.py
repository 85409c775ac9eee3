"""Loss and gradient of every objective in closed form (docs/mathematics.md), position by position.

Nothing here is differentiated: each function returns the loss of a position and its gradient on
the student's logits, float64. z student logits [V], t teacher logits [V], y the sampled id.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd_lightning.objectives import (
    Objective,
    OutcomeReward,
    SampledTokenReverseKL,
    TopKReverseKL,
    known_objectives,
    resolve_objective,
)


@dataclass
class Case:
    """One position: what a reference may look at."""

    p: Tensor
    q: Tensor
    y: int
    old: float | None = None
    later_costs: list[float] = field(default_factory=list)
    sampling: float | None = None
    reward: float = 0.0
    length: int = 1

    @property
    def onehot(self) -> Tensor:
        hot = torch.zeros_like(self.p)
        hot[self.y] = 1.0
        return hot

    @property
    def log_ratio(self) -> Tensor:
        return torch.log(self.p) - torch.log(self.q)


Answer = tuple[Tensor, Tensor]
Reference = Callable[[Case], Answer]


def best(x: Tensor, k: int) -> list[int]:
    return sorted(range(len(x)), key=lambda v: -float(x[v]))[:k]


def support(c: Case, k: int, kind: str, mass: float = 0.0) -> Tensor:
    """The kept set as a 0/1 vector over the vocabulary."""
    ids = best(c.p if kind.startswith("student") else c.q, k)
    if kind == "union":
        ids = ids + best(c.p, k)
    if kind == "top-p":
        sizes = [n for n in range(1, k + 1) if float(c.q[ids[:n]].sum()) >= mass]
        ids = ids[: min(sizes, default=k)]
    kept = torch.zeros_like(c.p)
    kept[ids + ([c.y] if kind.endswith("+sampled") else [])] = 1.0
    return kept


def reverse_kl(c: Case) -> Answer:
    loss = (c.p * c.log_ratio).sum()
    return loss, c.p * (c.log_ratio - loss)


def forward_kl(c: Case) -> Answer:
    return -(c.q * c.log_ratio).sum(), c.p - c.q


def jensen_shannon(beta: float, scaled: bool = False) -> Reference:
    scale = 1 / (beta * (1 - beta)) if scaled else 1.0

    def answer(c: Case) -> Answer:
        m = beta * c.q + (1 - beta) * c.p
        to_m = torch.log(c.p / m)
        loss = beta * (c.q * torch.log(c.q / m)).sum() + (1 - beta) * (c.p * to_m).sum()
        return scale * loss, scale * (1 - beta) * c.p * (to_m - (c.p * to_m).sum())

    return answer


def skew_reverse_kl(alpha: float) -> Reference:
    def answer(c: Case) -> Answer:
        m = alpha * c.p + (1 - alpha) * c.q
        h = torch.log(c.p / m) - alpha * c.p / m
        return (c.p * torch.log(c.p / m)).sum(), c.p * (h - (c.p * h).sum())

    return answer


def entropy_aware(threshold: float, width: float = 0.0) -> Reference:
    def answer(c: Case) -> Answer:
        entropy = -float((c.q * torch.log(c.q)).sum())
        if width:
            w = 1 / (1 + math.exp((threshold - entropy) / width))
        else:
            w = float(entropy >= threshold)
        forward, reverse = forward_kl(c), reverse_kl(c)
        return tuple(w * f + (1 - w) * r for f, r in zip(forward, reverse, strict=True))

    return answer


def support_mass(k: int) -> Reference:
    def answer(c: Case) -> Answer:
        kept = support(c, k, "teacher")
        mass = (kept * c.p).sum()
        return -torch.log(mass), c.p - kept * c.p / mass

    return answer


def outcome_reward(c: Case) -> Answer:
    return -c.reward * torch.log(c.p[c.y]), -c.reward * (c.onehot - c.p)


def mixture(*terms: tuple[float, Reference]) -> Reference:
    def answer(c: Case) -> Answer:
        answers = [(x, f(c)) for x, f in terms]
        return sum(x * loss for x, (loss, _) in answers), sum(x * g for x, (_, g) in answers)

    return answer


def power(alpha: float, cap: float | None = None) -> Reference:
    def answer(c: Case) -> Answer:
        advantage = (c.q[c.y] ** alpha - c.p[c.y] ** alpha) / alpha
        w = 1.0 if cap is None else min(cap, float(c.p[c.y]) / math.exp(c.sampling))
        return -w * advantage * torch.log(c.p[c.y]), -w * advantage * (c.onehot - c.p)

    return answer


def squared_log_ratio(c: Case) -> Answer:
    return c.log_ratio[c.y] ** 2 / 2, c.log_ratio[c.y] * (c.onehot - c.p)


def local_support_matching(k: int, kind: str = "teacher", mass: float = 0.0) -> Reference:
    def answer(c: Case) -> Answer:
        kept = support(c, k, kind, mass)
        p_hat, q_hat = c.p * kept / (c.p * kept).sum(), c.q * kept / (c.q * kept).sum()
        ratio = torch.where(kept > 0, torch.log(p_hat / q_hat), 0.0)
        loss = (p_hat * ratio).sum()
        return loss, p_hat * (ratio - loss)

    return answer


def unnormalised_head(k: int, kind: str = "teacher", mass: float = 0.0) -> Reference:
    def answer(c: Case) -> Answer:
        kept = support(c, k, kind, mass)
        loss = (kept * c.p * c.log_ratio).sum()
        constant = loss + (kept * c.p).sum()
        return loss, c.p * (kept * (c.log_ratio + 1) - constant)

    return answer


def bucket(k: int, kind: str = "teacher", mass: float = 0.0) -> Reference:
    def answer(c: Case) -> Answer:
        kept = support(c, k, kind, mass)
        rest_p, rest_q = ((1 - kept) * c.p).sum(), ((1 - kept) * c.q).sum()
        rest_ratio = torch.log(rest_p / rest_q)
        loss = (kept * c.p * c.log_ratio).sum() + rest_p * rest_ratio
        return loss, c.p * (torch.where(kept > 0, c.log_ratio, rest_ratio) - loss)

    return answer


def head_and_sampled_tail(k: int, kind: str = "teacher", mass: float = 0.0) -> Reference:
    def answer(c: Case) -> Answer:
        kept = support(c, k, kind, mass)
        head = (kept * c.p * c.log_ratio).sum()
        gradient = c.p * (kept * c.log_ratio - head)
        if kept[c.y]:
            return head, gradient
        tail = c.log_ratio[c.y]
        return head + tail, gradient + tail * (c.onehot - c.p)

    return answer


def published_head_and_tail(k: int, kind: str = "teacher") -> Reference:
    def answer(c: Case) -> Answer:
        head, gradient = unnormalised_head(k, kind)(c)
        if support(c, k, kind)[c.y]:
            return head, gradient
        tail = c.log_ratio[c.y]
        return head + tail, gradient + tail * (c.onehot - c.p)

    return answer


def bound(value: float, clamp: float | None) -> float:
    return value if clamp is None else max(-clamp, min(clamp, value))


def sampled_token(
    clip: float | None = None,
    dual: float | None = None,
    clamp: float | None = None,
    gamma: float = 0.0,
    baseline: Reference | None = None,
    cap: float | None = None,
    per_token: bool = False,
) -> Reference:
    """Section 1.1 and 1.2: cost-to-go times log pi, or PPO's three pieces one after the other."""

    def answer(c: Case) -> Answer:
        log_p = float(torch.log(c.p[c.y]))
        base = c.old if clip is not None and c.old is not None else log_p
        cost = bound(base - float(torch.log(c.q[c.y])), clamp)
        for distance, later in enumerate(c.later_costs, start=1):
            cost += gamma**distance * bound(later, clamp)
        advantage = -cost / (c.length if per_token else 1)
        if baseline is not None:
            advantage += float(baseline(c)[0])
        score = c.onehot - c.p
        if cap is not None:
            w = min(cap, math.exp(base - c.sampling))
            return torch.tensor(-w * advantage * log_p, dtype=torch.float64), -w * advantage * score
        if clip is None:
            return torch.tensor(-advantage * log_p, dtype=torch.float64), -advantage * score
        ratio = torch.exp(torch.tensor(log_p - base, dtype=torch.float64))
        if advantage < 0 and dual is not None and ratio > max(dual, 1 - clip):
            return torch.tensor(-dual * advantage, dtype=torch.float64), 0 * score
        if advantage > 0 and ratio > 1 + clip:
            return torch.tensor(-advantage * (1 + clip), dtype=torch.float64), 0 * score
        if advantage < 0 and ratio < 1 - clip:
            return torch.tensor(-advantage * (1 - clip), dtype=torch.float64), 0 * score
        return -advantage * ratio, -advantage * ratio * score

    return answer


K = 4

# id -> (class name, settings, reference)
CONFIGURED: dict[str, tuple[str, dict, Reference]] = {
    "SampledTokenReverseKL": ("SampledTokenReverseKL", {}, sampled_token()),
    "sampled-clamp": (
        "SampledTokenReverseKL",
        {"log_ratio_clamp": 0.7},
        sampled_token(clamp=0.7),
    ),
    "ppo": ("SampledTokenReverseKL", {"clip_ratio": 0.2}, sampled_token(clip=0.2)),
    "ppo-dual": (
        "SampledTokenReverseKL",
        {"clip_ratio": 0.2, "dual_clip": 1.5},
        sampled_token(clip=0.2, dual=1.5),
    ),
    "ppo-dual-clamp": (
        "SampledTokenReverseKL",
        {"clip_ratio": 0.1, "dual_clip": 3.0, "log_ratio_clamp": 1.0},
        sampled_token(clip=0.1, dual=3.0, clamp=1.0),
    ),
    "vopd": ("SampledTokenReverseKL", {"baseline": "kl"}, sampled_token(baseline=reverse_kl)),
    "vopd-k": (
        "SampledTokenReverseKL",
        {"baseline": "kl", "baseline_k": K},
        sampled_token(baseline=bucket(K)),
    ),
    "sampled-k2": ("SampledTokenReverseKL", {"estimator": "k2"}, squared_log_ratio),
    "sampled-importance": (
        "SampledTokenReverseKL",
        {"importance_cap": 1.1},
        sampled_token(cap=1.1),
    ),
    "PowerOPD": ("PowerOPD", {}, power(0.5)),
    "power-1": ("PowerOPD", {"alpha": 1.0, "importance_cap": 1.2}, power(1.0, cap=1.2)),
    "OutcomeReward": ("OutcomeReward", {}, outcome_reward),
    "sequence-length": (
        "SequenceReverseKL",
        {"normalize": "length", "gamma": 0.8},
        sampled_token(gamma=0.8, per_token=True),
    ),
    **{
        f"sequence-{gamma}": ("SequenceReverseKL", {"gamma": gamma}, sampled_token(gamma=gamma))
        for gamma in (0.0, 0.3, 1.0)
    },
    "SequenceReverseKL": (
        "SequenceReverseKL",
        {"gamma": 0.9, "clip_ratio": 0.2, "dual_clip": 1.5, "log_ratio_clamp": 1.5},
        sampled_token(clip=0.2, dual=1.5, clamp=1.5, gamma=0.9),
    ),
    "TopKReverseKL": ("TopKReverseKL", {"k": K}, local_support_matching(K)),
    "topk-all": ("TopKReverseKL", {"k": 50}, reverse_kl),
    "HeadTailReverseKL": ("HeadTailReverseKL", {"k": K}, head_and_sampled_tail(K)),
    "ReverseKL": ("ReverseKL", {}, reverse_kl),
    "ForwardKL": ("ForwardKL", {}, forward_kl),
    "JensenShannon": ("JensenShannon", {}, jensen_shannon(0.5)),
    "jensen-0.1": ("JensenShannon", {"beta": 0.1}, jensen_shannon(0.1)),
    "jensen-0.9": ("JensenShannon", {"beta": 0.9}, jensen_shannon(0.9)),
    "jensen-scaled": (
        "JensenShannon",
        {"beta": 0.2, "scaled": True},
        jensen_shannon(0.2, scaled=True),
    ),
    "jensen-scaled-0": ("JensenShannon", {"beta": 0.0, "scaled": True}, forward_kl),
    "jensen-scaled-1": ("JensenShannon", {"beta": 1.0, "scaled": True}, reverse_kl),
    "SkewReverseKL": ("SkewReverseKL", {}, skew_reverse_kl(0.1)),
    "skew-0.7": ("SkewReverseKL", {"alpha": 0.7}, skew_reverse_kl(0.7)),
    "EntropyAware": ("EntropyAware", {"threshold": 1.6}, entropy_aware(1.6)),
    "entropy-smooth": (
        "EntropyAware",
        {"threshold": 1.2, "width": 0.4},
        entropy_aware(1.2, 0.4),
    ),
    "SupportMass": ("SupportMass", {"k": K}, support_mass(K)),
    "Mixture": ("Mixture", {}, mixture((0.5, reverse_kl), (0.5, forward_kl))),
    "sampled-mixture": (
        "Mixture",
        {
            "objectives": [TopKReverseKL(k=K), OutcomeReward(), SampledTokenReverseKL()],
            "coefficients": [1.0, -0.3, 0.5],
        },
        mixture((1.0, local_support_matching(K)), (-0.3, outcome_reward), (0.5, sampled_token())),
    ),
    "tail-published": (
        "TopKReverseKL",
        {"k": K, "tail": "sampled", "detach_log_ratio": False, "biased_ok": True},
        published_head_and_tail(K),
    ),
}
for _kind in ("teacher", "student", "teacher+sampled", "student+sampled", "union", "top-p"):
    _s = {"k": K, "support": _kind} | ({"p": 0.6} if _kind == "top-p" else {})
    CONFIGURED |= {
        f"topk-{_kind}": ("TopKReverseKL", _s, local_support_matching(K, _kind, 0.6)),
        f"head-{_kind}": (
            "TopKReverseKL",
            {**_s, "renormalize": False, "biased_ok": True},
            unnormalised_head(K, _kind, 0.6),
        ),
        f"bucket-{_kind}": ("TopKReverseKL", {**_s, "tail": "bucket"}, bucket(K, _kind, 0.6)),
    }
    if not _kind.endswith("+sampled"):
        CONFIGURED[f"tail-{_kind}"] = (
            "TopKReverseKL",
            {**_s, "tail": "sampled"},
            head_and_sampled_tail(K, _kind, 0.6),
        )


def build(name: str) -> Objective:
    """Return the configured objective `name`, or a known class with its defaults and a small k."""
    cls, settings = CONFIGURED[name][:2] if name in CONFIGURED else (name, {})
    known = resolve_objective(cls)
    if name not in CONFIGURED and "k" in inspect.signature(known).parameters:
        settings = {"k": K}
    return known(**settings)


# every known class is in the battery, also one that nobody has written a reference for
BATTERY = list(dict.fromkeys([*known_objectives(), *CONFIGURED]))


def uses_old_logprobs(name: str) -> bool:
    return getattr(build(name), "uses_old_logprobs", False)
