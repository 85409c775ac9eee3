"""FSDP2: a model built without weights, sharded a decoder layer at a time, and read shard by shard.

The root of the sharding is the CausalPolicy, which adds no prefix to a parameter's name and leaves
the class of the Hugging Face model as it is.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.initialization import no_init_weights

from opd_lightning.errors import ConfigError
from opd_lightning.policy import CausalPolicy, PolicySpec

log = logging.getLogger("opd_lightning")

ComputeDType = Literal["bfloat16", "float16", "float32"]
# Methods inside which the weights of a policy's root (embedding, last norm, head) are whole, and
# whether a backward pass may follow.
_FORWARDS = {"read": True, "check_head": False, "check_packed": False}


@dataclass(frozen=True)
class Sharding:
    """Over which processes models are sharded, and how.

    Attributes:
        mesh: One dimension: sharded over it. Two: copies along the first (HSDP).
        device: Where this process computes.
        param_dtype: In which the student's weights are gathered and used; None: their own.
        reduce_dtype: In which its gradients are averaged; None: that of the gathered weights.
        reshard_after_forward: Whether a student's layer is gathered again for the backward pass.
        offload_student: Keep its shards, gradients and optimiser state in the CPU's memory.
        offload_teacher: Keep the teacher's shards there.
    """

    mesh: DeviceMesh
    device: torch.device
    param_dtype: ComputeDType | None = None
    reduce_dtype: ComputeDType | None = None
    reshard_after_forward: bool = True
    offload_student: bool = False
    offload_teacher: bool = False


def load_policy(
    spec: PolicySpec,
    device: torch.device,
    sharding: Sharding | None,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    frozen: bool = False,
) -> CausalPolicy:
    """Return the policy with its weights, sharded if asked for, and check its head.

    Args:
        spec: What to load.
        device: Where it is to be.
        sharding: None: every process holds the whole model.
        tokenizer: See `CausalPolicy`.
        vocab_size: See `CausalPolicy`.
        frozen: Whether it is never trained (a teacher).

    Raises:
        ConfigError: If the model cannot be read, or packed rows were asked for that it cannot read.
    """

    def policy_of(model: PreTrainedModel) -> CausalPolicy:
        policy = CausalPolicy(model, tokenizer, vocab_size, spec.packed)
        return policy.requires_grad_(False) if frozen else policy

    if sharding is None:
        policy = policy_of(spec.load())
        if frozen or policy.uses_flash_attention:  # its kernels have to be checked on the GPU
            policy.to(device)
    else:
        policy = _load_sharded(spec, policy_of, sharding, frozen)
    policy.check_head()
    policy.check_packed()
    return policy


@contextmanager
def gathered(policy: CausalPolicy) -> Iterator[None]:
    """Hold all weights of a sharded policy whole, for many forward passes without gradient.

    Each weight is gathered once, on entry, by all processes together; inside they need not keep
    step, nor run a forward pass at all. A policy that is not sharded is left as it is.
    """
    if not isinstance(policy, FSDPModule):
        yield
        return
    modules = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    layers = [module for module in modules if module is not policy]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(policy.reshard_after_forward, recurse=False)
        policy.reset_iter_state()


def shard_(policy: CausalPolicy, sharding: Sharding, frozen: bool) -> None:
    """Shard the policy in place: each decoder layer, then what is left, with the policy as root.

    Args:
        policy: Its parameters may be on the meta device.
        sharding: How.
        frozen: Whether it is a teacher, whose root is resharded after each forward pass too.
    """
    dtypes = [d and getattr(torch, d) for d in (sharding.param_dtype, sharding.reduce_dtype)]
    offload = sharding.offload_teacher if frozen else sharding.offload_student
    policy.reshard_after_forward = frozen or sharding.reshard_after_forward
    settings: dict[str, Any] = {
        "mesh": sharding.mesh,
        "offload_policy": OffloadPolicy(),
    }
    if offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=sharding.device.type == "cuda")
    mixed = MixedPrecisionPolicy() if frozen else MixedPrecisionPolicy(*dtypes)
    for layer in decoder_layers(policy.model):
        fully_shard(
            layer,
            mp_policy=mixed,
            reshard_after_forward=policy.reshard_after_forward,
            **settings,
        )
    fully_shard(
        policy,
        mp_policy=replace(mixed, cast_forward_inputs=False),  # its inputs are token ids
        reshard_after_forward=frozen,
        **settings,
    )
    policy.compute_device = sharding.device
    for name, trains in _FORWARDS.items():
        _make_forward(policy, name, trains and not frozen)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the model's decoder layers, in order: the classes that transformers never splits.

    Raises:
        ConfigError: If the model names none.
    """
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} does not say which of its modules are decoder layers "
            "(_no_split_modules is empty), so it cannot be sharded. Take trainer.strategy ddp."
        )
    return layers


