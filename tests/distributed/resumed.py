"""One of W processes that stops in the middle, saves, and goes on from what each job has saved.

python -m tests.distributed.resumed FOLDER RANK W PORT

FOLDER is shared by a job of one process and one of two; each waits for what the other saves.
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from opd_lightning.data import OPDDataModule
from opd_lightning.module import OPDModule
from opd_lightning.policy import PolicySpec
from opd_lightning.strategy import FSDP2Strategy
from tests.distributed.cases import Case
from tests.distributed.job import join, models
from tests.module.harness import QUIET, rollouts

STOP, UPDATES = 2, 4
# name -> processes of the job that saves it, and whether as a folder
SAVED = {"plain": (1, False), "one_file": (2, False), "shards": (2, True)}


def module(folder: Path) -> OPDModule:
    """With a frozen part in front, so that parameters and optimiser count differently."""
    place = models(folder / "models", Case())
    return OPDModule(
        PolicySpec(str(place / "student"), freeze=["embed_tokens"]),
        str(place / "teacher"),
        Case().objective,
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
    )


def fit(folder: Path, processes: int, sharded: bool, steps: int, **options: Any) -> L.Trainer:
    """Train until `steps` updates, from a checkpoint where one is given."""
    two = FSDP2Strategy(save_distributed_checkpoint=sharded)
    trainer = L.Trainer(
        **QUIET
        | {
            "devices": processes,
            "strategy": two if processes == 2 else "auto",
            "max_steps": steps,
            "max_epochs": -1,
        },
        callbacks=[rollouts(12)],
    )
    data = OPDDataModule(str(folder / "prompts.jsonl"), prompts_per_step=4)
    trainer.fit(module(folder), datamodule=data, **options)
    return trainer


def weights(trainer: L.Trainer) -> dict[str, torch.Tensor]:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(trainer.lightning_module.student.model, options=options)


def main(folder: Path, rank: int, processes: int) -> None:
    ends = {"whole": weights(fit(folder, processes, False, UPDATES))}
    for name, (saves, sharded) in SAVED.items():
        if saves == processes:
            trainer = fit(folder, processes, sharded, STOP)
            trainer.save_checkpoint(folder / f"{name}.ckpt")
            trainer.strategy.barrier()
            (folder / f"{name}.done").touch()
    for name in SAVED:
        while not (folder / f"{name}.done").exists():
            time.sleep(0.1)
        trainer = fit(folder, processes, True, UPDATES, ckpt_path=folder / f"{name}.ckpt")
        assert trainer.global_step == UPDATES
        ends[name] = weights(trainer)
    if rank == 0:
        torch.save(ends, folder / f"ends_of_{processes}.pt")


if __name__ == "__main__":
    folder, rank, processes, port = sys.argv[1:]
    join(rank, processes, port)
    main(Path(folder), int(rank), int(processes))
