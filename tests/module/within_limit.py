"""Trains a model of 20 M parameters under a memory limit; prints what was chosen and the peaks.

python -m tests.module.within_limit FOLDER LIMIT_GB
"""

import json
import sys
import zlib
from functools import partial
from pathlib import Path

import torch

from opd_lightning import memory
from opd_lightning.module import OPDModule
from opd_lightning.objectives import ReverseKL
from tests.module.harness import answered, fit
from tests.tiny import save_tiny

LONGEST = 192
SHAPE = {
    "vocab_size": 8000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "max_position_embeddings": LONGEST,
}


class Watched(OPDModule):
    """Notes whether the search left anything behind, and the peak from its end on."""

    def on_fit_start(self) -> None:
        before = self._state()
        super().on_fit_start()
        self.untouched = self._state() == before and all(p.grad is None for p in self.parameters())
        memory.peak_bytes(self.device, lambda: None)

    def on_train_end(self) -> None:
        self.peak = memory._status("/proc/self/status", "VmHWM")

    def _state(self) -> list[int]:
        """Checksums: a copy of the weights would count."""
        tensors = [torch.random.get_rng_state(), *self.student.state_dict().values()]
        return [zlib.crc32(tensor.numpy()) for tensor in tensors]


def main(folder: Path, limit_gb: float) -> None:
    student = save_tiny(folder / "student", num_hidden_layers=8, **SHAPE)
    save_tiny(folder / "teacher", num_hidden_layers=1, **SHAPE)
    parameters = sum(p.numel() for p in student.parameters())
    del student
    full = [answered([LONGEST - 3] * 8, seed, prompt_lengths=[3]) for seed in (0, 1)]
    uneven = answered([180, 90, 60, 40, 40, 30, 20, 20, 10, 5, 5, 2], 2)
    model = Watched(
        str(folder / "student"),
        str(folder / "teacher"),
        ReverseKL(),
        optimizer=partial(torch.optim.AdamW, lr=1e-4),
        micro_batch_tokens="auto",
        memory_limit_gb=limit_gb,
    )
    trainer = fit(model, [*full, uneven])
    budget = model.micro_batch_tokens
    rows = -(-2 * budget // LONGEST)
    twice = model._peak_of(rows, LONGEST)
    print(
        json.dumps(
            {
                "parameters": parameters,
                "budget": budget,
                "steps": trainer.global_step,
                "untouched": model.untouched,
                "peak_gb": model.peak / 1e9,
                "peak_of_twice_gb": twice / 1e9,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
