"""One of W processes that train every case, and write what each ends with.

python -m tests.distributed.job FOLDER RANK W PORT [NAME ...]
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import GenerationConfig

from opd_lightning.data import OPDDataModule
from opd_lightning.module import OPDModule
from opd_lightning.policy import PolicySpec
from opd_lightning.records import PromptBatch
from opd_lightning.strategy import FSDP2Strategy
from opd_lightning.teachers import LocalTeacher
from opd_lightning.updates import Update
from tests.distributed.cases import Case, cases
from tests.module.harness import QUIET, SMALL, csv_logger, logged, rollouts
from tests.tiny import save_tiny

UPDATES = 5
CLIP = 0.05
ENDS = list(range(1, 300, 9))
SETTINGS = {
    "optimizer": partial(torch.optim.AdamW, lr=3e-3, eps=1e-4),
    "micro_batch_tokens": 64,
    "max_grad_norm": CLIP,
    "metrics_every": 2,
}


class Watched(OPDModule):
    """Keeps what this process drew, and how many of its micro-batches were empty ones."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.drawn: dict[tuple, list[int]] = {}
        self.empty = self.full = 0

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.keep("train", batch)
        super().training_step(batch, batch_idx)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.keep("val", batch)
        super().validation_step(batch, batch_idx)

    def keep(self, stage: str, batch: PromptBatch) -> None:
        rollout = batch.rollout
        group = rollout.num_rows // max(1, batch.num_prompts)
        for row in range(rollout.num_rows):
            key = stage, self.global_step, int(batch.index[row // group]), row % group
            self.drawn[key] = rollout.input_ids[row][rollout.completion_mask[row]].tolist()
        if batch.num_prompts == 0:
            self.drawn[stage, self.global_step, "-", 0] = []

    def plan_updates(self, *args: Any) -> list[Update]:
        updates = super().plan_updates(*args)
        for update in updates:
            empty = sum(part.input_ids.shape[1] == 1 for part in update.micro_batches)
            self.empty += empty
            self.full += len(update.micro_batches) - empty
        return updates


def write(folder: Path) -> None:
    """Write prompts of 1 to 40 letters; three to validate on, two at a time."""
    letters = "abcdefghijklmnopqrstuvwxyz" * 2
    lengths = [1, 33, 7, 15, 2, 40, 11, 3, 21, 5, 9, 1, 17]
    for name, part in (("prompts", lengths), ("val", lengths[:3])):
        rows = [json.dumps({"prompt": letters[n : 2 * n]}) for n in part]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


def models(folder: Path, case: Case) -> Path:
    """Student and teacher of the case, written by whoever comes first."""
    place = folder / f"{case.model}_{'tied' if case.tied else 'untied'}"
    if not place.exists():
        for name, seed in (("student", 1), ("teacher", 2)):
            save_tiny(place / name, case.model, seed, tie_word_embeddings=case.tied, **SMALL)
        # so many end tokens that completions have all lengths
        GenerationConfig(eos_token_id=ENDS, pad_token_id=1).save_pretrained(place / "student")
    return place


def strategy(case: Case, processes: int) -> Any:
    if processes == 1:
        return "auto"
    return FSDP2Strategy(**case.sharding) if case.strategy == "fsdp2" else DDPStrategy()


def run(case: Case, folder: Path, place: Path, processes: int) -> dict[str, Any]:
    """Train and return this process's view of the end."""
    module = Watched(
        PolicySpec(str(place / "student"), **case.student),
        LocalTeacher(str(place / "teacher"), **case.teacher),
        case.objective,
        **SETTINGS | case.settings,
    )
    trainer = L.Trainer(
        **QUIET
        | {
            "devices": processes,
            "strategy": strategy(case, processes),
            "max_steps": UPDATES * module.mini_batches,
            "max_epochs": -1,
            "limit_val_batches": 2,
            "val_check_interval": 4,
            "check_val_every_n_epoch": None,
            "logger": csv_logger(folder),
        },
        callbacks=[rollouts(12, num_generations=2)],
    )
    prompts = str(folder.parent / "prompts.jsonl")
    data = OPDDataModule(
        prompts, val=str(folder.parent / "val.jsonl"), prompts_per_step=4, eval_prompts_per_step=2
    )
    trainer.fit(module, datamodule=data)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        "weights": get_model_state_dict(module.student.model, options=options),
        "drawn": module.drawn,
        "micro_batches": (module.full, module.empty),
        "lines": logged(folder) if trainer.is_global_zero else [],
        "held": sum(p.to_local().numel() for p in module.student.parameters())
        if case.strategy == "fsdp2" and processes > 1
        else 0,
    }


def main(folder: Path, rank: int, processes: int, names: list[str]) -> None:
    chosen = {name: case for name, case in cases().items() if not names or name in names}
    ends = {}
    for number, (name, case) in enumerate(chosen.items()):
        started = time.perf_counter()
        place = models(folder / "models", case)
        ends[name] = run(case, folder / f"run{number}", place, processes)
        if rank == 0:
            print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
    torch.save(ends, folder / f"rank{rank}.pt")


def join(rank: str, processes: str, port: str) -> None:
    """Tell Lightning that this process is one of several on this machine."""
    if processes != "1":
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {"LOCAL_RANK": rank, "NODE_RANK": "0", **address}


if __name__ == "__main__":
    folder, rank, processes, port, *names = sys.argv[1:]
    join(rank, processes, port)
    main(Path(folder), int(rank), int(processes), names)
