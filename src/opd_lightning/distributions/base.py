"""TokenDistribution: what an objective sees of a model, dense (the reference) or read in chunks.

N positions, V vocabulary, D hidden size, K ids a position.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from opd_lightning.distributions import rows
from opd_lightning.distributions.head import (
    ChunkedProducts,
    GatheredProducts,
    Head,
    RowFunction,
    RowValues,
    WeightedSum,
    at_least_fp32,
    products,
    receiver,
    row_values,
    weighted,
)

Provides = Literal["sampled", "topk", "full"]


class Distribution(ABC):
    """What every source of next-token log-probabilities offers: the sampled token and a top-K."""

    provides: ClassVar[Provides]

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """N."""

    @abstractmethod
    def logprobs(self, ids: Tensor) -> Tensor:
        """Return log-probabilities in nats of `ids`, [N] or [N, K], in its shape."""

    @abstractmethod
    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the ids and log-probabilities, both [N, k], of the k likeliest tokens."""

    @abstractmethod
    def finite_where_ignored(self, ignored: Tensor) -> Self:
        """Return the same distribution with harmless numbers for non-finite ones at `ignored` [N].

        So that a NaN or -inf of the teacher at a token of weight 0 cannot reach a gradient (0
        times infinity is NaN). Rows that are not ignored, and finite rows, stay as they are.
        """


class TokenDistribution(Distribution):
    """Next-token distributions at N positions over a vocabulary of V, temperature applied.

    Values are in nats and at least fp32 (float64 in, float64 out). Gradients flow to what the
    distribution was built from; in a comparison with a teacher they flow to `self` only.

    Example:
        >>> student = TokenDistribution.from_logits(torch.tensor([[0.0, 1.0]]))
        >>> teacher = TokenDistribution.from_logits(torch.tensor([[1.0, 0.0]]))
        >>> student.reverse_kl(teacher)
        tensor([0.4621])
    """

    provides = "full"

    @staticmethod
    def from_logits(logits: Tensor, temperature: float = 1.0) -> "TokenDistribution":
        """Build the dense reference from logits [N, V], divided by `temperature` here."""
        return _DenseDistribution(logits, temperature)

    @staticmethod
    def from_hidden(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        softcap: float | None = None,
        scale: float = 1.0,
        temperature: float = 1.0,
        chunk_size: int | None = None,
    ) -> "TokenDistribution":
        """Build a distribution that never holds N x V numbers, forward or backward.

        Args:
            hidden: [N, D] last hidden states, after the model's final norm.
            weight: [V, D] of the output head (the embedding, where tied).
            bias: [V] or None.
            softcap: Gemma's final soft-capping of the logits, or None.
            scale: Factor on the logits, before the cap.
            temperature: Divides the logits, > 0.
            chunk_size: Positions handled at once; default: what fits a byte budget.

        Raises:
            ValueError: If the shapes of hidden and weight do not agree, temperature <= 0 or
                chunk_size < 1.
        """
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, or None to choose; got {chunk_size}.")
        head = Head(softcap, scale, temperature, chunk_size)
        return _HiddenDistribution(hidden, weight, bias, head)

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V."""

    @abstractmethod
    def logits_at(self, ids: Tensor) -> Tensor:
        """Return logits [N, K] of `ids` [N, K]; reads only those rows of a head."""

    @abstractmethod
    def logsumexp(self) -> Tensor:
        """Return log sum_v exp(logits_v), [N]; computed once and kept."""

    @abstractmethod
    def dense_rows(self, rows: slice) -> Tensor:
        """Return the logits [C, V] of some positions, without a gradient."""

    def chunk_reader(self) -> Callable[[slice], Tensor]:
        """Return what gives `dense_rows` chunk by chunk; each may use the last one's memory."""
        return self.dense_rows

    @abstractmethod
    def read(self, row_fn: RowFunction, *others: "TokenDistribution | Tensor") -> Tensor:
        """Return `row_fn(logits, *others)` for every position, evaluated in chunks.

        Args:
            row_fn: Takes this distribution's logits [C, V] of C positions, then the logits or
                values of `others` at the same positions; returns [C], or [C, M] for M values a
                position. See `rows.py`.
            others: Distributions (their logits are passed, without gradient) or tensors [N, ...].

        Returns:
            [N] or [N, M].
        """

    @abstractmethod
    def weighted_sum(
        self, row_fn: RowFunction, weights: Tensor, *others: "TokenDistribution | Tensor"
    ) -> tuple[Tensor, Tensor]:
        """Return (sum_n weights_n * values_n, values detached), values as in `read`.

        Of values [N, M] the first column is summed; the others come along. Rows of weight 0
        contribute exactly 0. The sum can be differentiated once.
        """

    def logprobs(self, ids: Tensor) -> Tensor:
        """Return log-probabilities in nats of `ids`, [N] or [N, K], in its shape."""
        table = ids if ids.dim() == 2 else ids[:, None]
        return (self.logits_at(table) - self.logsumexp()[:, None]).view(ids.shape)

    @abstractmethod
    def topk_ids(self, k: int) -> Tensor:
        """Return the ids [N, min(k, V)] of the likeliest tokens, likeliest first; no gradient."""

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """Return ids and log-probabilities, [N, min(k, V)]; the ids are a detached choice."""
        ids = self.topk_ids(k)
        return ids, self.logprobs(ids)

    def entropy(self) -> Tensor:
        """Return -sum_v p_v log p_v, [N] nats."""
        return self.read(rows.entropy)

    def reverse_kl(self, teacher: "TokenDistribution") -> Tensor:
        """Return KL(self || teacher), [N] nats."""
        return self.read(rows.reverse_kl, teacher)

    def forward_kl(self, teacher: "TokenDistribution") -> Tensor:
        """Return KL(teacher || self), [N] nats."""
        return self.read(rows.forward_kl, teacher)

    def jensen_shannon(self, teacher: "TokenDistribution", beta: float) -> Tensor:
        """Return beta KL(q || m) + (1 - beta) KL(pi || m), m = beta q + (1 - beta) pi, [N] nats."""
        return self.read(partial(rows.jensen_shannon, beta=beta), teacher)