def _make_forward(policy: CausalPolicy, name: str, trains: bool) -> None:
    """Make a method of the policy one that FSDP treats as a forward pass.

    Args:
        policy: Sharded.
        name: Of the method.
        trains: Whether a backward pass follows where gradients are enabled.
    """
    register_fsdp_forward_method(policy, name)
    method = getattr(policy, name)

    @wraps(method)
    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        finally:
            if not (trains and torch.is_grad_enabled()):
                # No backward pass comes that would reshard the root, whose parameters an optimiser
                # or a checkpoint would then take for the sharded ones. And what FSDP noted of this
                # pass must go: in a later backward pass it would gather these layers ahead, for
                # nothing, and on those processes alone that noted it.
                policy.reset_iter_state()

    setattr(policy, name, forward)


# ---------------------------------------------------------------------------------- loading


def _load_sharded(
    spec: PolicySpec,
    policy_of: Callable[[PreTrainedModel], CausalPolicy],
    sharding: Sharding,
    frozen: bool,
) -> CausalPolicy:
    """Build without weights, shard, and read this process's shards of each weight.

    Where the files' names are not the model's (old folders that transformers converts), every
    process loads the whole model before it is sharded.
    """
    model = _without_weights(spec)
    reader = _reader(spec, model)
    if reader is None:
        policy = policy_of(spec.load())
        shard_(policy, sharding, frozen)
        return policy
    policy = policy_of(model)
    shard_(policy, sharding, frozen)
    offload = sharding.offload_teacher if frozen else sharding.offload_student
    _allocate(policy, torch.device("cpu") if offload else sharding.device, sharding.device)
    dcp.load(_stored(policy.model), storage_reader=reader)
    return policy


def _without_weights(spec: PolicySpec) -> PreTrainedModel:
    """Return the model with weights on the meta device, to be filled, and buffers as they are.

    Buffers are computed, not read, so they are computed where they will stay.
    """
    with no_init_weights():  # the weights' memory is never written to, and so never taken
        model = spec.build()
    buffers = dict(model.named_buffers())
    model.to("meta")
    _set_buffers(model, buffers)
    model.tie_weights()
    spec.set_generation_config(model)
    return model


def _set_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        owner, _, own_name = name.rpartition(".")
        setattr(module.get_submodule(owner), own_name, buffer)


def _reader(spec: PolicySpec, model: PreTrainedModel) -> HuggingFaceStorageReader | None:
    """Return a reader of the model's safetensors, None where they have to be converted."""
    folder = Path(spec.path)
    if not folder.exists():
        patterns = ["*.safetensors"]
        folder = Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=patterns))
    reader = HuggingFaceStorageReader(str(folder))
    files = reader.read_metadata().state_dict_metadata
    saved = {name: entry.size for name, entry in files.items()}
    wanted = {name: value.size() for name, value in _stored(model).items()}
    # a tied weight that stands in the files by its second name too is for transformers to judge
    doubled = saved.keys() & model.state_dict().keys() - wanted.keys()
    differing = [name for name, size in wanted.items() if saved.get(name) != size]
    if not differing and not doubled:
        return reader
    log.info(
        "%s: its files name or shape %d weights otherwise than the model (%s): every process loads "
        "the whole model before it is sharded",
        spec.path,
        len(differing) + len(doubled),
        ", ".join([*differing, *sorted(doubled)][:3]),
    )
    return None


def _stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return what files hold of the model's state: a tied weight by one of its names."""
    seen: set[int] = set()
    stored = {}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, value in model.state_dict(keep_vars=True).items():
        if name in tied or id(value) in seen:
            continue
        seen.add(id(value))
        stored[name] = value.detach()
    return stored


def _allocate(policy: CausalPolicy, weights: torch.device, buffers: torch.device) -> None:
    """Give the weights memory, to be filled; buffers keep their values."""
    values = {name: buffer.to(buffers) for name, buffer in policy.named_buffers()}
    policy.to_empty(device=weights)
    _set_buffers(policy, values)
