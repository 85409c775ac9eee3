"""A rollout engine with which something happens, on one rank, in one round."""

import os
import signal
import time
from pathlib import Path
from typing import Literal

from opd_lightning.policy import CausalPolicy
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.rollout import SamplingConfig, TransformersEngine


class Faulty(TransformersEngine):
    """Generates, but first does `fault` in the training round that begins at `step`.

    Args:
        fault: "raise" an error; "kill" this process; "wait" until the file `folder/release` is
            there, and write `folder/waiting_RANK`.
        step: Optimiser steps made before; the run's seed must be 0.
        rank: Where.
        others_wait: Whether the other ranks wait meanwhile, outside of any collective.
        folder: See "wait".
    """

    def __init__(
        self,
        fault: Literal["raise", "kill", "wait"],
        step: int,
        rank: int = 0,
        others_wait: bool = False,
        folder: str = "",
    ) -> None:
        super().__init__()
        self.fault = fault
        self.step = step
        self.rank = rank
        self.others_wait = others_wait
        self.folder = Path(folder)

    def generate(
        self, policy: CausalPolicy, prompts: PromptBatch, sampling: SamplingConfig, seed: int
    ) -> Rollout:
        """Do it, then generate."""
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        if seed == self.step and rank == self.rank:
            if self.fault == "raise":
                raise ValueError("the sampler has broken down")
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        if seed == self.step and (self.others_wait if rank != self.rank else self.fault == "wait"):
            (self.folder / f"waiting_{rank}").touch()
            while not (self.folder / "release").exists():
                time.sleep(0.05)
        return super().generate(policy, prompts, sampling, seed)