def _chunk_reader(other: "TokenDistribution | Tensor") -> Callable[[slice], Tensor]:
    if isinstance(other, TokenDistribution):
        return other.chunk_reader()
    return lambda chunk: other[chunk].detach()


class _DenseDistribution(TokenDistribution):
    """Logits [N, V] held as they are."""

    def __init__(self, logits: Tensor, temperature: float = 1.0) -> None:
        if logits.dim() != 2:
            raise ValueError(f"logits must be [N, V]; got shape {tuple(logits.shape)}.")
        _check_temperature(temperature)
        logits = at_least_fp32(logits)
        self._logits = logits if temperature == 1.0 else logits / temperature
        self._logsumexp: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self._logits.shape[0]

    @property
    def vocab_size(self) -> int:
        return self._logits.shape[1]

    def logits_at(self, ids: Tensor) -> Tensor:
        return self._logits.gather(1, ids)

    def logsumexp(self) -> Tensor:
        if _stale(self._logsumexp, self._logits.requires_grad):
            self._logsumexp = self._logits.logsumexp(-1)
        return self._logsumexp

    def dense_rows(self, rows: slice) -> Tensor:
        return self._logits[rows].detach()

    def topk_ids(self, k: int) -> Tensor:
        return self._logits.detach().topk(min(k, self.vocab_size)).indices

    def read(self, row_fn: RowFunction, *others: TokenDistribution | Tensor) -> Tensor:
        whole = slice(0, self.num_tokens)
        return row_fn(self._logits, *[_chunk_reader(other)(whole) for other in others])

    def weighted_sum(
        self, row_fn: RowFunction, weights: Tensor, *others: TokenDistribution | Tensor
    ) -> tuple[Tensor, Tensor]:
        counts = weights != 0
        # `where` keeps the gradient of an infinite value from a row that does not count
        logits = torch.where(counts[:, None], self._logits, self._logits.detach())
        values = _DenseDistribution(logits).read(row_fn, *others)
        return weighted(weights, values), values.detach()

    def finite_where_ignored(self, ignored: Tensor) -> "_DenseDistribution":
        return _DenseDistribution(_finite_rows(self._logits, ignored))


