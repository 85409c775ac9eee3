"""The interface of rollout engines."""

from abc import ABC, abstractmethod

from opd_lightning.policy import CausalPolicy
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.rollout.sampling import SamplingConfig


class RolloutEngine(ABC):
    """Samples completions from a policy."""

    @abstractmethod
    def generate(
        self, policy: CausalPolicy, prompts: PromptBatch, sampling: SamplingConfig, seed: int
    ) -> Rollout:
        """Return `num_generations` completions of each prompt, siblings together, prompts in order.

        The tokens are a function of (weights, prompt, seed, completion number) alone: not of batch
        composition, order or number of ranks (ties of float rounding aside).

        Args:
            policy: The student.
            prompts: P prompts.
            sampling: How to draw.
            seed: Of the round.
        """
