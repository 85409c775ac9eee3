"""The base class of teachers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd_lightning.distributions import Distribution
from opd_lightning.distributions.base import Provides
from opd_lightning.records import Rollout
from opd_lightning.sharding import Sharding

T = TypeVar("T")


class Teacher(ABC):
    """Scores rollouts; never in the optimiser and never in a checkpoint.

    Attributes:
        provides: What its distributions can answer: "sampled", "topk" or "full".
    """

    provides: Provides = "full"

    @abstractmethod
    def check(self) -> None:
        """Refuse what can be refused before anything is loaded.

        Raises:
            ConfigError: If the teacher cannot be reached or read.
        """

    @abstractmethod
    def load_tokenizer(self) -> Tokenizer | None:
        """Return the teacher's tokenizer, or None where it is not known."""

    @abstractmethod
    def vocab_size(self) -> int:
        """Return the rows of the teacher's head, before anything is cut."""

    @abstractmethod
    def load(self, device: torch.device, vocab_size: int, sharding: Sharding | None = None) -> None:
        """Load the weights onto `device`; only the first `vocab_size` ids will be read.

        Called again before each stage. `sharding` says over which processes the weights are sharded
        and how; None: each process holds all of them.
        """

    @abstractmethod
    def read(
        self, rollout: Rollout, reader: Callable[[Distribution], T], temperature: float = 1.0
    ) -> T:
        """Return `reader(distribution)` for the rollout's N completion tokens, no gradient.

        Args:
            rollout: B rows; where the teacher sees another prompt, its own ids are read.
            reader: Called once, inside the teacher's forward.
            temperature: Divides the logits.
        """
