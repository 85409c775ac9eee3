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
from torch.nn.functional import embedding_bag

from opd_lightning.distributions.rows import WITH_GRADIENT

# What one [C, V] tensor of a chunk may occupy; the student's and a teacher's are alive at once, in
# memory that the next chunk uses again. Smaller chunks make the matrix products slow.
CHUNK_BYTES = 100 * 2**20
# What one tensor may occupy of the block of rows that a row function sees at once: about ten are
# alive, and on a CPU they stay in its cache. On a GPU launches would cost more than that.
BLOCK_BYTES = {"cpu": 2 * 2**20, "other": 16 * 2**20}

RowFunction = Callable[..., Tensor]
"""(logits [C, V], *others) -> [C], or [C, M] for M values a position; see `rows.py`."""
Chunk = Callable[[slice], Tensor]
"""Gives the rows of a slice of something that has N rows, until it is asked for the next."""
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


def _slices(num_rows: int, size: int) -> Iterator[slice]:
    for start in range(0, max(1, num_rows), size):
        yield slice(start, min(start + size, num_rows))


def blocks(chunk: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of a chunk [C, V], small enough for what row functions allocate."""
    budget = BLOCK_BYTES["cpu" if chunk.device.type == "cpu" else "other"]
    return _slices(len(chunk), max(1, budget // max(1, chunk.shape[1] * chunk.element_size())))


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
        return _slices(num_rows, size)


def products(inputs: Inputs, rows: slice, out: Tensor | None = None) -> Tensor:
    """Return hidden[rows] @ weight.T + bias [C, V] in at least fp32, whatever autocast says.

    Rounding logits to bf16 flips the sign of about 6 % of the advantages (docs/mathematics.md,
    section 7).

    Args:
        inputs: The head's.
        rows: Positions, C of them.
        out: Memory for the result, [C, V].
    """
    hidden, weight, bias = inputs
    hidden = hidden[rows]
    if out is None:
        out = _empty_like_products(inputs, len(hidden))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        if hidden.dtype in _LOW and hidden.is_cuda:
            torch.mm(hidden, weight.to(hidden.dtype).T, out_dtype=torch.float32, out=out)
        else:
            hidden = hidden.to(out.dtype)
            for part, wide in _widened(weight, out.dtype):
                torch.mm(hidden, wide.T, out=out[:, part])
        return out if bias is None else out.add_(bias)


def _empty_like_products(inputs: Inputs, num_rows: int) -> Tensor:
    hidden, weight, _ = inputs
    shape = num_rows, len(weight)
    return torch.empty(shape, dtype=at_least_fp32(hidden[:0]).dtype, device=hidden.device)


def _widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the vocabulary and those rows of the head in `dtype`; one if it has it."""
    size = len(weight)
    if weight.dtype != dtype:
        size = max(1, BLOCK_BYTES["other"] // (weight.shape[1] * dtype.itemsize))
    for start in range(0, len(weight), size):
        part = slice(start, start + size)
        yield part, weight[part].to(dtype)


class ChunkedProducts:
    """The products of chunk after chunk, in memory that each of them uses again."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._memory: Tensor | None = None

    def __call__(self, rows: slice) -> Tensor:
        """Return the products [C, V] of `rows`; the next call overwrites them."""
        num_rows = rows.stop - rows.start
        if self._memory is None or len(self._memory) < num_rows:
            self._memory = _empty_like_products(self._inputs, num_rows)
        return products(self._inputs, rows, self._memory[:num_rows])


class _HeadGradient:
    """Sums the gradient of a chunk's products into those of hidden, weight and bias."""

    def __init__(self, inputs: Inputs, needs: tuple[bool, ...]) -> None:
        hidden, weight, bias = inputs
        dtype = at_least_fp32(hidden[:0]).dtype
        self._inputs, self._needs_weight = (hidden, weight), needs[1]
        self.hidden = torch.zeros_like(hidden, dtype=dtype) if needs[0] else None
        self.weight: Tensor | None = None  # the first chunk writes it: zeros would be one pass more
        self.bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needs[2] else None

    def add(self, rows: slice, grad_products: Tensor) -> None:
        """Add what the chunk `rows` contributes; `grad_products` [C, V]."""
        hidden, weight = self._inputs
        with torch.autocast(hidden.device.type, enabled=False):
            if self.hidden is not None:
                for part, wide in _widened(weight, grad_products.dtype):
                    self.hidden[rows].addmm_(grad_products[:, part], wide)
            if self._needs_weight:
                factors = grad_products.T, hidden[rows].to(grad_products.dtype)
                if self.weight is None:
                    self.weight = torch.mm(*factors)
                else:
                    self.weight.addmm_(*factors)
            if self.bias is not None:
                self.bias += grad_products.sum(0)

    @property
    def sums(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients, None where none is needed; autograd casts to a receiver's dtype."""
        return self.hidden, self.weight, self.bias


def _to_gradient(
    head: Head, raw: Tensor, row_fn: RowFunction, others: list[Tensor], grad_values: Tensor
) -> Tensor:
    """Return the values [C] of `row_fn` and turn `raw` [C, V] into the gradient of their sum.

    Args:
        head: Makes logits of the products.
        raw: Products; overwritten.
        row_fn: What is evaluated, a block of rows at a time.
        others: The rest of its arguments for these rows.
        grad_values: [C] or [C, M] factors of the values in that sum; of values [C, M] and factors
            [C] only the first column is summed.
    """
    values = []
    direct = WITH_GRADIENT.get(row_fn) if head.softcap is None else None
    for block in blocks(raw):
        if direct is not None:
            with torch.no_grad(), torch.autocast(raw.device.type, enabled=False):
                value, grad = direct(head.finish(raw[block]), *[other[block] for other in others])
                if bool(value.isfinite().all()):
                    factors = grad_values[block].to(value.dtype) * (head.scale / head.temperature)
                    torch.mul(grad, factors[:, None], out=raw[block])
                    values.append(value)
                    continue
        with torch.enable_grad():
            leaf = raw[block].detach().requires_grad_()
            value = row_fn(head.finish(leaf), *[other[block] for other in others])
            upstream, rest = grad_values[block].to(value.dtype), None
            if upstream.dim() < value.dim():
                value, rest = value[:, 0], value[:, 1:].detach()
            (grad,) = torch.autograd.grad(value, leaf, upstream)
        value = value.detach()
        values.append(value if rest is None else torch.cat([value[:, None], rest], dim=1))
        raw[block].copy_(grad)
    return torch.cat(values)


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
        inputs = hidden, weight, _ = ctx.saved_tensors
        gradient, chunk_of = (
            _HeadGradient(inputs, ctx.needs_input_grad[-3:]),
            ChunkedProducts(inputs),
        )
        for rows in ctx.head.chunks(len(hidden), len(weight), grad_values.element_size()):
            raw, others = chunk_of(rows), [other(rows) for other in ctx.others]
            _to_gradient(ctx.head, raw, ctx.row_fn, others, grad_values[rows])
            gradient.add(rows, raw)
        return None, None, None, None, *gradient.sums


def row_values(inputs: Inputs, head: Head, row_fn: RowFunction, others: list[Chunk]) -> Tensor:
    """Return `row_fn` of every row, [N] or [N, M], without a gradient."""
    hidden, weight, _ = inputs
    itemsize, chunk_of = at_least_fp32(hidden[:0]).element_size(), ChunkedProducts(inputs)
    values = []
    for rows in head.chunks(len(hidden), len(weight), itemsize):
        raw, of_others = chunk_of(rows), [other(rows) for other in others]
        for block in blocks(raw):
            value = row_fn(head.finish(raw[block]), *[other[block] for other in of_others])
            # cloned, because values that are a view (logits[:, 0]) would change with the next chunk
            values.append(value.clone())
    return torch.cat(values)


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Return the sum of weights [N] times values [N], or the first column of values [N, M].

    A row of weight 0 contributes exactly 0, even where its value is infinite.
    """
    summed = values if values.dim() == 1 else values[:, 0]
    return torch.where(weights != 0, weights * summed, 0.0).sum()


class WeightedSum(torch.autograd.Function):
    """(sum_n w_n values_n, all values); the gradient is computed in the forward pass.

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
        hidden, weight, _ = inputs
        gradient, chunk_of = (
            _HeadGradient(inputs, ctx.needs_input_grad[-3:]),
            ChunkedProducts(inputs),
        )
        values = []
        itemsize = at_least_fp32(hidden[:0]).element_size()
        for rows in head.chunks(len(hidden), len(weight), itemsize):
            raw, of_others = chunk_of(rows), [other(rows) for other in others]
            values.append(_to_gradient(head, raw, row_fn, of_others, weights[rows]))
            raw[weights[rows] == 0] = 0.0
            gradient.add(rows, raw)
        ctx.gradient = gradient
        values = torch.cat(values)
        ctx.mark_non_differentiable(values)
        return weighted(weights, values), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient is None:
            raise RuntimeError(
                "the gradient of a fused loss was already used (value: None); it can be "
                "differentiated once. Call the objective again, or sum its token_loss instead."
            )
        sums, ctx.gradient = ctx.gradient.sums, None
        # a factor of 1, which is usual, would cost one pass over the head's gradient; on a GPU the
        # question costs more
        if grad_loss.device.type != "cpu" or grad_loss != 1:
            sums = [None if total is None else total.mul_(grad_loss) for total in sums]
        return None, None, None, None, None, *sums


class GatheredProducts(torch.autograd.Function):
    """products [N, K] = hidden_n . weight[ids_nk] (+ bias): reads K rows of the head a position.

    No [N, K, D] is gathered. With s_n = sum_k g_nk weight[ids_nk], torch's `embedding_bag`, the
    products are the derivative of s_n . hidden_n by g_nk, and s_n is the gradient of hidden.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Inputs, ids: Tensor, head: Head, *receivers: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*inputs, ids)
        ctx.head = head
        hidden, weight, bias = inputs
        out = torch.empty(ids.shape, dtype=at_least_fp32(hidden[:0]).dtype, device=hidden.device)
        for rows in _gathering_chunks(head, ids, weight, out.dtype):
            table, places = _rows_of(weight, ids[rows], out.dtype)
            out[rows] = _dots(table, places, hidden[rows].to(out.dtype))
        return out if bias is None else out + bias[ids].to(out.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, ids = ctx.saved_tensors
        hidden, weight, _ = inputs
        gradient = _HeadGradient(inputs, ctx.needs_input_grad[-3:])
        if gradient.hidden is not None:
            for rows in _gathering_chunks(ctx.head, ids, weight, grad.dtype):
                table, places = _rows_of(weight, ids[rows], grad.dtype)
                gradient.hidden[rows] = _sums(table, places, grad[rows])
        if ctx.needs_input_grad[-2]:
            gradient.weight = torch.zeros_like(weight, dtype=grad.dtype)
            if ids.numel():
                _scatter(gradient.weight, ids, grad, hidden.to(grad.dtype))
        if gradient.bias is not None:
            gradient.bias.index_add_(0, ids.reshape(-1), grad.reshape(-1))
        return None, None, None, *gradient.sums


def _gathering_chunks(
    head: Head, ids: Tensor, weight: Tensor, dtype: torch.dtype
) -> Iterator[slice]:
    """Yield all rows at once where nothing has to be copied, else chunks of them."""
    if weight.dtype == dtype and not torch.is_inference_mode_enabled():
        return _slices(len(ids), max(1, len(ids)))
    return head.chunks(len(ids), ids.shape[1] * weight.shape[1], dtype.itemsize)


def _rows_of(weight: Tensor, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a table of the head's rows in `dtype` and the places of `ids` in it."""
    if weight.dtype == dtype:
        return weight.detach(), ids
    used, places = ids.unique(return_inverse=True)
    return weight[used].detach().to(dtype), places


def _dots(table: Tensor, places: Tensor, vectors: Tensor) -> Tensor:
    """Return table[places_nk] . vectors_n, [N, K]."""
    if torch.is_inference_mode_enabled():  # which knows no derivatives
        return torch.einsum("nkd,nd->nk", table[places], vectors)
    with torch.enable_grad():
        factors = torch.zeros(places.shape, dtype=table.dtype, device=table.device)
        sums = _sums(table, places, factors.requires_grad_())
        return torch.autograd.grad(sums, factors, vectors)[0]


def _sums(table: Tensor, places: Tensor, factors: Tensor) -> Tensor:
    """Return sum_k factors_nk table[places_nk], [N, D]."""
    return embedding_bag(places, table, per_sample_weights=factors, mode="sum")


def _scatter(total: Tensor, ids: Tensor, factors: Tensor, vectors: Tensor) -> None:
    """Add factors_nk vectors_n to total[ids_nk], in an order that does not depend on threads."""
    ordered, order = ids.reshape(-1).sort(stable=True)
    used, counts = ordered.unique_consecutive(return_counts=True)
    sums = embedding_bag(
        order // ids.shape[1],
        vectors,
        offsets=counts.cumsum(0) - counts,
        per_sample_weights=factors.reshape(-1)[order],
        mode="sum",
    )
    total.index_add_(0, used, sums)
