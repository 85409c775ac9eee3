"""Loaders that Lightning takes as they are.

They wrap a `DataLoader` instead of being one: Lightning replaces the sampler of a `DataLoader`
under a distributed strategy and for prediction, and leaves any other iterable alone.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from opd_lightning.data.rounds import EvalRounds, Rounds, TrainRounds
from opd_lightning.data.table import PromptTable
from opd_lightning.errors import ConfigError
from opd_lightning.records import PromptBatch


class EvalLoader:
    """All rounds of an evaluation split, from the first, each time it is iterated.

    Args:
        table: The prompts.
        rounds: Which of them this rank gets when.
        num_workers: Processes that collate; 0 for none.
    """

    def __init__(self, table: PromptTable, rounds: EvalRounds, num_workers: int = 0) -> None:
        self.table = table
        self.rounds = rounds
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.rounds)

    def __iter__(self) -> Iterator[PromptBatch]:
        yield from _load(self.table, self.rounds, 0, self.num_workers)


class TrainLoader:
    """Training rounds from where the last iteration stopped; the place is saved and restored.

    An iteration gives `len(loader)` rounds, as many as an epoch has, from `position` on. So the
    second one continues with the next epoch's permutation, and one that was left early (or
    restored) in the middle of an epoch runs into the next epoch; Lightning, which counts batches,
    stops it at its border. `position` counts the rounds handed out, not those that worker processes
    have fetched ahead.

    Args:
        table: The prompts.
        rounds: Which of them this rank gets when.
        num_workers: Processes that collate; 0 for none.

    Attributes:
        position: Number of rounds handed out since the start of training.
    """

    def __init__(self, table: PromptTable, rounds: TrainRounds, num_workers: int = 0) -> None:
        self.table = table
        self.rounds = rounds
        self.num_workers = num_workers
        self.position = 0

    def __len__(self) -> int:
        # Finite on purpose: of a loader without length Lightning fetches one batch ahead, and
        # the saved position would be one too far.
        return len(self.rounds)

    def __iter__(self) -> Iterator[PromptBatch]:
        # A generator: Lightning makes iterators that it never uses, and they must not move the
        # position.
        for batch in _load(self.table, self.rounds, self.position, self.num_workers):
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position, and what gives it its meaning; the same on all ranks."""
        return {
            "position": self.position,
            "num_prompts": self.rounds.num_prompts,
            "prompts_per_step": self.rounds.prompts_per_step,
            "seed": self.rounds.seed,
            "shuffle": int(self.rounds.shuffle),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved position.

        Raises:
            ConfigError: If the number of prompts, `prompts_per_step`, the seed or `shuffle` is
                another one.
        """
        own = self.state_dict()
        changed = [name for name in own if name != "position" and state.get(name) != own[name]]
        if changed:
            was = ", ".join(f"{name}={state.get(name)}" for name in changed)
            now = ", ".join(f"{name}={own[name]}" for name in changed)
            raise ConfigError(
                f"The checkpoint's place in the data belongs to {was}, this run has {now}. Resume "
                "with the data settings of the checkpoint, or start a new run from its weights."
            )
        self.position = state["position"]


def _load(
    table: PromptTable, rounds: Rounds, first: int, num_workers: int
) -> Iterator[PromptBatch]:
    # The own generator keeps DataLoader from drawing its workers' seed from torch's global state,
    # which a resumed run would do once more than an uninterrupted one.
    return iter(
        DataLoader(
            table,
            batch_sampler=[rounds.indices(first + i) for i in range(len(rounds))],
            collate_fn=table.collate,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(0),
        )
    )
