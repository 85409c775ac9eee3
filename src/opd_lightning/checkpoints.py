"""Checkpoints as plain contents, of one file or of a folder of shards, one of each process.

Nothing but tensors, numbers, strings and containers of these is read (`weights_only=True`).
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.optim import Optimizer

# what ModelParallelStrategy calls the file of all that is no tensor
_META = "meta.pt"
_OPTIMIZER = "optimizer_"


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Return the contents of a checkpoint as a run on one device writes them.

    A folder is read whole into this process's memory.

    Args:
        path: A file, or a folder of shards (FSDP2Strategy with `save_distributed_checkpoint`).
        map_location: Where a file's tensors go; a folder's go to the CPU.
    """
    if is_sharded(path):
        return _load_folder(Path(path))
    return torch.load(path, map_location=map_location, weights_only=True)


def is_sharded(path: str | Path) -> bool:
    """Whether `path` is a folder of shards."""
    return (Path(path) / _META).is_file()


class AnyCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoint files, which reads folders of shards too."""

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return `load_checkpoint(path)`; always `weights_only`."""
        return load_checkpoint(path, map_location or "cpu")


def _load_folder(folder: Path) -> dict[str, Any]:
    contents: dict[str, Any] = {}
    _load_state_dict(
        contents,
        storage_reader=FileSystemReader(folder),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    names = sorted(name for name in contents if name.startswith(_OPTIMIZER))
    contents["optimizer_states"] = [numbered(contents.pop(name)) for name in names]
    return contents | torch.load(folder / _META, map_location="cpu", weights_only=True)


def numbered(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimiser's state with parameters by number, as torch's optimisers write it.

    Args:
        state: By name; the groups list the names in the optimiser's order.
    """
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: i for i, name in enumerate(names)}
    groups = [
        {**group, "params": [number[name] for name in group["params"]]}
        for group in state["param_groups"]
    ]
    values = {number[name]: value for name, value in state.get("state", {}).items()}
    return {"state": dict(sorted(values.items())), "param_groups": groups}


def named(state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimiser's state with parameters by name, the reverse of `numbered`.

    Args:
        state: By number, or by anything that the groups list in the optimiser's order.
        model: Whose parameters are named.
        optimizer: Over some of them.
    """
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    groups, name = [], {}
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        names = [name_of[parameter] for parameter in own["params"]]
        name |= dict(zip(group["params"], names, strict=True))
        groups.append({**group, "params": names})
    values = {name[number]: value for number, value in state["state"].items()}
    return {"state": values, "param_groups": groups}
