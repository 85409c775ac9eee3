"""Objectives that compare student and teacher on the sampled token only (score functions)."""

import torch
from torch import Tensor

from opd_lightning.distributions import Distribution, TokenDistribution, TopKDistribution
from opd_lightning.errors import ConfigError
from opd_lightning.objectives.base import Objective, TokenLoss, check_at_least
from opd_lightning.records import Rollout


class SampledTokenReverseKL(Objective):
    """Token-level on-policy distillation: REINFORCE with the teacher's log-ratio as advantage.

    Loss: -sg[A] log pi(y), A = log q(y) - log pi(y); not whitened, no baseline.
    Gradient on z_v: A (pi_v - 1[v = y]). Its expectation over y ~ pi is pi_v (log(pi_v / q_v) -
    KL(pi || q)), exactly ReverseKL's with the prefix held fixed. At pi = q every A is 0, and so is
    the gradient of each sample.
    Detached: A, the teacher, the prefix.
    Source: arXiv 2603.25562, sampled-token OPD; docs/mathematics.md, section 1.
    Needs: the sampled token's log-probability. Biased where completions are drawn with top-p < 1:
    tokens outside the nucleus are never seen.

    With `clip_ratio` the loss is PPO's, for several updates on one rollout: rho = pi(y) /
    pi_old(y), A taken with pi_old, loss max(-A rho, -A clip(rho, 1 - c, 1 + c)), and at most
    -`dual_clip` A where A < 0. Its gradient is REINFORCE's times rho, and 0 where the clip holds.
    pi_old are the rollout's `old_logprobs`; without them pi_old = sg[pi], as in a first update.

    Args:
        clip_ratio: PPO's clip range c > 0, in the paper 0.2; None: no ratio and no clip.
        dual_clip: Bound on the loss where A < 0, as a multiple of -A, at least 1, in the paper 3;
            goes with `clip_ratio`.
        log_ratio_clamp: Bound on the absolute value of A in nats, > 0; None: unbounded, as in the
            paper's runs. A bound biases the gradient wherever it acts.

    Raises:
        ConfigError: If a bound is out of its range, or `dual_clip` comes without `clip_ratio`.
    """

    needs = "sampled"
    on_policy_estimator = True

    def __init__(
        self,
        clip_ratio: float | None = None,
        dual_clip: float | None = None,
        log_ratio_clamp: float | None = None,
    ) -> None:
        for name, bound in [("clip_ratio", clip_ratio), ("log_ratio_clamp", log_ratio_clamp)]:
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
        self.clip_ratio = clip_ratio
        self.dual_clip = dual_clip
        self.log_ratio_clamp = log_ratio_clamp

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
        old_logprobs = rollout.flat_old_logprobs if self.uses_old_logprobs else None
        if old_logprobs is None:
            old_logprobs = student_logprobs.detach()
        costs = old_logprobs - teacher_logprobs
        if self.log_ratio_clamp is not None:
            costs = costs.clamp(-self.log_ratio_clamp, self.log_ratio_clamp)
        advantages = -self.credit(costs, rollout)
        metrics = {
            "kl/reverse_k1": costs,
            "advantage/mean": advantages,
            "advantage/negative_frac": (advantages < 0).to(costs.dtype),
        }
        if self.clip_ratio is None:
            return TokenLoss(-advantages * student_logprobs, metrics)
        ratio = (student_logprobs - old_logprobs).exp()
        return self._clipped(ratio, advantages, metrics)

    def without_ignored(
        self,
        student: TokenDistribution,
        teacher: Distribution,
        rollout: Rollout,
        ignored: Tensor,
    ) -> TopKDistribution:
        """Return the teacher's sampled tokens; an ignored one that is not finite gets cost 0.

        The other ids are left out: filling an impossible one of an ignored position would change
        log q(y) there, and with it the cost that earlier tokens of the row may answer for.
        """
        own = rollout.flat_old_logprobs if self.uses_old_logprobs else None
        if own is None:
            own = student.logprobs(rollout.token_ids).detach()
        sampled = teacher.logprobs(rollout.token_ids).detach()
        sampled = torch.where(ignored & ~sampled.isfinite(), own, sampled)
        return TopKDistribution(rollout.token_ids[:, None], sampled[:, None], sampled)

    def credit(self, costs: Tensor, rollout: Rollout) -> Tensor:
        """Return what each token answers for, [N] nats: here its own cost log pi(y) - log q(y)."""
        return costs

    def _clipped(self, ratio: Tensor, advantages: Tensor, metrics: dict[str, Tensor]) -> TokenLoss:
        unclipped = -advantages * ratio
        clipped = -advantages * ratio.clamp(1 - self.clip_ratio, 1 + self.clip_ratio)
        loss = torch.maximum(unclipped, clipped)
        metrics["loss/ratio_clipped_frac"] = (clipped > unclipped).detach().to(ratio.dtype)
        if self.dual_clip is not None:
            bound = -self.dual_clip * advantages
            bounded = (advantages < 0) & (loss > bound)
            loss = torch.where(bounded, bound, loss)
            metrics["loss/ratio_dual_clipped_frac"] = bounded.detach().to(ratio.dtype)
        return TokenLoss(loss, metrics)


class SequenceReverseKL(SampledTokenReverseKL):
    """Sequence-level reverse KL: each token answers for its own cost and the later ones.

    Loss: sg[G_t] log pi(y_t), G_t = r_t + gamma G_{t+1}, r_t = log pi(y_t) - log q(y_t), over the
    completion tokens of a row; tokens of other speakers are skipped, they do not reset G.
    Gradient on z_v: G_t (1[v = y_t] - pi_v). Summed over a row and with gamma = 1 its expectation
    is the gradient of KL(pi(.|x) || q(.|x)) of whole completions; with gamma = 0 it is
    SampledTokenReverseKL. At pi = q every r is 0, and so is the gradient of each sample.
    Detached: G, the teacher, the prefix.
    Source: arXiv 2603.25562, sequence-level reverse KL; docs/mathematics.md, section 2.
    Needs: the sampled token's log-probability.

    The theory sums over t: pair it with the reduction seq-mean-token-sum; a token mean divides by
    the length. The variance grows about as T^3 for gamma = 1 and as T for gamma = 0. A token of
    weight 0 (a masked special token) still hands its cost to the earlier ones, unless that cost is
    not finite; `log_ratio_clamp` bounds it.

    Args:
        gamma: Discount of later costs, from 0 to 1.
        clip_ratio: As in SampledTokenReverseKL.
        dual_clip: As in SampledTokenReverseKL.
        log_ratio_clamp: Bound on the absolute value of each r_t in nats.

    Raises:
        ConfigError: If `gamma` is not within [0, 1], or as SampledTokenReverseKL.
    """

    def __init__(
        self,
        gamma: float = 1.0,
        clip_ratio: float | None = None,
        dual_clip: float | None = None,
        log_ratio_clamp: float | None = None,
    ) -> None:
        super().__init__(clip_ratio, dual_clip, log_ratio_clamp)
        if not 0 <= gamma <= 1:
            raise ConfigError(f"gamma must lie within 0 and 1; got {gamma}. 0 is token-level.")
        self.gamma = gamma

    def credit(self, costs: Tensor, rollout: Rollout) -> Tensor:
        """Return the discounted sum of a token's own and later costs in its row, [N] nats."""
        return discounted_returns(costs, rollout.row, self.gamma)


def discounted_returns(costs: Tensor, row: Tensor, gamma: float) -> Tensor:
    """Return G_t = costs_t + gamma * G_{t+1} within each row, [N].

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
