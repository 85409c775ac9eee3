"""Objectives on a small support: the paper's local support matching and its relatives.

N tokens, K (or K + 1) support ids a position, S the support, pi(S) the student's mass on it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.distributions import Distribution, TokenDistribution, rows
from opd_lightning.errors import ConfigError
from opd_lightning.objectives.base import Need, Objective, TokenLoss, check_at_least
from opd_lightning.records import Rollout

Support = Literal["teacher", "student", "teacher+sampled", "student+sampled"]
Tail = Literal["drop", "bucket", "sampled"]


@dataclass
class _SupportSet:
    """The kept ids of each position; a slot that `valid` excludes holds a repeated id.

    Attributes:
        ids: [N, K].
        teacher_logprobs: [N, K] nats of the full softmax.
        valid: [N, K] bool.
    """

    ids: Tensor
    teacher_logprobs: Tensor
    valid: Tensor


class TopKReverseKL(Objective):
    """Reverse KL over a few likely tokens of each position: the paper's local support matching.

    Loss with `tail="drop"` (the paper's): KL(pi^ || q^) = sum over S of pi^_v log(pi^_v / q^_v),
    both sides renormalised on the support S.
    Gradient on z_v: pi^_v (log(pi^_v / q^_v) - loss) on S, exactly 0 off it, so that mass outside S
    is never penalised; 0 at pi = q. With S the whole vocabulary it is ReverseKL.
    Detached: the teacher, S, the prefix.
    Source: arXiv 2603.25562, local support matching and Table A3 (V1 to V5); docs/mathematics.md,
    sections 3 and 4. Differs in `tail="sampled"` (V4, V5 in the corrected form, see
    HeadTailReverseKL) and adds `tail="bucket"`.
    Needs: the teacher's top K; its whole vocabulary where the student chooses S. Of the student, K
    rows of the head a token and nothing of its vocabulary (with a tail, also its logsumexp).

    `tail="bucket"`: S and one outcome "everything else", S^c. Loss sum over S of pi_v log(pi_v /
    q_v) + pi(S^c) log(pi(S^c) / q(S^c)); gradient on z_v: pi_v (log(pi_v / q_v) - loss) on S, pi_v
    (log(pi(S^c) / q(S^c)) - loss) off it. A lower bound of the reverse KL that also holds the mass
    off S in place, from the same K teacher numbers.

    Args:
        k: Tokens kept a position, at least 2 (1 would be identically zero); more than the
            vocabulary is cut to it.
        support: Whose likeliest tokens are kept; "+sampled" adds the sampled token (V2, V3).
        renormalize: Whether tail="drop" renormalises both sides on S. With a tail both sides sum
            to one anyway. False needs `biased_ok`: its minimiser holds only q(S) / e on S.
        tail: What becomes of the mass off S.
        biased_ok: Accept the un-renormalised head alone, an ablation that drives 63 % of the mass
            off the support.

    Raises:
        ConfigError: If `k` < 2, `renormalize` is False with tail="drop" without `biased_ok`, or
            tail="sampled" comes with a support that holds the sampled token.
    """

    def __init__(
        self,
        k: int = 32,
        support: Support = "teacher",
        renormalize: bool = True,
        tail: Tail = "drop",
        biased_ok: bool = False,
    ) -> None:
        check_at_least(
            "k", k, 2, "One renormalised token has probability 1 on both sides: no loss."
        )
        _check_choice("support", support, Support)
        _check_choice("tail", tail, Tail)
        if not renormalize and tail == "drop" and not biased_ok:
            raise ConfigError(
                "renormalize=False with tail='drop' is biased: its minimiser keeps only q(S)/e of "
                "the mass on the support. Take tail='bucket' or tail='sampled', or set "
                "biased_ok=True for the ablation."
            )
        if tail == "sampled" and support.endswith("+sampled"):
            raise ConfigError(
                f"tail='sampled' has no effect with support={support!r}: the sampled token is "
                "never off it, so only a biased head is left. Take "
                f"support={support.split('+')[0]!r}, or tail='drop'."
            )
        self.k = k
        self.support = support
        self.renormalize = renormalize
        self.tail = tail
        self.biased_ok = biased_ok

    @property
    def needs(self) -> Need:
        """What it reads of the teacher: "topk", or "full" where the student chooses the support."""
        return "topk" if self.support.startswith("teacher") else "full"

    @property
    def on_policy_estimator(self) -> bool:
        """True with a sampled tail, whose gradient is right only in expectation."""
        return self.tail == "sampled"

    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        """Return the loss of each position, [N] nats."""
        support = self._support(student, teacher, rollout)
        metrics = {"teacher/support_mass": _mass(support.teacher_logprobs, support.valid)}
        if self.tail == "drop" and self.renormalize:
            logits = student.logits_at(support.ids).masked_fill(~support.valid, -torch.inf)
            teacher_logprobs = support.teacher_logprobs.masked_fill(~support.valid, -torch.inf)
            log_p, log_q = logits.log_softmax(-1), teacher_logprobs.log_softmax(-1)
            return TokenLoss(_head(log_p, log_q, support.valid), metrics)
        log_p = student.logprobs(support.ids)
        metrics["student/support_mass"] = _mass(log_p.detach(), support.valid)
        if self.tail == "drop":
            return TokenLoss(_head(log_p, support.teacher_logprobs, support.valid), metrics)
        if self.tail == "bucket":
            return TokenLoss(_bucketed(log_p, support), metrics)
        return TokenLoss(_head_and_tail(student, teacher, rollout, log_p, support), metrics)

    def _support(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> _SupportSet:
        if self.support.startswith("teacher"):
            ids, teacher_logprobs = teacher.topk(self.k)
        else:
            ids = student.topk_ids(self.k)
            teacher_logprobs = teacher.logprobs(ids)
        valid = torch.ones_like(ids, dtype=torch.bool)
        if self.support.endswith("+sampled"):
            sampled = rollout.token_ids[:, None]
            valid = torch.cat([valid, ~(ids == sampled).any(1, keepdim=True)], dim=1)
            ids = torch.cat([ids, sampled], dim=1)
            sampled_logprobs = teacher.logprobs(rollout.token_ids)[:, None]
            teacher_logprobs = torch.cat([teacher_logprobs, sampled_logprobs], dim=1)
        return _SupportSet(ids, teacher_logprobs.detach(), valid)


class HeadTailReverseKL(TopKReverseKL):
    """Exact reverse KL on the teacher's top K plus a one-sample estimate of the rest, unbiased.

    Loss: sum over S of pi_v sg[log(pi_v / q_v)] + 1[y not in S] (pi(y) / sg pi(y)) sg[log(pi(y) /
    q(y))].
    Gradient: its expectation over y ~ pi is the full reverse KL's, pi_v (log(pi_v / q_v) - KL) on
    z_v, and so is the value's. At pi = q loss and gradient are 0.
    Detached: the log-ratios, the teacher, S, the prefix.
    Source: arXiv 2603.25562, Table A3, V5; docs/mathematics.md, section 4. Differs from it: the
    published head is differentiated through its log-ratio and so follows an extra gradient of
    pi(S), which pushes mass out of S; here the log-ratio is detached.
    Needs: the teacher's top K and the sampled token's log-probability. Biased with top-p < 1, as
    all that samples.

    Args:
        k: Tokens kept a position, at least 2.

    Raises:
        ConfigError: If `k` < 2.
    """

    def __init__(self, k: int = 32) -> None:
        super().__init__(k=k, tail="sampled")


def _mass(logprobs: Tensor, valid: Tensor) -> Tensor:
    return logprobs.masked_fill(~valid, -torch.inf).exp().sum(-1)


def _head(log_p: Tensor, log_q: Tensor, valid: Tensor) -> Tensor:
    """Return the sum over valid slots of p log(p / q), [N]; slots that are not valid give 0."""
    log_p = log_p.masked_fill(~valid, -torch.inf)
    log_ratio = _log_ratio(log_p, log_q).masked_fill(~valid, 0.0)
    return (log_p.exp() * log_ratio).sum(-1)


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return log p - log q, finite where p is 0 (there its factor p makes the term 0)."""
    possible = log_p > -torch.inf
    return rows.floored(log_p) - torch.where(possible, log_q, 0.0)


def _bucketed(log_p: Tensor, support: _SupportSet) -> Tensor:
    """Return the reverse KL of the K outcomes on S and the one that holds the rest, [N]."""
    rest_p = _log_rest(log_p.masked_fill(~support.valid, -torch.inf))
    rest_q = _log_rest(support.teacher_logprobs.masked_fill(~support.valid, -torch.inf))
    return _head(log_p, support.teacher_logprobs, support.valid) + rest_p.exp() * (rest_p - rest_q)


def _log_rest(logprobs: Tensor) -> Tensor:
    """Return log(1 - sum_k p_k), [N], with a floor where rounding or K = V leaves nothing.

    The floor is the dtype's resolution of 1: below it the difference is rounding noise.
    """
    floor = torch.finfo(logprobs.dtype).eps
    rest = -torch.expm1(logprobs.logsumexp(-1).clamp(max=-floor))
    return rest.log()


def _head_and_tail(
    student: TokenDistribution,
    teacher: Distribution,
    rollout: Rollout,
    log_p: Tensor,
    support: _SupportSet,
) -> Tensor:
    """Return the head with detached log-ratio plus the sampled tail, [N]."""
    log_ratio = _log_ratio(log_p, support.teacher_logprobs).detach()
    head = (log_p.exp() * log_ratio).masked_fill(~support.valid, 0.0).sum(-1)
    outside = ~((support.ids == rollout.token_ids[:, None]) & support.valid).any(-1)
    student_logprobs = student.logprobs(rollout.token_ids)
    log_ratio_tail = (student_logprobs - teacher.logprobs(rollout.token_ids)).detach()
    # pi / sg pi: 1 in value, grad log pi in gradient
    score = (student_logprobs - student_logprobs.detach()).exp()
    return head + torch.where(outside, score * log_ratio_tail.masked_fill(~outside, 0.0), 0.0)


def _check_choice(name: str, value: str, choices: object) -> None:
    known = choices.__args__
    if value not in known:
        raise ConfigError(f"{name} {value!r} is not known. Known: {', '.join(known)}.")
