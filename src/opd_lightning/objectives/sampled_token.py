"""Objectives that score only the sampled token: their gradient is right in expectation."""

from typing import Literal

import torch
from torch import Tensor

from opd_lightning.distributions import Distribution, TokenDistribution, TopKDistribution
from opd_lightning.errors import ConfigError
from opd_lightning.objectives.base import (
    Need,
    Objective,
    TokenLoss,
    check_at_least,
    check_choice,
    whole,
)
from opd_lightning.objectives.topk import bucketed_reverse_kl
from opd_lightning.records import Rollout

Baseline = Literal["none", "kl"]
Estimator = Literal["k1", "k2"]
AcrossMasked = Literal["skip", "reset"]
Normalize = Literal["none", "length"]


class SampledTokenReverseKL(Objective):
    """Token-level on-policy distillation: REINFORCE with the teacher's log-ratio as advantage.

    Loss: -sg[A] log pi(y), A = log q(y) - log pi(y); not whitened, no baseline.
    Gradient on z_v: A (pi_v - 1[v = y]). Its expectation over y ~ pi is pi_v (log(pi_v / q_v) -
    KL(pi || q)), exactly ReverseKL's with the prefix held fixed. At pi = q every A is 0, and so is
    the gradient of each sample.
    Detached: A, the teacher, the prefix.
    Source: arXiv 2603.25562, sampled-token OPD; docs/mathematics.md, section 1. Adds `baseline`
    (vOPD, arXiv 2605.07865), `estimator` and `importance_cap`.
    Needs: the sampled token's log-probability; with a baseline also the teacher's whole vocabulary
    or its top `baseline_k`. Biased where completions are drawn with top-p < 1: tokens outside the
    nucleus are never seen.
    Choose: for the paper's baseline, and where the teacher gives one number a token. Its single
    samples are noisy; take TopKReverseKL where K teacher numbers can be had.

    `baseline="kl"` adds KL(pi || q), detached, to A: it does not depend on y, so the mean stays and
    the variance falls. `estimator="k2"` is the loss (log pi(y) - log q(y))^2 / 2, differentiated;
    its gradient is that of the default for every sample, its value is above 0.

    With `clip_ratio` the loss is PPO's, for several updates on one rollout: rho = pi(y) /
    pi_old(y), A taken with pi_old, loss max(-A rho, -A clip(rho, 1 - c, 1 + c)), and at most
    -`dual_clip` A where A < 0. Its gradient is REINFORCE's times rho, and 0 where the clip holds.
    pi_old are the rollout's `old_logprobs`; without them pi_old = sg[pi], as in a first update.

    With `importance_cap` the loss is multiplied by min(pi(y) / mu(y), cap), detached, mu the
    rollout's `sampling_logprobs` (and pi_old for pi under `clip_ratio`): completions of an older
    student count as if drawn from this one, token by token. Logs `importance/weight` and
    `importance/ess`, the effective share of the tokens, (mean w)^2 / mean w^2.

    Args:
        clip_ratio: PPO's clip range c > 0, in the paper 0.2; None: no ratio and no clip.
        dual_clip: Bound on the loss where A < 0, as a multiple of -A, at least 1, in the paper 3;
            goes with `clip_ratio`.
        log_ratio_clamp: Bound on the absolute value of A in nats, > 0; None: unbounded, as in the
            paper's runs. A bound biases the gradient wherever it acts.
        baseline: "kl" lowers the variance of one sample.
        baseline_k: Teacher tokens from which the baseline is computed (the reverse KL of K tokens
            and one bucket, a lower bound), at least 2; None: from the whole vocabulary.
        estimator: "k1" is REINFORCE, "k2" the squared log-ratio; "k2" takes no other setting than
            `importance_cap`.
        importance_cap: Largest importance weight, > 0, usually 2; None: no weights.

    Raises:
        ConfigError: If a bound is out of its range, or a setting comes without the one it needs.
    """

    on_policy_estimator = True
    variants = (
        {"baseline": "kl"},
        {"baseline": "kl", "baseline_k": 3},
        {"estimator": "k2"},
        {"clip_ratio": 0.2, "dual_clip": 3.0},
        {"importance_cap": 2.0},
        {"log_ratio_clamp": 1.0},
    )

    def __init__(
        self,
        clip_ratio: float | None = None,
        dual_clip: float | None = None,
        log_ratio_clamp: float | None = None,
        baseline: Baseline = "none",
        baseline_k: int | None = None,
        estimator: Estimator = "k1",
        importance_cap: float | None = None,
    ) -> None:
        for name, bound in [
            ("clip_ratio", clip_ratio),
            ("log_ratio_clamp", log_ratio_clamp),
            ("importance_cap", importance_cap),
        ]:
            if bound is not None and not bound > 0:
                raise ConfigError(
                    f"{name} must be above 0; got {bound}. Leave it out to switch it off."
                )
        if dual_clip is not None:
            check_at_least("dual_clip", dual_clip, 1.0, "The paper takes 3.")
            if clip_ratio is None:
                raise ConfigError(
                    f"dual_clip={dual_clip} has no effect without clip_ratio; set clip_ratio (the "
                    "paper takes 0.2) or leave dual_clip out."
                )
        check_choice("baseline", baseline, Baseline)
        check_choice("estimator", estimator, Estimator)
        if baseline_k is not None:
            check_at_least("baseline_k", baseline_k, 2, "Leave it out for the whole vocabulary.")
            if baseline == "none":
                raise ConfigError(
                    f"baseline_k={baseline_k} has no effect without baseline='kl'. Set it, or "
                    "leave baseline_k out."
                )
        bounds = {"clip_ratio": clip_ratio, "log_ratio_clamp": log_ratio_clamp}
        given = [name for name, value in bounds.items() if value is not None]
        given += ["baseline"] if baseline != "none" else []
        if estimator == "k2" and given:
            raise ConfigError(
                f"estimator='k2' is differentiated itself and has no advantage for "
                f"{', '.join(given)} to act on. Take estimator='k1', or leave them out."
            )
        self.clip_ratio = clip_ratio
        self.dual_clip = dual_clip
        self.log_ratio_clamp = log_ratio_clamp
        self.baseline = baseline
        self.baseline_k = baseline_k
        self.estimator = estimator
        self.importance_cap = importance_cap

    @property
    def needs(self) -> Need:
        """What it reads of the teacher: "sampled", with a baseline "topk" or "full"."""
        if self.baseline == "none":
            return "sampled"
        return "full" if self.baseline_k is None else "topk"

    @property
    def target(self) -> str | None:
        """The reverse KL, unless a clamp biases it."""
        return None if self.target_reason else "reverse_kl"

    @property
    def target_reason(self) -> str:
        """Why a clamped log-ratio follows no divergence."""
        return "" if self.log_ratio_clamp is None else "a clamp biases the gradient where it acts"

    @property
    def uses_old_logprobs(self) -> bool:
        """Whether the student's log-probabilities before the first update are to be recorded."""
        return self.clip_ratio is not None

    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        """Return the surrogate loss of each sampled token, [N]; its value is not a divergence."""
        student_logprobs = student.logprobs(rollout.token_ids)
        teacher_logprobs = teacher.logprobs(rollout.token_ids).detach()
        old_logprobs = self._old_logprobs(student_logprobs, rollout)
        advantages = -self.credit(self.cost(old_logprobs, teacher_logprobs), rollout)
        if self.baseline == "kl":
            advantages = advantages + self._expected_cost(student, teacher)
        metrics = {
            "kl/reverse_k1": old_logprobs - teacher_logprobs,
            "advantage/mean": advantages,
            "advantage/negative_frac": (advantages < 0).to(advantages.dtype),
        }
        if self.estimator == "k2":
            loss = (student_logprobs - teacher_logprobs).square() / 2
        elif self.clip_ratio is None:
            loss = -advantages * student_logprobs
        else:
            ratio = (student_logprobs - old_logprobs).exp()
            loss = self._clipped(ratio, advantages, metrics)
        if self.importance_cap is not None:
            weights = self._importance_weights(old_logprobs, rollout)
            metrics |= {"importance/weight": weights, "importance/weight_squared": weights.square()}
            loss = weights * loss
        return TokenLoss(loss, metrics)

    def cost(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        """Return what each sampled token costs, [N] nats: log pi(y) - log q(y)."""
        costs = student_logprobs - teacher_logprobs
        if self.log_ratio_clamp is None:
            return costs
        return costs.clamp(-self.log_ratio_clamp, self.log_ratio_clamp)

    def credit(self, costs: Tensor, rollout: Rollout) -> Tensor:
        """Return what each token answers for, [N]: here its own cost."""
        return costs

    def finish_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Turn the mean squared importance weight into the effective sample size."""
        means = dict(means)
        squared = means.pop("importance/weight_squared", None)
        if squared:
            means["importance/ess"] = means["importance/weight"] ** 2 / squared
        return means

    def without_ignored(
        self,
        student: TokenDistribution,
        teacher: Distribution,
        rollout: Rollout,
        ignored: Tensor,
    ) -> Distribution:
        """Return the teacher's sampled tokens; an ignored one that is not finite gets cost 0.

        The other ids are left out: filling an impossible one of an ignored position would change
        log q(y) there, and with it the cost that earlier tokens of the row may answer for.
        """
        if self.baseline != "none":
            return super().without_ignored(student, teacher, rollout, ignored)
        sampled = teacher.logprobs(rollout.token_ids).detach()
        unusable = ignored & ~sampled.isfinite()
        if bool(unusable.any()):
            own = self._old_logprobs(student.logprobs(rollout.token_ids), rollout)
            sampled = torch.where(unusable, own, sampled)
        return TopKDistribution(rollout.token_ids[:, None], sampled[:, None], sampled)

    def _old_logprobs(self, student_logprobs: Tensor, rollout: Rollout) -> Tensor:
        """Return log pi_old(y), [N]: the rollout's where they are used and known, else sg[pi]."""
        old_logprobs = rollout.flat_old_logprobs if self.uses_old_logprobs else None
        return student_logprobs.detach() if old_logprobs is None else old_logprobs

    @torch.no_grad()
    def _expected_cost(self, student: TokenDistribution, teacher: Distribution) -> Tensor:
        """Return KL(pi || q), [N]; 0 where it is infinite, which is as good a baseline."""
        if self.baseline_k is not None:
            expected = bucketed_reverse_kl(student, teacher, self.baseline_k)
        else:
            expected = student.reverse_kl(whole(teacher, self))
        return torch.where(expected.isfinite(), expected, 0.0)

    def _importance_weights(self, student_logprobs: Tensor, rollout: Rollout) -> Tensor:
        """Return min(pi(y) / mu(y), cap), [N].

        Raises:
            ConfigError: If the rollout has no sampling log-probabilities.
        """
        sampling_logprobs = rollout.flat_sampling_logprobs
        if sampling_logprobs is None:
            raise ConfigError(
                f"importance_cap={self.importance_cap} needs the log-probabilities under which the "
                "completions were drawn; this rollout has none (sampling_logprobs: None). Have the "
                "engine return them, or leave importance_cap out."
            )
        return (student_logprobs - sampling_logprobs).exp().clamp(max=self.importance_cap)

    def _clipped(self, ratio: Tensor, advantages: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        unclipped = -advantages * ratio
        clipped = -advantages * ratio.clamp(1 - self.clip_ratio, 1 + self.clip_ratio)
        loss = torch.maximum(unclipped, clipped)
        metrics["loss/ratio_clipped_frac"] = (clipped > unclipped).detach().to(ratio.dtype)
        if self.dual_clip is not None:
            bound = -self.dual_clip * advantages
            bounded = (advantages < 0) & (loss > bound)
            loss = torch.where(bounded, bound, loss)
            metrics["loss/ratio_dual_clipped_frac"] = bounded.detach().to(ratio.dtype)
        return loss


class SequenceReverseKL(SampledTokenReverseKL):
    """Sequence-level reverse KL: each token answers for its own cost and the later ones.

    Loss: sg[G_t] log pi(y_t), G_t = r_t + gamma G_{t+1}, r_t = log pi(y_t) - log q(y_t), over the
    completion tokens of a row.
    Gradient on z_v: G_t (1[v = y_t] - pi_v). Summed over a row and with gamma = 1 its expectation
    is the gradient of KL(pi(.|x) || q(.|x)) of whole completions; with gamma = 0 it is
    SampledTokenReverseKL. At pi = q every r is 0, and so is the gradient of each sample.
    Detached: G, the teacher, the prefix.
    Source: arXiv 2603.25562, sequence-level reverse KL; docs/mathematics.md, section 2.
    Needs: the sampled token's log-probability.
    Choose: for short completions, or with a small gamma; its variance grows with the length.

    The theory sums over t: pair it with the reduction seq-mean-token-sum; a token mean divides by
    the length. The variance grows about as T^3 for gamma = 1 and as T for gamma = 0. A token of
    weight 0 (a masked special token) still hands its cost to the earlier ones, unless that cost is
    not finite; `log_ratio_clamp` bounds it.

    Args:
        gamma: Discount of later costs, from 0 to 1.
        clip_ratio: As in SampledTokenReverseKL.
        dual_clip: As in SampledTokenReverseKL.
        log_ratio_clamp: Bound on the absolute value of each r_t in nats.
        across_masked: Where a row has several spans (turns) of the student's: "skip" sums on over
            the tokens between them, which is the sequence-level gradient; "reset" starts G again
            in each span, as the paper's code does.
        normalize: "length" divides G by the completion tokens of the row: nats a token.

    Raises:
        ConfigError: If `gamma` is not within [0, 1], or as SampledTokenReverseKL.
    """

    variants = (
        {"gamma": 0.0},
        {"gamma": 0.5},
        {"normalize": "length"},
    )

    def __init__(
        self,
        gamma: float = 1.0,
        clip_ratio: float | None = None,
        dual_clip: float | None = None,
        log_ratio_clamp: float | None = None,
        across_masked: AcrossMasked = "skip",
        normalize: Normalize = "none",
    ) -> None:
        super().__init__(clip_ratio, dual_clip, log_ratio_clamp)
        if not 0 <= gamma <= 1:
            raise ConfigError(f"gamma must lie within 0 and 1; got {gamma}. 0 is token-level.")
        check_choice("across_masked", across_masked, AcrossMasked)
        check_choice("normalize", normalize, Normalize)
        self.gamma = gamma
        self.across_masked = across_masked
        self.normalize = normalize

    @property
    def target(self) -> str | None:
        """The sequence-level reverse KL for gamma 1, the token-level one for 0."""
        if self.target_reason:
            return None
        return "sequence_reverse_kl" if self.gamma == 1 else "reverse_kl"

    @property
    def target_reason(self) -> str:
        """Why it follows no one divergence: gamma between the two, or another scale."""
        if self.normalize == "length":
            return "the sequence's divided by its length, another factor for each completion"
        if 0 < self.gamma < 1:
            return "trades bias for variance between token and sequence level"
        if self.across_masked == "reset" and self.gamma > 0:
            return "the sequence-level gradient of each turn, blind to later turns"
        return super().target_reason

    def credit(self, costs: Tensor, rollout: Rollout) -> Tensor:
        """Return the discounted sum of a token's own and later costs, [N] nats."""
        chain = rollout.row if self.across_masked == "skip" else rollout.span
        returns = discounted_returns(costs, chain, self.gamma)
        if self.normalize == "length":
            returns = returns / rollout.completion_lengths[rollout.row]
        return returns


class PowerOPD(SampledTokenReverseKL):
    """Sampled-token distillation with a bounded reward: the Box-Cox transform of the log-ratio.

    Loss: -sg[A] log pi(y), A = (q(y)^alpha - pi(y)^alpha) / alpha, within +-1 / alpha.
    Gradient on z_v: A (pi_v - 1[v = y]). Its expectation over y ~ pi is the gradient of the density
    power divergence sum_v (pi_v^(alpha+1) - (alpha+1) pi_v q_v^alpha + alpha q_v^(alpha+1)) /
    (alpha (alpha+1)). A has the sign of log q(y) - log pi(y), to which it tends for alpha -> 0; for
    alpha = 1 the divergence is half the squared distance. At pi = q every A is 0.
    Detached: A, the teacher, the prefix.
    Source: PowerOPD (arXiv 2606.17199); density power divergence: Basu et al. 1998;
    docs/mathematics.md, section 1.
    Needs: the sampled token's log-probability, which may be -inf. Biased with top-p < 1.
    Choose: where single tokens of enormous cost (spelling, end tokens) drown the others.

    Args:
        alpha: Exponent, > 0. Larger values listen only to likely tokens.
        clip_ratio: As in SampledTokenReverseKL.
        dual_clip: As in SampledTokenReverseKL.
        importance_cap: As in SampledTokenReverseKL.

    Raises:
        ConfigError: If `alpha` is not above 0, or as SampledTokenReverseKL.
    """

    target = "density_power"
    target_reason = ""
    variants = ({"alpha": 1.0},)

    def __init__(
        self,
        alpha: float = 0.5,
        clip_ratio: float | None = None,
        dual_clip: float | None = None,
        importance_cap: float | None = None,
    ) -> None:
        if not alpha > 0:
            raise ConfigError(
                f"PowerOPD's alpha must be above 0; got {alpha}. For alpha -> 0 it is "
                "SampledTokenReverseKL."
            )
        super().__init__(clip_ratio, dual_clip, importance_cap=importance_cap)
        self.alpha = alpha

    def cost(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        """Return (pi(y)^alpha - q(y)^alpha) / alpha, [N]."""
        powers = [torch.expm1(self.alpha * x) for x in (student_logprobs, teacher_logprobs)]
        return (powers[0] - powers[1]) / self.alpha


def discounted_returns(costs: Tensor, row: Tensor, gamma: float) -> Tensor:
    """Return G_t = costs_t + gamma * G_{t+1} within each row (or other chain), [N].

    Works by doubling: after i rounds an entry holds the next 2^i costs, so that a completion of T
    tokens takes log2(T) vector operations.

    Args:
        costs: [N], row by row in time order.
        row: [N] row of each entry.
        gamma: Discount.
    """
    returns, span = costs, 1
    while span < len(costs):
        same_row = row[:-span] == row[span:]
        if not bool(same_row.any()):
            break
        later = torch.where(same_row, returns[span:], 0.0)
        returns = torch.cat([returns[:-span] + gamma**span * later, returns[-span:]])
        span *= 2
    return returns
