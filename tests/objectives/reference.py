"""Loss and gradient of every objective in closed form (docs/mathematics.md), position by position.

Nothing here is differentiated: each function returns the loss of a position and its gradient on
the student's logits, float64. z student logits [V], t teacher logits [V], y the sampled id.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd_lightning.objectives import Objective, known_objectives


@dataclass
class Case:
    """One position: what a reference may look at."""

    p: Tensor
    q: Tensor
    y: int
    old: float | None = None
    later_costs: list[float] = field(default_factory=list)

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


def support(c: Case, k: int, kind: str) -> Tensor:
    """The kept set as a 0/1 vector over the vocabulary."""
    ids = best(c.q if kind.startswith("teacher") else c.p, k)
    kept = torch.zeros_like(c.p)
    kept[ids + ([c.y] if kind.endswith("+sampled") else [])] = 1.0
    return kept


def reverse_kl(c: Case) -> Answer:
    loss = (c.p * c.log_ratio).sum()
    return loss, c.p * (c.log_ratio - loss)


def forward_kl(c: Case) -> Answer:
    return -(c.q * c.log_ratio).sum(), c.p - c.q


def jensen_shannon(beta: float) -> Reference:
    def answer(c: Case) -> Answer:
        m = beta * c.q + (1 - beta) * c.p
        to_m = torch.log(c.p / m)
        loss = beta * (c.q * torch.log(c.q / m)).sum() + (1 - beta) * (c.p * to_m).sum()
        return loss, (1 - beta) * c.p * (to_m - (c.p * to_m).sum())

    return answer


def local_support_matching(k: int, kind: str = "teacher") -> Reference:
    def answer(c: Case) -> Answer:
        kept = support(c, k, kind)
        p_hat, q_hat = c.p * kept / (c.p * kept).sum(), c.q * kept / (c.q * kept).sum()
        ratio = torch.where(kept > 0, torch.log(p_hat / q_hat), 0.0)
        loss = (p_hat * ratio).sum()
        return loss, p_hat * (ratio - loss)

    return answer


def unnormalised_head(k: int, kind: str = "teacher") -> Reference:
    def answer(c: Case) -> Answer:
        kept = support(c, k, kind)
        loss = (kept * c.p * c.log_ratio).sum()
        constant = loss + (kept * c.p).sum()
        return loss, c.p * (kept * (c.log_ratio + 1) - constant)

    return answer


def bucket(k: int, kind: str = "teacher") -> Reference:
    def answer(c: Case) -> Answer:
        kept = support(c, k, kind)
        rest_p, rest_q = ((1 - kept) * c.p).sum(), ((1 - kept) * c.q).sum()
        rest_ratio = torch.log(rest_p / rest_q)
        loss = (kept * c.p * c.log_ratio).sum() + rest_p * rest_ratio
        return loss, c.p * (torch.where(kept > 0, c.log_ratio, rest_ratio) - loss)

    return answer


def head_and_sampled_tail(k: int, kind: str = "teacher") -> Reference:
    def answer(c: Case) -> Answer:
        kept = support(c, k, kind)
        head = (kept * c.p * c.log_ratio).sum()
        gradient = c.p * (kept * c.log_ratio - head)
        if kept[c.y]:
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
) -> Reference:
    """Section 1.1 and 1.2: cost-to-go times log pi, or PPO's three pieces one after the other."""

    def answer(c: Case) -> Answer:
        log_p = float(torch.log(c.p[c.y]))
        base = c.old if clip is not None and c.old is not None else log_p
        cost = bound(base - float(torch.log(c.q[c.y])), clamp)
        for distance, later in enumerate(c.later_costs, start=1):
            cost += gamma**distance * bound(later, clamp)
        advantage = -cost
        score = c.onehot - c.p
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
}
for _kind in ("teacher", "student", "teacher+sampled", "student+sampled"):
    _s = {"k": K, "support": _kind}
    CONFIGURED |= {
        f"topk-{_kind}": ("TopKReverseKL", _s, local_support_matching(K, _kind)),
        f"head-{_kind}": (
            "TopKReverseKL",
            {**_s, "renormalize": False, "biased_ok": True},
            unnormalised_head(K, _kind),
        ),
        f"bucket-{_kind}": ("TopKReverseKL", {**_s, "tail": "bucket"}, bucket(K, _kind)),
    }
    if not _kind.endswith("+sampled"):
        CONFIGURED[f"tail-{_kind}"] = (
            "TopKReverseKL",
            {**_s, "tail": "sampled"},
            head_and_sampled_tail(K, _kind),
        )


def build(name: str) -> Objective:
    """Return the configured objective `name`, or a known class with its defaults and a small k."""
    cls, settings = CONFIGURED[name][:2] if name in CONFIGURED else (name, {})
    known = known_objectives()[cls]
    if name not in CONFIGURED and "k" in known.__init__.__annotations__:
        settings = {"k": K}
    return known(**settings)


# every known class is in the battery, also one that nobody has written a reference for
BATTERY = list(dict.fromkeys([*known_objectives(), *CONFIGURED]))


def uses_old_logprobs(name: str) -> bool:
    return getattr(build(name), "uses_old_logprobs", False)
