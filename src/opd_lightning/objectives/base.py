"""The base class of objectives and what they return.

N completion tokens flattened row by row; pi the student's and q the teacher's distribution at each
of them, y the token that the student sampled, z the student's logits. All values in nats.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from opd_lightning.distributions import Distribution, TokenDistribution
from opd_lightning.errors import ConfigError, nearest
from opd_lightning.records import Rollout

Need = Literal["sampled", "topk", "full"]
Target = str | Callable[[Tensor, Tensor], Tensor]


@dataclass
class TokenLoss:
    """What an objective says of each token.

    Attributes:
        loss: [N] with a gradient through the student.
        metrics: Log key -> [N] detached; logged as means over the update's tokens.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class ObjectiveOutput:
    """What one micro-batch contributes.

    Attributes:
        loss: Scalar with a gradient, sum over n of weights_n * loss_n.
        token_loss: [N] detached.
        metrics: Log key -> [N] detached.
    """

    loss: Tensor
    token_loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """A per-token loss between student and teacher; the constructor signature is its configuration.

    Write `token_loss` and set `needs`; the rest follows. A fused version of the weighted sum may
    override `weighted_loss`; it must equal the one given here.

    Attributes:
        needs: What it reads of the teacher: "sampled" (log q(y)), "topk" (the teacher's likeliest
            ids and their log-probabilities, and log q(y)) or "full" (the whole vocabulary).
        on_policy_estimator: True if the gradient is right only in expectation over completions
            drawn from the student's full softmax, so that top-p below 1 biases it.
        target: The divergence whose gradient it follows in expectation, which `opd audit` holds it
            to: a name that the audit knows ("reverse_kl", "forward_kl", "sequence_reverse_kl",
            ...), a function (p [V], q [V]) -> scalar of its own, or None with a `target_reason`.
        target_reason: Why there is no target: what it follows instead.
        variants: Further settings of the constructor that the audit and its documentation show.
    """

    needs: ClassVar[Need] = "full"
    on_policy_estimator: ClassVar[bool] = False
    target: ClassVar[Target | None] = None
    target_reason: ClassVar[str] = ""
    variants: ClassVar[tuple[dict[str, Any], ...]] = ()

    @abstractmethod
    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        """Return the loss of each completion token, [N] nats, gradient through `student` only."""

    def weighted_loss(
        self,
        student: TokenDistribution,
        teacher: Distribution,
        rollout: Rollout,
        weights: Tensor,
    ) -> ObjectiveOutput:
        """Return sum_n weights_n * loss_n; tokens of weight 0 contribute exactly 0."""
        tokens = self.token_loss(student, teacher, rollout)
        loss = torch.where(weights != 0, weights * tokens.loss, 0.0).sum()
        return ObjectiveOutput(loss, tokens.loss.detach(), tokens.metrics)

    def __call__(
        self,
        student: TokenDistribution,
        teacher: Distribution,
        rollout: Rollout,
        weights: Tensor,
    ) -> ObjectiveOutput:
        """Return the weighted loss of one micro-batch.

        Args:
            student: N distributions that carry a gradient.
            teacher: The teacher's at the same positions.
            rollout: The completions, N tokens.
            weights: [N], mask times reduction. Tokens of weight 0 are left out: a NaN or infinity
                of the teacher there reaches neither the loss nor a gradient.

        Raises:
            ConfigError: If the numbers of tokens do not agree.
        """
        sizes = (student.num_tokens, teacher.num_tokens, len(weights), len(rollout.token_ids))
        if len(set(sizes)) != 1:
            raise ConfigError(
                "student, teacher, weights and rollout must have one number of completion tokens; "
                f"got {sizes[0]}, {sizes[1]}, {sizes[2]} and {sizes[3]}."
            )
        teacher = self.without_ignored(student, teacher, rollout, weights == 0)
        return self.weighted_loss(student, teacher, rollout, weights)

    def without_ignored(
        self,
        student: TokenDistribution,
        teacher: Distribution,
        rollout: Rollout,
        ignored: Tensor,
    ) -> Distribution:
        """Return the teacher without non-finite numbers at the tokens that `ignored` [N] marks."""
        return teacher.finite_where_ignored(ignored)

    def finish_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Return what to log of an update; for a number that follows from means and is none itself.

        Args:
            means: Log key -> mean over the update's tokens on all ranks.
        """
        return means

    def describe(self) -> str:
        """Return the class name with its settings, for logs and error messages."""
        settings = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"

    def __repr__(self) -> str:
        return self.describe()


def check_at_least(name: str, value: float, minimum: float, why: str) -> None:
    """Refuse a setting below its minimum.

    Raises:
        ConfigError: If `value` < `minimum`.
    """
    if not value >= minimum:
        raise ConfigError(f"{name} must be at least {minimum}; got {value}. {why}")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Refuse a word that is not among those of the Literal type `choices`.

    Raises:
        ConfigError: With the known words and the nearest.
    """
    known = get_args(choices)
    if value not in known:
        raise ConfigError(
            f"{name} {value!r} is not known.{nearest(value, known)} Known: {', '.join(known)}."
        )


def whole(teacher: Distribution, objective: Objective) -> TokenDistribution:
    """Return the teacher if it gives its whole vocabulary.

    Raises:
        ConfigError: If it does not.
    """
    if not isinstance(teacher, TokenDistribution):
        raise ConfigError(
            f"{objective.describe()} needs the teacher's whole vocabulary; this teacher gives "
            f"{teacher.provides!r}. Take TopKReverseKL, SampledTokenReverseKL or a local teacher."
        )
    return teacher
