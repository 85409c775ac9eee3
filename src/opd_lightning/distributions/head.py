"""The output head of a language model and the autograd functions that read it in chunks of rows.

N positions, D hidden size, V vocabulary, C positions of one chunk, K gathered ids. No tensor of
N x V numbers exists, forward or backward: the backward pass computes a chunk's logits again, or,
where the weights of a sum are known, the forward pass computes the gradient on the spot.

The autograd functions take the head's inputs twice: as the numbers to compute with, which autograd
does not look into, and last as what receives their gradients in its graph (see `receiver`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# What one [C, V] tensor of a chunk may occupy; about six of them are alive at once. Smaller chunks
# make the head's matrix products inefficient, larger ones give no more speed.
CHUNK_BYTES = 32 * 2**20

RowFunction = Callable[..., Tensor]
"""(logits [C, V], *others) -> [C], or [C, M] for M values a position; see `rows.py`."""
Chunk = Callable[[slice], Tensor]
"""Gives the rows of a slice of something that has N rows."""
Inputs = tuple[Tensor, Tensor, Tensor | None]
"""hidden [N, D], weight [V, D] and bias [V] or None."""

_LOW = (torch.bfloat16, torch.float16)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Return `tensor` in fp32 or, if it is float64, as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _Float32Receiver(torch.autograd.Function):
    """A tensor's shape in fp32, without memory; the gradient that arrives goes to the tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.dtype = tensor.dtype
        return torch.zeros((), dtype=torch.float32, device=tensor.device).expand(tensor.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to(ctx.dtype)


def receiver(tensor: Tensor | None) -> Tensor | None:
    """Return what stands for `tensor` in the graph of all reads: an fp32 stand-in for bf16 or fp16.

    Autograd adds the gradients of several reads in the dtype of what received them. For a bf16
    tensor itself that is a sum of rounded numbers; for the stand-in it is rounded once, at the end.
    """
    if tensor is None or tensor.dtype not in _LOW:
        return tensor
    with torch.enable_grad():  # a read with a gradient may come later
        return _Float32Receiver.apply(tensor)


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: (cap of (hidden @ weight.T + bias) * scale) / temperature.

    Attributes:
        softcap: Gemma's final soft-capping, cap * tanh(z / cap), or None.
        scale: Factor on the logits before the cap (Cohere's logit_scale, 1 / Granite's scaling).
        temperature: Divides the logits last.
        chunk_size: Rows of a chunk, or None to choose them by `CHUNK_BYTES`.
    """

    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0
    chunk_size: int | None = None

    def finish(self, products: Tensor) -> Tensor:
        """Return logits from the products hidden @ weight.T + bias, of any shape."""
        if self.scale != 1.0:
            products = products * self.scale
        if self.softcap is not None:
            products = self.softcap * torch.tanh(products / self.softcap)
        return products if self.temperature == 1.0 else products / self.temperature

    def chunks(self, num_rows: int, numbers_per_row: int, itemsize: int) -> Iterator[slice]:
        """Yield slices of `num_rows` rows of `numbers_per_row` numbers; one empty one for none."""
        size = self.chunk_size or max(1, CHUNK_BYTES // max(1, numbers_per_row * itemsize))
        for start in range(0, max(1, num_rows), size):
            yield slice(start, min(start + size, num_rows))


def products(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return hidden @ weight.T + bias [C, V] in at least fp32, whatever autocast says.

    Rounding logits to bf16 flips the sign of about 6 % of the advantages (docs/mathematics.md,
    section 7).
    """
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.dtype in _LOW and hidden.is_cuda:
            result = torch.mm(hidden, weight.to(hidden.dtype).T, out_dtype=torch.float32)
        else:
            hidden = at_least_fp32(hidden)
            result = hidden @ weight.to(hidden.dtype).T
        return result if bias is None else result + bias.to(result.dtype)


class _HeadGradient:
    """Sums the gradient of a chunk's products into those of hidden, weight and bias."""

    def __init__(self, inputs: Inputs, needs: tuple[bool, ...]) -> None:
        hidden, weight, bias = inputs
        dtype = at_least_fp32(hidden[:0]).dtype
        self._inputs = hidden, weight
        self.hidden = torch.zeros_like(hidden, dtype=dtype) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needs[2] else None

    def add(self, rows: slice, grad_products: Tensor) -> None:
        """Add what the chunk `rows` contributes; `grad_products` [C, V]."""
        hidden, weight = self._inputs
        with torch.autocast(hidden.device.type, enabled=False):
            if self.hidden is not None:
                self.hidden[rows] = grad_products @ weight.to(grad_products.dtype)
            if self.weight is not None:
                self.weight.addmm_(grad_products.T, hidden[rows].to(grad_products.dtype))
            if self.bias is not None:
                self.bias += grad_products.sum(0)

    @property
    def sums(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients, None where none is needed; autograd casts to a receiver's dtype."""
        return self.hidden, self.weight, self.bias


def _chunk_gradient(
    head: Head, raw: Tensor, row_fn: RowFunction, others: list[Tensor], grad_values: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the values [C] of `row_fn` and the gradient [C, V] of their weighted sum."""
    with torch.enable_grad():
        raw = raw.detach().requires_grad_()
        values = row_fn(head.finish(raw), *others)
        (grad_raw,) = torch.autograd.grad(values, raw, grad_values.to(values.dtype))
    return values.detach(), grad_raw


class RowValues(torch.autograd.Function):
    """values [N] = row_fn(logits, *others); the backward pass computes each chunk again."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Inputs,
        head: Head,
        row_fn: RowFunction,
        others: list[Chunk],
        *receivers: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.head, ctx.row_fn, ctx.others = head, row_fn, others
        return row_values(inputs, head, row_fn, others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        inputs = hidden, weight, bias = ctx.saved_tensors
        gradient = _HeadGradient(inputs, ctx.needs_input_grad[-3:])
        for rows in ctx.head.chunks(len(hidden), len(weight), grad_values.element_size()):
            raw = products(hidden[rows], weight, bias)
            others = [other(rows) for other in ctx.others]
            _, grad_raw = _chunk_gradient(ctx.head, raw, ctx.row_fn, others, grad_values[rows])
            gradient.add(rows, grad_raw)
        return None, None, None, None, *gradient.sums


def row_values(inputs: Inputs, head: Head, row_fn: RowFunction, others: list[Chunk]) -> Tensor:
    """Return `row_fn` of every row, [N] or [N, M], without a gradient."""
    hidden, weight, bias = inputs
    itemsize = at_least_fp32(hidden[:0]).element_size()
    # cloned, because values that are a view (logits[:, 0]) would keep every chunk's logits alive
    return torch.cat(
        [
            row_fn(
                head.finish(products(hidden[rows], weight, bias)), *[o(rows) for o in others]
            ).clone()
            for rows in head.chunks(len(hidden), len(weight), itemsize)
        ]
    )


class WeightedSum(torch.autograd.Function):
    """(sum_n w_n values_n, values [N]); the gradient is computed in the forward pass.

    Each product with the head runs once: chunk by chunk, logits, values and their gradient. Only
    the sum carries a gradient, and it can be differentiated once.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        inputs: Inputs,
        weights: Tensor,
        head: Head,
        row_fn: RowFunction,
        others: list[Chunk],
        *receivers: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        hidden, weight, bias = inputs
        gradient = _HeadGradient(inputs, ctx.needs_input_grad[-3:])
        values = at_least_fp32(torch.zeros(len(hidden), device=hidden.device, dtype=hidden.dtype))
        for rows in head.chunks(len(hidden), len(weight), values.element_size()):
            raw = products(hidden[rows], weight, bias)
            chunk_others = [other(rows) for other in others]
            values[rows], grad_raw = _chunk_gradient(head, raw, row_fn, chunk_others, weights[rows])
            grad_raw.masked_fill_(weights[rows, None] == 0, 0.0)
            gradient.add(rows, grad_raw)
        ctx.gradient = gradient
        ctx.mark_non_differentiable(values)
        # a row of weight 0 contributes exactly 0, even where its value is infinite
        return torch.where(weights != 0, weights * values, 0.0).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient is None:
            raise RuntimeError(
                "the gradient of a fused loss was already used (value: None); it can be "
                "differentiated once. Call the objective again, or sum its token_loss instead."
            )
        sums, ctx.gradient = ctx.gradient.sums, None
        grads = [None if total is None else total.mul_(grad_loss) for total in sums]
        return None, None, None, None, None, *grads


class GatheredProducts(torch.autograd.Function):
    """products [N, K] = hidden_n . weight[ids_nk] (+ bias): reads K rows of the head a position."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Inputs, ids: Tensor, head: Head, *receivers: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*inputs, ids)
        ctx.head = head
        hidden, weight, bias = inputs
        out = torch.empty(ids.shape, dtype=at_least_fp32(hidden[:0]).dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in head.chunks(len(ids), ids.shape[1] * weight.shape[1], out.element_size()):
                gathered = weight[ids[rows]].to(out.dtype)
                out[rows] = torch.einsum("nkd,nd->nk", gathered, hidden[rows].to(out.dtype))
            return out if bias is None else out + bias[ids].to(out.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, ids = ctx.saved_tensors
        hidden, weight, _ = inputs
        gradient = _HeadGradient(inputs, ctx.needs_input_grad[-3:])
        with torch.autocast(hidden.device.type, enabled=False):
            numbers = ids.shape[1] * weight.shape[1]
            for rows in ctx.head.chunks(len(ids), numbers, grad.element_size()):
                if gradient.hidden is not None:
                    gathered = weight[ids[rows]].to(grad.dtype)
                    gradient.hidden[rows] = torch.einsum("nkd,nk->nd", gathered, grad[rows])
                if gradient.weight is not None:
                    outer = grad[rows, :, None] * hidden[rows, None, :].to(grad.dtype)
                    gradient.weight.index_add_(0, ids[rows].reshape(-1), outer.flatten(0, 1))
        if gradient.bias is not None:
            gradient.bias.index_add_(0, ids.reshape(-1), grad.reshape(-1))
        return None, None, None, *gradient.sums
