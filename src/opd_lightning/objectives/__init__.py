"""Objectives: what "closer to the teacher" means, one file a family, interchangeable by name."""

from opd_lightning.objectives.base import Need, Objective, ObjectiveOutput, Target, TokenLoss
from opd_lightning.objectives.full_vocabulary import (
    EntropyAware,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewReverseKL,
)
from opd_lightning.objectives.mixture import Mixture, OutcomeReward
from opd_lightning.objectives.registry import (
    known_objectives,
    known_terms,
    resolve_objective,
)
from opd_lightning.objectives.sampled_token import (
    PowerOPD,
    SampledTokenReverseKL,
    SequenceReverseKL,
)
from opd_lightning.objectives.topk import HeadTailReverseKL, SupportMass, TopKReverseKL

__all__ = [
    "EntropyAware",
    "ForwardKL",
    "HeadTailReverseKL",
    "JensenShannon",
    "Mixture",
    "Need",
    "Objective",
    "ObjectiveOutput",
    "OutcomeReward",
    "PowerOPD",
    "ReverseKL",
    "SampledTokenReverseKL",
    "SequenceReverseKL",
    "SkewReverseKL",
    "SupportMass",
    "Target",
    "TokenLoss",
    "TopKReverseKL",
    "known_objectives",
    "known_terms",
    "resolve_objective",
]
