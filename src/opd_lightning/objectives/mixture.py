"""Several losses at once: a weighted sum of objectives, and the outcome reward as one of them."""

from collections.abc import Sequence

from torch import Tensor

from opd_lightning.distributions import Distribution, TokenDistribution
from opd_lightning.errors import ConfigError
from opd_lightning.objectives.base import Need, Objective, ObjectiveOutput, TokenLoss
from opd_lightning.objectives.full_vocabulary import ForwardKL, ReverseKL
from opd_lightning.objectives.topk import SupportMass, TopKReverseKL
from opd_lightning.records import Rollout

_NEEDS: tuple[Need, ...] = ("sampled", "topk", "full")


class OutcomeReward(Objective):
    """The outcome reward of a completion as a term beside a distillation loss: REINFORCE.

    Loss: -R log pi(y), R the rollout's reward of the row.
    Gradient on z_v: R (pi_v - 1[v = y]). Summed over a row, in expectation the gradient of -E[R].
    Detached: R, the prefix.
    Source: arXiv 2603.25562's code, `reward_weight`: A + w R in a Mixture with coefficient w.
    Needs: nothing of the teacher (listed as "sampled", the least there is). Biased with top-p < 1.
    Choose: as a small term of a Mixture, where completions can be checked.

    No baseline and no group normalisation: it is a term, not a reinforcement learner.
    """

    needs = "sampled"
    on_policy_estimator = True
    target = "expected_reward"

    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        """Return -R log pi(y) of each sampled token, [N].

        Raises:
            ConfigError: If the rollout has no rewards.
        """
        if rollout.reward is None:
            raise ConfigError(
                "OutcomeReward needs the reward of each completion; this rollout has none (reward: "
                "None). Take a task with a verifier, or leave OutcomeReward out."
            )
        reward = rollout.reward[rollout.row].detach()
        return TokenLoss(-reward * student.logprobs(rollout.token_ids))


class Mixture(Objective):
    """A weighted sum of objectives, each with its own needs, by configuration alone.

    Loss: sum_i c_i loss_i.
    Gradient on z_v: sum_i c_i gradient_i; it follows the same sum of the terms' divergences.
    Detached: what each term detaches.
    Source: docs/mathematics.md, section 8; with OutcomeReward the paper code's `reward_weight`.
    Needs: the most that one of its terms needs.
    Choose: to add a small term to an objective: SupportMass, OutcomeReward, a second divergence.

    The terms' metrics keep their keys (of two with one key, the first term's), and each term's mean
    loss is `loss/<term>`, before its coefficient.

    Args:
        objectives: The terms; default ReverseKL and ForwardKL.
        coefficients: A finite factor for each, not 0; default: shares of 1.

    Raises:
        ConfigError: If there are no terms, not as many coefficients, or one is 0 or not finite.
    """

    variants = (
        {"objectives": [TopKReverseKL(k=3), SupportMass(k=3)], "coefficients": [1.0, 0.1]},
        {"objectives": [ReverseKL(), OutcomeReward()], "coefficients": [1.0, 0.1]},
    )

    def __init__(
        self,
        objectives: Sequence[Objective] | None = None,
        coefficients: Sequence[float] | None = None,
    ) -> None:
        objectives = [ReverseKL(), ForwardKL()] if objectives is None else list(objectives)
        if coefficients is None:
            coefficients = [1 / max(1, len(objectives))] * len(objectives)
        if not objectives or len(objectives) != len(coefficients):
            raise ConfigError(
                f"Mixture takes one coefficient for each of its objectives; got {len(objectives)} "
                f"objectives and coefficients {list(coefficients)}."
            )
        if bad := [c for c in coefficients if c == 0 or c != c or abs(c) == float("inf")]:
            raise ConfigError(
                f"Mixture's coefficients must be finite and not 0; got {bad}. Leave such a term "
                "out."
            )
        self.objectives = objectives
        self.coefficients = list(coefficients)

    @property
    def needs(self) -> Need:
        """The most that one of the terms needs."""
        return max((term.needs for term in self.objectives), key=_NEEDS.index)

    @property
    def on_policy_estimator(self) -> bool:
        """Whether one of the terms is."""
        return any(term.on_policy_estimator for term in self.objectives)

    @property
    def uses_old_logprobs(self) -> bool:
        """Whether one of the terms does."""
        return any(getattr(term, "uses_old_logprobs", False) for term in self.objectives)

    @property
    def target(self) -> str | None:
        """The same sum of the terms' targets, where each has one."""
        return None if self.target_reason else "mixture"

    @property
    def target_reason(self) -> str:
        """The reason of the terms that follow no divergence."""
        return "; ".join(term.target_reason for term in self.objectives if term.target is None)

    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        """Return the weighted sum of the terms' losses, [N]."""
        parts = [term.token_loss(student, teacher, rollout) for term in self.objectives]
        weighted = [c * part.loss for c, part in zip(self.coefficients, parts, strict=True)]
        losses = [part.loss.detach() for part in parts]
        return TokenLoss(sum(weighted), self._metrics(losses, [part.metrics for part in parts]))

    def __call__(
        self,
        student: TokenDistribution,
        teacher: Distribution,
        rollout: Rollout,
        weights: Tensor,
    ) -> ObjectiveOutput:
        """Return the weighted sum of the terms' outputs, each by its own fused path."""
        parts = [
            term(student, teacher, rollout, c * weights)
            for c, term in zip(self.coefficients, self.objectives, strict=True)
        ]
        losses = [part.token_loss for part in parts]
        return ObjectiveOutput(
            loss=sum(part.loss for part in parts),
            token_loss=sum(c * loss for c, loss in zip(self.coefficients, losses, strict=True)),
            metrics=self._metrics(losses, [part.metrics for part in parts]),
        )

    def finish_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Let each term finish its own."""
        for term in self.objectives:
            means = term.finish_metrics(means)
        return means

    def _metrics(
        self, losses: list[Tensor], of_terms: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the terms' metrics and `loss/<term>`; of two with one key the first stays."""
        metrics: dict[str, Tensor] = {}
        for term, loss, own in zip(self.objectives, losses, of_terms, strict=True):
            metrics = {f"loss/{type(term).__name__}": loss} | own | metrics
        return metrics
