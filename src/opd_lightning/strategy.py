"""FSDP2 as a Lightning strategy, whose options say how OPDModule shards its models."""

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.device_mesh import init_device_mesh

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


StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="student and teacher sharded by fully_shard"
)
