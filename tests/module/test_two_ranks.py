"""Two real processes train and measure as one does."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from opd_lightning.module import OPDModule
from opd_lightning.objectives import ReverseKL
from opd_lightning.records import PromptBatch
from opd_lightning.weighting import ReductionName
from tests.module.harness import QUIET, answered, csv_logger, distance, logged, module, weights
from tests.module.test_evaluation import nothing

LENGTHS = (9, 2, 7, 0)  # 11 tokens in 2 rows for the first rank, 7 in 1 row for the second


class Share(IterableDataset):
    """The rows of each round that belong to this rank."""

    def __init__(self, rounds: list[PromptBatch], parts: list[list[int]]) -> None:
        self.rounds, self.parts = rounds, parts

    def __iter__(self) -> Iterator[PromptBatch]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        rows = self.parts[rank]
        for batch in self.rounds:
            mine = nothing()
            if rows:
                ids = [batch.unpadded()[row] for row in rows]
                mine = PromptBatch.from_token_ids(ids)
                mine.rollout = batch.rollout.select_rows(torch.tensor(rows))
            yield mine


class Kept(L.Callback):
    """Writes the first rank's weights, since the processes end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: OPDModule) -> None:
        if trainer.is_global_zero:
            torch.save(weights(pl_module), self.path)


def forked() -> DDPStrategy:
    """Of processes that give up on each other after a while."""
    return DDPStrategy(start_method="fork", timeout=timedelta(seconds=20))


def ended(models: Path, folder: Path, ranks: int, **settings: object) -> dict[str, Tensor]:
    """Two rounds on `ranks` processes, with validation: one rank has no prompt there."""
    parts = [[0, 1], [2, 3]] if ranks == 2 else [[0, 1, 2, 3]]
    rounds = [answered(LENGTHS, seed=i) for i in range(2)]
    held_out = [answered((4, 6), seed=7)]
    model = module(models, settings.pop("objective", ReverseKL()), "float64", **settings)
    model.configure_model()  # Lightning copies the weights back into this process
    trainer = L.Trainer(
        **QUIET
        | {
            "devices": ranks,
            "strategy": forked() if ranks > 1 else "auto",
            "max_epochs": 1,
            "num_sanity_val_steps": -1,
            "logger": csv_logger(folder),
        },
        callbacks=[Kept(folder / "weights.pt")],
    )
    trainer.fit(
        model,
        DataLoader(Share(rounds, parts), batch_size=None),
        DataLoader(Share(held_out, [[], [0, 1]] if ranks == 2 else [[0, 1]]), batch_size=None),
    )
    return torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.parametrize("reduction", ReductionName.__args__)
def test_two_ranks_end_where_one_does(models: Path, tmp_path: Path, reduction: str):
    settings = {"reduction": reduction, "micro_batch_tokens": 12}
    one = ended(models, tmp_path / "one", 1, **settings)
    two = ended(models, tmp_path / "two", 2, **settings)
    assert distance(two, one) < 1e-12
    keys = ("loss", "kl/reverse", "grad_norm", "completions/tokens", "completions/mean_length")
    for alone, shared in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert alone.keys() == shared.keys()
        held_out = [key for key in alone if key.startswith("val/")]
        for key in [key for key in keys if key in alone] + held_out:
            assert shared[key] == pytest.approx(alone[key], rel=1e-5), key
