"""Objectives on a small support: the paper's local support matching and its relatives.

N tokens, K (or K + 1) support ids a position, S the support, pi(S) the student's mass on it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.distributions import Distribution, TokenDistribution, rows
from opd_lightning.errors import ConfigError
from opd_lightning.objectives.base import (
    Need,
    Objective,
    ObjectiveOutput,
    TokenLoss,
    check_at_least,
    check_choice,
)
from opd_lightning.records import Rollout

Support = Literal["teacher", "student", "teacher+sampled", "student+sampled", "union", "top-p"]
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

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors."""
        return self.ids, self.teacher_logprobs, self.valid

    def joined(self, ids: Tensor, teacher: Distribution) -> "_SupportSet":
        """Return the set with further `ids` [N, M]; those that it holds are not valid twice."""
        new = ~((ids[:, :, None] == self.ids[:, None, :]) & self.valid[:, None, :]).any(-1)
        # one id a position is the sampled token, which every teacher can score
        logprobs = teacher.logprobs(ids.squeeze(1) if ids.shape[1] == 1 else ids)
        return _SupportSet(
            torch.cat([self.ids, ids], dim=1),
            torch.cat([self.teacher_logprobs, logprobs.view(ids.shape).detach()], dim=1),
            torch.cat([self.valid, new], dim=1),
        )


