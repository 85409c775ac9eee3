"""What decides the memory of a run beside its models: processes, precision, rows and tokens."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from opd_lightning.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """Over which processes a run is spread, and in which precision.

    Attributes:
        world_size: Processes.
        kind: How they share the models: "ddp", each a whole copy; "fsdp", a shard each.
        on_gpu: Whether they compute on GPUs.
        precision: The Trainer's.
        replicas: Copies of the sharded models.
        param_dtype: In which sharded weights of the student are gathered; None: their own.
        reduce_dtype: In which their gradients are averaged; None: `param_dtype`.
        reshard_after_forward: Whether a student's layer is gathered again for the backward pass.
        offload_student: Whether the CPU holds the student's shards, gradients and optimiser states.
        offload_teacher: Whether the CPU holds the teacher's shards.
    """

    world_size: int = 1
    kind: Literal["single", "ddp", "fsdp"] = "single"
    on_gpu: bool = False
    precision: str = "32-true"
    replicas: int = 1
    param_dtype: str | None = None
    reduce_dtype: str | None = None
    reshard_after_forward: bool = True
    offload_student: bool = False
    offload_teacher: bool = False

    @property
    def shards(self) -> int:
        """Over how many processes a weight is split."""
        return self.world_size // self.replicas if self.kind == "fsdp" else 1

    @classmethod
    def of_trainer(cls, trainer: dict[str, Any], gpus: int | None = None) -> "Layout":
        """Return the layout of the Trainer's arguments.

        Args:
            trainer: As in a configuration file.
            gpus: Processes instead of `devices` x `num_nodes`, on GPUs unless the accelerator is
                the CPU.

        Raises:
            ConfigError: If copies do not divide the processes.
        """
        devices = trainer.get("devices", "auto")
        devices = len(devices) if isinstance(devices, list) else devices
        given = int(devices) if str(devices).isdigit() else 1
        world_size = gpus or given * int(trainer.get("num_nodes") or 1)
        accelerator = str(trainer.get("accelerator", "auto"))
        on_gpu = accelerator != "cpu" and (
            gpus is not None or accelerator != "auto" or torch.cuda.is_available()
        )
        strategy = trainer.get("strategy", "auto")
        name, options = strategy, {}
        if not isinstance(strategy, str):
            name, options = strategy["class_path"], dict(strategy.get("init_args") or {})
        sharded = "fsdp" in name.lower() or "ModelParallel" in name
        kind = "fsdp" if sharded else "ddp" if world_size > 1 else "single"
        known = {key: options[key] for key in _SHARDING_OPTIONS if key in options}
        if world_size % known.get("replicas", 1):
            raise ConfigError(
                f"trainer.strategy replicas={known['replicas']} must divide the {world_size} "
                "processes."
            )
        precision = str(trainer.get("precision") or "32-true")
        return cls(world_size, kind, on_gpu, precision, **known)


_SHARDING_OPTIONS = (
    "replicas",
    "param_dtype",
    "reduce_dtype",
    "reshard_after_forward",
    "offload_student",
    "offload_teacher",
)


@dataclass(frozen=True)
class Work:
    """What one rank does in a round, at the most.

    Attributes:
        prompt_tokens: Of the longest prompt.
        teacher_prompt_tokens: Of the longest that the teacher sees.
        completion_tokens: Of the longest completion.
        prompts: Of a round on this rank.
        group: Completions of each.
        mini_batches: Updates of a round.
        micro_batch_tokens: Most rows x tokens of a micro-batch; None: an update is one.
    """

    prompt_tokens: int
    teacher_prompt_tokens: int
    completion_tokens: int
    prompts: int
    group: int
    mini_batches: int = 1
    micro_batch_tokens: int | None = None

    @property
    def length(self) -> int:
        """L, tokens of the longest row."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def rows(self) -> int:
        """Completions of a round."""
        return self.prompts * self.group

    @property
    def update_rows(self) -> int:
        """Completions of an update."""
        return max(1, self.rows // self.mini_batches)

    @property
    def micro_rows(self) -> int:
        """B, rows of the largest micro-batch."""
        if self.micro_batch_tokens is None:
            return self.update_rows
        return min(self.update_rows, max(1, self.micro_batch_tokens // self.length))