class _HiddenDistribution(TokenDistribution):
    """Hidden states [N, D] and the head's weight [V, D]; logits exist a chunk at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> None:
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(
                f"hidden must be [N, D] and weight [V, D] with one D; got {tuple(hidden.shape)} "
                f"and {tuple(weight.shape)}."
            )
        _check_temperature(head.temperature)
        self._inputs = hidden, weight, bias
        self._receivers = [receiver(tensor) for tensor in self._inputs]
        self._head = head
        self._logsumexp: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self._inputs[0].shape[0]

    @property
    def vocab_size(self) -> int:
        return self._inputs[1].shape[0]

    @property
    def _differentiable(self) -> bool:
        wanted = any(t is not None and t.requires_grad for t in self._inputs)
        return wanted and torch.is_grad_enabled()

    def logits_at(self, ids: Tensor) -> Tensor:
        gathered = GatheredProducts.apply(self._inputs, ids, self._head, *self._receivers)
        return self._head.finish(gathered)

    def logsumexp(self) -> Tensor:
        if _stale(self._logsumexp, self._differentiable):
            self._logsumexp = self.read(partial(torch.logsumexp, dim=-1))
        return self._logsumexp

    def dense_rows(self, rows: slice) -> Tensor:
        with torch.no_grad():
            return self._head.finish(products(self._inputs, rows))

    def chunk_reader(self) -> Callable[[slice], Tensor]:
        chunk_of = ChunkedProducts(self._inputs)

        def read(rows: slice) -> Tensor:
            with torch.no_grad():
                return self._head.finish(chunk_of(rows))

        return read

    def topk_ids(self, k: int) -> Tensor:
        return self._topk_logits(k)[0]

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        if self._differentiable:
            return super().topk(k)
        ids, logits = self._topk_logits(k)
        return ids, logits - self.logsumexp()[:, None]

    def _topk_logits(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the k likeliest ids and their logits, no gradient; the logsumexp comes along."""
        k = min(k, self.vocab_size)
        keep_logsumexp = self._logsumexp is None and not self._differentiable

        def topk_and_logsumexp(logits: Tensor) -> Tensor:
            best = logits.topk(k)
            ids.append(best.indices)
            rest = [logits.logsumexp(-1, keepdim=True)] if keep_logsumexp else []
            return torch.cat([best.values, *rest], dim=-1)

        ids: list[Tensor] = []
        with torch.no_grad():
            values = row_values(self._inputs, self._head, topk_and_logsumexp, [])
        if keep_logsumexp:
            self._logsumexp = values[:, -1]
        return torch.cat(ids), values[:, :k]

    def read(self, row_fn: RowFunction, *others: TokenDistribution | Tensor) -> Tensor:
        readers = [_chunk_reader(other) for other in others]
        if self._differentiable:
            return RowValues.apply(self._inputs, self._head, row_fn, readers, *self._receivers)
        with torch.no_grad():
            return row_values(self._inputs, self._head, row_fn, readers)

    def weighted_sum(
        self, row_fn: RowFunction, weights: Tensor, *others: TokenDistribution | Tensor
    ) -> tuple[Tensor, Tensor]:
        if not self._differentiable:
            values = self.read(row_fn, *others)
            return weighted(weights, values), values
        readers = [_chunk_reader(other) for other in others]
        return WeightedSum.apply(
            self._inputs, weights, self._head, row_fn, readers, *self._receivers
        )

    def finite_where_ignored(self, ignored: Tensor) -> "_HiddenDistribution":
        hidden, weight, bias = self._inputs
        return _HiddenDistribution(_finite_rows(hidden, ignored), weight, bias, self._head)


def _stale(kept: Tensor | None, differentiable: bool) -> bool:
    """Whether a kept value is missing, or was computed without the gradient that is wanted."""
    return kept is None or (differentiable and torch.is_grad_enabled() and not kept.requires_grad)


def _finite_rows(values: Tensor, ignored: Tensor) -> Tensor:
    """Put 0 for what is not finite in the ignored rows of `values` [N, ...]; no copy if none is."""
    broken = ignored[:, None] & ~values.isfinite()
    return torch.where(broken, 0.0, values) if bool(broken.any()) else values


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(
            f"temperature must be above 0; got {temperature}. Greedy decoding has no distribution "
            "to distil: sample with temperature 1, the usual setting."
        )
