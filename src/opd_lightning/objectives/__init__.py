"""Objectives: what "closer to the teacher" means, one file a family, interchangeable by name."""

from opd_lightning.objectives.base import Need, Objective, ObjectiveOutput, TokenLoss
from opd_lightning.objectives.full_vocabulary import ForwardKL, JensenShannon, ReverseKL
from opd_lightning.objectives.registry import known_objectives, resolve_objective
from opd_lightning.objectives.sampled_token import SampledTokenReverseKL, SequenceReverseKL
from opd_lightning.objectives.topk import HeadTailReverseKL, TopKReverseKL

__all__ = [
    "ForwardKL",
    "HeadTailReverseKL",
    "JensenShannon",
    "Need",
    "Objective",
    "ObjectiveOutput",
    "ReverseKL",
    "SampledTokenReverseKL",
    "SequenceReverseKL",
    "TokenLoss",
    "TopKReverseKL",
    "known_objectives",
    "resolve_objective",
]
