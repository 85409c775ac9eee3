"""Which prompts a rank gets in which round, from seed, position, rank and world size alone."""

import hashlib
from abc import ABC, abstractmethod

import torch

from opd_lightning.errors import ConfigError


class Rounds(ABC):
    """The rounds of a split, seen from one rank; `len` is the number of rounds of an epoch."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def indices(self, position: int) -> list[int]:
        """Return this rank's part of round `position`, 0-based rows of the table."""


class TrainRounds(Rounds):
    """Full rounds without end: epoch e goes through its own permutation of the prompts.

    The `num_prompts % prompts_per_step` prompts that an epoch's permutation has left over sit that
    epoch out. Rank k of W takes every W-th prompt of a round from the k-th on: for every W the
    round is the same set of prompts, and so is each of its equal consecutive parts (mini-batches).

    Args:
        num_prompts: Prompts of the split.
        prompts_per_step: Prompts of a round over all ranks.
        seed: Chooses the permutations.
        shuffle: False for file order in every epoch.
        rank: This rank, 0 <= rank < world_size.
        world_size: Number of ranks that get different prompts.

    Raises:
        ConfigError: If `prompts_per_step` is not a multiple of `world_size` or exceeds
            `num_prompts`.
    """

    def __init__(
        self,
        num_prompts: int,
        prompts_per_step: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if prompts_per_step % world_size:
            raise ConfigError(
                f"data.prompts_per_step={prompts_per_step} cannot be shared equally by "
                f"{world_size} ranks. Give a multiple of {world_size}, for example "
                f"{-(-prompts_per_step // world_size) * world_size}."
            )
        if prompts_per_step > num_prompts:
            raise ConfigError(
                f"data.prompts_per_step={prompts_per_step} but the training data has {num_prompts} "
                "prompts (dropped ones left out). Lower it or give more prompts."
            )
        self.num_prompts = num_prompts
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self._order: tuple[int, list[int]] | None = None  # the epoch used last and its permutation

    def __len__(self) -> int:
        return self.num_prompts // self.prompts_per_step

    def indices(self, position: int) -> list[int]:
        """Return this rank's part of round `position`, counted over all epochs."""
        epoch, round_of_epoch = divmod(position, len(self))
        start = round_of_epoch * self.prompts_per_step
        stop = start + self.prompts_per_step
        return self._permutation(epoch)[start + self.rank : stop : self.world_size]

    def _permutation(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.num_prompts))
        if self._order is None or self._order[0] != epoch:
            # hashed, so that (seed 0, epoch 1) and (seed 1, epoch 0) have nothing in common
            digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
            self._order = epoch, torch.randperm(self.num_prompts, generator=generator).tolist()
        return self._order[1]


class EvalRounds(Rounds):
    """Every prompt once, in file order; all ranks have the same number of rounds.

    Ranks take consecutive runs of a round that differ by at most one prompt in length; a rank may
    have none where a round, usually the last, has fewer prompts than there are ranks.

    Args:
        num_prompts: Prompts of the split.
        prompts_per_step: Prompts of a round over all ranks; the last may have fewer.
        rank: This rank, 0 <= rank < world_size.
        world_size: Number of ranks that get different prompts.
    """

    def __init__(
        self, num_prompts: int, prompts_per_step: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_prompts = num_prompts
        self.prompts_per_step = prompts_per_step
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-self.num_prompts // self.prompts_per_step)

    def indices(self, position: int) -> list[int]:
        """Return this rank's part of round `position`, possibly empty."""
        first = position * self.prompts_per_step
        size = min(self.prompts_per_step, self.num_prompts - first)
        start = first + size * self.rank // self.world_size
        stop = first + size * (self.rank + 1) // self.world_size
        return list(range(start, stop))
