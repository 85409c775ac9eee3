"""Linear layers on a CPU with weights packed once a rollout, instead of at each token.

MKL, which torch calls for fp32, brings the weight of every call into its own order first. With the
few rows of a decode step that costs as much as the product, most of all in the output head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Run the model's linear layers by oneDNN on packed copies of their weights, without gradient.

    Plain fp32 `nn.Linear` on a CPU only; other layers (half precision, sharded, on a GPU, of a
    subclass) stay as they are. Results are the same but for rounding. The copies take as much
    memory as the weights and are made anew at each entry, as the weights may have changed.

    Args:
        model: Its weights must not change inside.
    """
    packed = [module for module in model.modules() if _can_pack(module)]
    try:
        for module in packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach())
            module.forward = partial(_linear, module, weight)
        yield
    finally:
        for module in packed:
            vars(module).pop("forward", None)


def _can_pack(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)  # someone else's
        and type(module.weight) is nn.Parameter  # a DTensor is not
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        # inductor's operators, no public interface: left out where a version of torch has them not
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def _linear(module: nn.Linear, packed: Tensor, hidden: Tensor) -> Tensor:
    if hidden.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return nn.Linear.forward(module, hidden)
    return torch.ops.mkldnn._linear_pointwise(hidden, packed, module.bias, "none", [], "")
