"""How noisy an update's gradient is: its variance over micro-batches, on a few parameters."""

import torch
from torch import Tensor, nn

# The fewest parameters at the end of the model that are looked at: its final norm, usually.
_LEAST_NUMBERS = 8


class GradientVariance:
    """(1/M) sum_m |g_m - mean g|^2 over the M micro-batches of an update (paper section 6.0).

    On the last small parameter of the model, as a cheap proxy; each rank sees its own micro-batches
    and, where weights are sharded, its own shard.
    """

    def __init__(self) -> None:
        self._gradients: list[Tensor] = []
        self._sum: Tensor | None = None

    def update(self, model: nn.Module) -> None:
        """Add what the newest micro-batch added to the gradients of `model`."""
        gradient = _last_small_gradient(model)
        if gradient is None:
            return
        before = torch.zeros_like(gradient) if self._sum is None else self._sum
        self._gradients.append(gradient - before)
        self._sum = gradient

    def compute(self) -> dict[str, float]:
        """Return the variance, relative to the squared mean too; nothing for fewer than two."""
        if len(self._gradients) < 2:
            return {}
        each = torch.stack(self._gradients)
        mean = each.mean(0)
        variance = float((each - mean).square().sum(1).mean())
        scale = float(mean.square().sum())
        return {
            "gradient/variance": variance,
            "gradient/noise_to_signal": variance / scale if scale > 0 else 0.0,
        }


def _last_small_gradient(model: nn.Module) -> Tensor | None:
    for parameter in reversed(list(model.parameters())):
        if parameter.dim() == 1 and parameter.numel() >= _LEAST_NUMBERS and parameter.requires_grad:
            gradient = parameter.grad
            if gradient is None:
                return None
            gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            return gradient.detach().float().clone()
    return None