class TopKReverseKL(Objective):
    """Reverse KL over a few likely tokens of each position: the paper's local support matching.

    Loss with `tail="drop"` (the paper's): KL(pi^ || q^) = sum over S of pi^_v log(pi^_v / q^_v),
    both sides renormalised on the support S.
    Gradient on z_v: pi^_v (log(pi^_v / q^_v) - loss) on S, exactly 0 off it, so that mass outside S
    is never penalised; 0 at pi = q. With S the whole vocabulary it is ReverseKL.
    Detached: the teacher, S, the prefix.
    Source: arXiv 2603.25562, local support matching and Table A3 (V1 to V5); docs/mathematics.md,
    sections 3 and 4. Adds `tail="bucket"`, the supports "union" and "top-p", and the corrected form
    of V4 and V5.
    Needs: the teacher's top K; its whole vocabulary where the student has a say in S. Of the
    student, K rows of the head a token and nothing of its vocabulary (with a tail, also its
    logsumexp).
    Choose: the default for a teacher of the same family, with `tail="bucket"` where student and
    teacher differ in how much mass they hold off S.

    `tail="bucket"`: S and one outcome "everything else", S^c. Loss sum over S of pi_v log(pi_v /
    q_v) + pi(S^c) log(pi(S^c) / q(S^c)); gradient on z_v: pi_v (log(pi_v / q_v) - loss) on S, pi_v
    (log(pi(S^c) / q(S^c)) - loss) off it. A lower bound of the reverse KL that also holds the mass
    off S in place, from the same K teacher numbers.

    `tail="sampled"`: the sampled token stands for the rest, see HeadTailReverseKL. With
    `detach_log_ratio=False` it is the published form, whose gradient is off by exactly the gradient
    of pi(S) and so pushes mass out of S.

    Args:
        k: Tokens kept a position, at least 2 (1 would be identically zero); more than the
            vocabulary is cut to it.
        support: Whose likeliest tokens are kept; "+sampled" adds the sampled token (V2, V3),
            "union" takes both models' top K, "top-p" the smallest set of the teacher's that holds
            mass `p`, at most K. Where that is one token, a renormalised loss is zero: take a tail.
        renormalize: Whether tail="drop" renormalises both sides on S. With a tail both sides sum
            to one anyway. False needs `biased_ok`: its minimiser holds only q(S) / e on S.
        tail: What becomes of the mass off S.
        p: Teacher mass of support="top-p", in (0, 1]; default 0.9 there.
        detach_log_ratio: Whether tail="sampled" detaches the head's log-ratio. False needs
            `biased_ok`.
        biased_ok: Accept an ablation whose minimiser is not the teacher: the un-renormalised head
            alone, or the published head and tail.

    Raises:
        ConfigError: If `k` < 2, a biased setting comes without `biased_ok`, tail="sampled" with a
            support that holds the sampled token, or `p` without "top-p" or out of range.
    """

    variants = (
        {"support": "student"},
        {"support": "student+sampled"},
        {"support": "teacher+sampled"},
        {"support": "union"},
        {"support": "top-p", "p": 0.75},
        {"tail": "bucket"},
        {"support": "union", "tail": "bucket"},
        {"support": "student", "tail": "sampled"},
        {"tail": "sampled", "detach_log_ratio": False, "biased_ok": True},
        {"renormalize": False, "biased_ok": True},
    )

    def __init__(
        self,
        k: int = 32,
        support: Support = "teacher",
        renormalize: bool = True,
        tail: Tail = "drop",
        p: float | None = None,
        detach_log_ratio: bool = True,
        biased_ok: bool = False,
    ) -> None:
        check_at_least(
            "k", k, 2, "One renormalised token has probability 1 on both sides: no loss."
        )
        check_choice("support", support, Support)
        check_choice("tail", tail, Tail)
        if p is None and support == "top-p":
            p = 0.9
        if p is not None and (support != "top-p" or not 0 < p <= 1):
            raise ConfigError(
                f"p={p} must lie in (0, 1] and goes with support='top-p'; the support is "
                f"{support!r}. Leave p out or change the support."
            )
        if not detach_log_ratio and tail != "sampled":
            raise ConfigError(
                f"detach_log_ratio=False goes with tail='sampled'; the tail is {tail!r}, whose "
                "gradient is that of its value. Leave it out."
            )
        if not detach_log_ratio and not biased_ok:
            raise ConfigError(
                "detach_log_ratio=False is the published head and tail, whose gradient pushes mass "
                "out of the support (it adds that of pi(S)). Leave it out, or set biased_ok=True "
                "for the ablation."
            )
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
        self.p = p
        self.detach_log_ratio = detach_log_ratio
        self.biased_ok = biased_ok

    @property
    def needs(self) -> Need:
        """What it reads of the teacher: "topk", or "full" where the student has a say in S."""
        of_teacher = self.support in ("teacher", "teacher+sampled", "top-p")
        return "topk" if of_teacher else "full"

    @property
    def target(self) -> str | None:
        """The reverse KL on S, of S and one bucket, or (with a sampled tail) the whole one."""
        if self.target_reason:
            return None
        by_tail = {
            "drop": "support_reverse_kl",
            "bucket": "bucketed_reverse_kl",
            "sampled": "reverse_kl",
        }
        return by_tail[self.tail]

    @property
    def target_reason(self) -> str:
        """Why an ablation, or a support that holds the sample, follows no divergence."""
        if not self.detach_log_ratio:
            return "published form, off by the gradient of pi(S)"
        if self.tail == "drop" and not self.renormalize:
            return "ablation: the minimiser holds q(S)/e on S"
        if self.support.endswith("+sampled"):
            return "the support changes with the sample"
        return ""

    @property
    def on_policy_estimator(self) -> bool:
        """True with a sampled tail, whose gradient is right only in expectation."""
        return self.tail == "sampled"

    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        """Return the loss of each position, [N] nats."""
        support = self._support(student, teacher, rollout)
        metrics = self._metrics(support)
        if self.tail == "drop" and self.renormalize:
            logits = student.logits_at(support.ids).masked_fill(~support.valid, -torch.inf)
            teacher_logprobs = support.teacher_logprobs.masked_fill(~support.valid, -torch.inf)
            log_p, log_q = logits.log_softmax(-1), teacher_logprobs.log_softmax(-1)
            return TokenLoss(_head(log_p, log_q, support.valid), metrics)
        sampled = self._sampled(teacher, rollout)
        log_p = student.logprobs(support.ids)
        log_p_sampled = student.logprobs(rollout.token_ids) if sampled else None
        loss = self._with_tail(log_p, log_p_sampled, *support.columns, *sampled)
        metrics["student/support_mass"] = _mass(log_p.detach(), support.valid)
        return TokenLoss(loss, metrics)

    def weighted_loss(
        self,
        student: TokenDistribution,
        teacher: Distribution,
        rollout: Rollout,
        weights: Tensor,
    ) -> ObjectiveOutput:
        """Return the weighted sum; with a tail in one pass over the student's vocabulary."""
        if self.tail == "drop" and self.renormalize:
            return super().weighted_loss(student, teacher, rollout, weights)
        support = self._support(student, teacher, rollout)
        sampled = self._sampled(teacher, rollout)

        def loss_and_mass(logits: Tensor, *others: Tensor) -> Tensor:
            logsumexp = logits.logsumexp(-1, keepdim=True)
            log_p = logits.gather(1, others[0]) - logsumexp
            token_ids = others[3][:, None] if sampled else None
            log_p_sampled = (logits.gather(1, token_ids) - logsumexp)[:, 0] if sampled else None
            loss = self._with_tail(log_p, log_p_sampled, *others)
            return torch.stack([loss, _mass(log_p.detach(), others[2])], dim=-1)

        others = [*support.columns, *sampled]
        loss, values = student.weighted_sum(loss_and_mass, weights, *others)
        metrics = self._metrics(support) | {"student/support_mass": values[:, 1]}
        return ObjectiveOutput(loss, values[:, 0], metrics)

    def _metrics(self, support: _SupportSet) -> dict[str, Tensor]:
        metrics = {"teacher/support_mass": _mass(support.teacher_logprobs, support.valid)}
        if self.support not in ("teacher", "student"):
            sizes = support.valid.sum(-1)
            metrics["teacher/support_size"] = sizes.to(support.teacher_logprobs.dtype)
        return metrics

    def _sampled(self, teacher: Distribution, rollout: Rollout) -> list[Tensor]:
        """Return the sampled ids [N] and the teacher's log-probabilities of them, if needed."""
        if self.tail != "sampled":
            return []
        return [rollout.token_ids, teacher.logprobs(rollout.token_ids).detach()]

    def _with_tail(
        self,
        log_p: Tensor,
        log_p_sampled: Tensor | None,
        ids: Tensor,
        log_q: Tensor,
        valid: Tensor,
        token_ids: Tensor | None = None,
        log_q_sampled: Tensor | None = None,
    ) -> Tensor:
        """Return the loss [N] that is not renormalised.

        Args:
            log_p: [N, K] of the student on the support.
            log_p_sampled: [N] of the student, for tail="sampled".
            ids: [N, K] the support.
            log_q: [N, K] of the teacher on it.
            valid: [N, K] which slots count.
            token_ids: [N] sampled tokens, for tail="sampled".
            log_q_sampled: [N] of the teacher.
        """
        if self.tail == "drop":
            return _head(log_p, log_q, valid)
        if self.tail == "bucket":
            return _bucketed(log_p, log_q, valid)
        log_ratio = _log_ratio(log_p, log_q)
        if self.detach_log_ratio:
            log_ratio = log_ratio.detach()
        head = (log_p.exp() * log_ratio.masked_fill(~valid, 0.0)).sum(-1)
        outside = ~((ids == token_ids[:, None]) & valid).any(-1)
        # pi / sg pi: 1 in value, grad log pi in gradient
        score = (log_p_sampled - log_p_sampled.detach()).exp()
        cost = (log_p_sampled.detach() - log_q_sampled).masked_fill(~outside, 0.0)
        return head + torch.where(outside, score * cost, 0.0)

    def _support(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> _SupportSet:
        if self.support.startswith("student"):
            ids = student.topk_ids(self.k)
            teacher_logprobs = teacher.logprobs(ids)
        else:
            ids, teacher_logprobs = teacher.topk(self.k)
        valid = torch.ones_like(ids, dtype=torch.bool)
        if self.support == "top-p":
            mass = teacher_logprobs.exp()
            valid = mass.cumsum(-1) - mass < self.p
        support = _SupportSet(ids, teacher_logprobs.detach(), valid)
        if self.support == "union":
            return support.joined(student.topk_ids(self.k), teacher)
        if self.support.endswith("+sampled"):
            return support.joined(rollout.token_ids[:, None], teacher)
        return support


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
    Choose: for an unbiased full reverse KL from K teacher numbers, at one sample's variance of the
    tail.

    Args:
        k: Tokens kept a position, at least 2.

    Raises:
        ConfigError: If `k` < 2.
    """

    variants = ()

    def __init__(self, k: int = 32) -> None:
        super().__init__(k=k, tail="sampled")


class SupportMass(Objective):
    """Pulls the student's mass onto the teacher's top K: a term to add to what cannot see it.

    Loss: -log pi(S), S the teacher's K likeliest tokens.
    Gradient on z_v: pi_v - pi^_v on S, pi_v off it, pi^ the student renormalised on S. Not 0 at pi
    = q: alone it empties everything off S, so give it a small coefficient in a Mixture beside
    TopKReverseKL, or take tail="bucket", which holds the mass off S at the teacher's.
    Detached: S, the teacher, the prefix.
    Source: docs/mathematics.md, section 4.
    Needs: the teacher's top K. Of the student, K rows of the head a token and its logsumexp.
    Choose: as a small term of a Mixture.

    Args:
        k: Tokens of S, at least 1.

    Raises:
        ConfigError: If `k` < 1.
    """

    needs = "topk"
    target = "support_surprisal"

    def __init__(self, k: int = 32) -> None:
        check_at_least("k", k, 1, "The mass on no token is 0.")
        self.k = k

    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        """Return -log pi(S) of each position, [N] nats."""
        ids, teacher_logprobs = teacher.topk(self.k)
        log_mass = student.logprobs(ids).logsumexp(-1)
        metrics = {
            "teacher/support_mass": teacher_logprobs.exp().sum(-1).detach(),
            "student/support_mass": log_mass.detach().exp(),
        }
        return TokenLoss(-log_mass, metrics)


def bucketed_reverse_kl(student: TokenDistribution, teacher: Distribution, k: int) -> Tensor:
    """Return the reverse KL of the teacher's top `k` and one bucket for the rest, [N] nats."""
    ids, teacher_logprobs = teacher.topk(k)
    valid = torch.ones_like(ids, dtype=torch.bool)
    return _bucketed(student.logprobs(ids), teacher_logprobs.detach(), valid)


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


def _bucketed(log_p: Tensor, log_q: Tensor, valid: Tensor) -> Tensor:
    """Return the reverse KL of the K outcomes on S and the one that holds the rest, [N]."""
    rest_p = _log_rest(log_p.masked_fill(~valid, -torch.inf))
    rest_q = _log_rest(log_q.masked_fill(~valid, -torch.inf))
    return _head(log_p, log_q, valid) + rest_p.exp() * (rest_p - rest_q)


def _log_rest(logprobs: Tensor) -> Tensor:
    """Return log(1 - sum_k p_k), [N], with a floor where rounding or K = V leaves nothing.

    The floor is the dtype's resolution of 1: below it the difference is rounding noise.
    """
    floor = torch.finfo(logprobs.dtype).eps
    rest = -torch.expm1(logprobs.logsumexp(-1).clamp(max=-floor))
    return rest.log()
