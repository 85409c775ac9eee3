"""The objectives that `opd study landing` follows, with their names in tables and figures."""

from dataclasses import dataclass

from opd_lightning.distributions import Distribution, TokenDistribution
from opd_lightning.objectives import (
    EntropyAware,
    ForwardKL,
    HeadTailReverseKL,
    JensenShannon,
    Mixture,
    Objective,
    PowerOPD,
    ReverseKL,
    SkewReverseKL,
    SupportMass,
    TokenLoss,
    TopKReverseKL,
)
from opd_lightning.records import Rollout


class ForwardTopK(Objective):
    """KL(teacher || student) on the teacher's top K, both renormalised on them.

    Loss: sum over S of q^_v log(q^_v / pi^_v).
    Gradient on z_v: pi^_v - q^_v on S, 0 off it; 0 at pi = q.
    Detached: the teacher, S, the prefix.
    Source: the forward counterpart of TopKReverseKL, for comparison.
    Needs: the teacher's top K.

    Args:
        k: Tokens kept a position.
    """

    needs = "topk"
    target_reason = "the forward KL on S, for comparison in a study"

    def __init__(self, k: int = 3) -> None:
        self.k = k

    def token_loss(
        self, student: TokenDistribution, teacher: Distribution, rollout: Rollout
    ) -> TokenLoss:
        """Return the loss of each position, [N] nats."""
        ids, teacher_logprobs = teacher.topk(self.k)
        log_q = teacher_logprobs.detach().log_softmax(-1)
        log_p = student.logits_at(ids).log_softmax(-1)
        return TokenLoss((log_q.exp() * (log_q - log_p)).sum(-1))


@dataclass(frozen=True)
class Case:
    """One line of the table: a name, what to write in code, and the objective itself."""

    name: str
    setting: str
    objective: Objective


def cases() -> list[Case]:
    """Return the objectives in the order of the table; K is 3, for a vocabulary of 10."""
    return [
        Case("reverse KL", "ReverseKL()", ReverseKL()),
        Case("forward KL", "ForwardKL()", ForwardKL()),
        Case("Jensen-Shannon", "JensenShannon(beta=0.5)", JensenShannon(beta=0.5)),
        Case("skew reverse KL", "SkewReverseKL(alpha=0.1)", SkewReverseKL(alpha=0.1)),
        Case("power", "PowerOPD(alpha=0.5)", PowerOPD(alpha=0.5)),
        # the default width is a step, which here is the forward KL
        Case("entropy-aware", "EntropyAware(width=0.5)", EntropyAware(width=0.5)),
        Case("top-3", "TopKReverseKL(k=3)", TopKReverseKL(k=3)),
        Case("top-3, forward KL", "ForwardTopK(k=3)", ForwardTopK(k=3)),
        Case(
            "student's top-3",
            'TopKReverseKL(k=3, support="student")',
            TopKReverseKL(k=3, support="student"),
        ),
        Case(
            "both top-3",
            'TopKReverseKL(k=3, support="union")',
            TopKReverseKL(k=3, support="union"),
        ),
        # at p = 0.75 the set would be the top 3
        Case(
            "top-p 0.9",
            'TopKReverseKL(k=10, support="top-p", p=0.9)',
            TopKReverseKL(k=10, support="top-p", p=0.9),
        ),
        Case(
            "top-3 and sampled",
            'TopKReverseKL(k=3, support="teacher+sampled")',
            TopKReverseKL(k=3, support="teacher+sampled"),
        ),
        Case(
            "top-3, not renormalised",
            "TopKReverseKL(k=3, renormalize=False, biased_ok=True)",
            TopKReverseKL(k=3, renormalize=False, biased_ok=True),
        ),
        Case(
            "top-3, tail bucket",
            'TopKReverseKL(k=3, tail="bucket")',
            TopKReverseKL(k=3, tail="bucket"),
        ),
        Case(
            "top-3, sampled tail as published",
            'TopKReverseKL(k=3, tail="sampled", detach_log_ratio=False, biased_ok=True)',
            TopKReverseKL(k=3, tail="sampled", detach_log_ratio=False, biased_ok=True),
        ),
        Case("top-3, sampled tail", "HeadTailReverseKL(k=3)", HeadTailReverseKL(k=3)),
        Case(
            "top-3 − 0.1 log π(S)",
            "Mixture([TopKReverseKL(k=3), SupportMass(k=3)], [1.0, 0.1])",
            Mixture([TopKReverseKL(k=3), SupportMass(k=3)], [1.0, 0.1]),
        ),
    ]
