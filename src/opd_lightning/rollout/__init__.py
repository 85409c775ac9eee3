"""Rollouts: the student answers the prompts of a round itself."""

from opd_lightning.rollout.callback import RolloutCallback
from opd_lightning.rollout.engine import RolloutEngine
from opd_lightning.rollout.sampling import SamplingConfig
from opd_lightning.rollout.transformers_engine import TransformersEngine

__all__ = ["RolloutCallback", "RolloutEngine", "SamplingConfig", "TransformersEngine"]
