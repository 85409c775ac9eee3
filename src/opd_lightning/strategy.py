"""FSDP2 as a Lightning strategy, whose options say how OPDModule shards its models."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from opd_lightning.checkpoints import is_sharded, named, numbered
from opd_lightning.errors import ConfigError
from opd_lightning.sharding import ComputeDType, Sharding


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy, with all processes sharing data and shards.

    OPDModule shards student and teacher a decoder layer at a time, by these options.

    Args:
        replicas: Copies of the sharded models (HSDP): 1 shards over all processes; the number of
            nodes shards within each node. Divides the number of processes.
        param_dtype: In which the student's weights are gathered and used; None: their own. The
            teacher's is `LocalTeacher.dtype`.
        reduce_dtype: In which its gradients are averaged; None: `param_dtype`.
        reshard_after_forward: Whether a student's layer is gathered again for the backward pass:
            less memory, more traffic.
        offload_student: Keep the student's shards, gradients and optimiser state in the CPU's
            memory.
        offload_teacher: Keep the teacher's shards there.
        save_distributed_checkpoint: Write a checkpoint as a folder, each process its shards; False:
            one file, gathered on rank 0.
        process_group_backend: Of torch.distributed; default nccl on GPUs, gloo on CPUs.
        timeout_minutes: After which a collective that not all processes entered fails.
    """

    def __init__(
        self,
        replicas: int = 1,
        param_dtype: ComputeDType | None = None,
        reduce_dtype: ComputeDType | None = None,
        reshard_after_forward: bool = True,
        offload_student: bool = False,
        offload_teacher: bool = False,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )
        if replicas < 1:
            raise ConfigError(f"replicas must be at least 1; got {replicas}.")
        self.replicas = replicas
        self._options: dict[str, Any] = {
            "param_dtype": param_dtype,
            "reduce_dtype": reduce_dtype,
            "reshard_after_forward": reshard_after_forward,
            "offload_student": offload_student,
            "offload_teacher": offload_teacher,
        }
        self.sharding: Sharding | None = None

    def setup_environment(self) -> None:
        """Start the processes' group and lay out the meshes.

        Raises:
            ConfigError: If `replicas` does not divide the number of processes.
        """
        world_size = self.num_nodes * self.num_processes
        if world_size % self.replicas:
            raise ConfigError(
                f"trainer.strategy replicas={self.replicas} must divide the {world_size} processes."
            )
        self._data_parallel_size, self._tensor_parallel_size = world_size, 1
        super().setup_environment()
        mesh = self.device_mesh["data_parallel"]
        if self.replicas > 1:
            mesh = init_device_mesh(
                self.root_device.type,
                (self.replicas, world_size // self.replicas),
                mesh_dim_names=("replicate", "shard"),
            )
        self.sharding = Sharding(mesh, self.root_device, **self._options)

    def model_to_device(self) -> None:
        """Move what is not sharded; offloaded shards stay where they are."""
        if not self.sharding.offload_student:
            super().model_to_device()
            return
        self.lightning_module._device = self.root_device

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimiser's state; for one file as a run on one device writes it, rank 0's."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        return numbered(state) if self.is_global_zero else {}

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file or a folder of shards, of any number of processes; always `weights_only`."""
        path = Path(self.broadcast(checkpoint_path))
        if is_sharded(path):
            return super().load_checkpoint(path, weights_only=True)
        # mapped, not read: of each tensor rank 0 reads what it hands out
        saved = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        strict = self.lightning_module.strict_loading
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
        weights = saved.pop("state_dict")
        set_model_state_dict(self.model, weights if self.is_global_zero else {}, options=options)
        for optimizer, state in zip(
            self.optimizers, saved.pop("optimizer_states", []), strict=False
        ):
            by_name = named(state, self.model, optimizer)
            set_optimizer_state_dict(self.model, optimizer, by_name, options=options)
        return saved


StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="student and teacher sharded by fully_shard"
)
