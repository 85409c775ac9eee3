"""The key-value cache of a decode batch: prompts are read in groups and joined, rows leave cheaply.

R rows, H key-value heads, T columns (tokens, padded on the left), D size of a head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Room for this many further tokens is taken at once; the cache is copied once in as many steps.
_BLOCK_TOKENS = 128


class GrowingLayer(DynamicLayer):
    """transformers' `DynamicLayer`, with the same values in buffers that have room to grow.

    `DynamicLayer` copies all keys and values for each new token, and again to drop a row. Here a
    token is written in place, and `keys` and `values` are views [R, H, T, D] of the buffers.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [R, H, new tokens, D]; return all keys and values [R, H, T, D]."""
        self._append(key_states.shape[-2], [key_states, value_states])
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make row i what row `indices[i]` was; only rows whose number changes are copied."""
        rows = torch.arange(len(indices), device=indices.device)
        if len(rows) > len(self.keys):
            super().batch_select_indices(indices)
            self._buffers = [self.keys, self.values]
            return
        target = (indices != rows).nonzero()[:, 0]
        for states in (self.keys, self.values):
            states[target] = states[indices[target]]
        self.keys, self.values = self.keys[: len(rows)], self.values[: len(rows)]

    def fill(self, width: int, parts: list[tuple[DynamicLayer, Tensor]]) -> None:
        """Take the rows of `parts` in order, ending in the same of `width` columns; empty `parts`.

        Args:
            width: T.
            parts: Layers with at most T columns, and which of their rows [rows] are taken.
        """
        joined = _join(width, parts, room=_BLOCK_TOKENS)
        self.lazy_initialization(*joined)
        self._buffers = joined
        self.keys, self.values = (buffer[:, :, :width] for buffer in joined)

    def _append(self, num_tokens: int, states: list[Tensor]) -> None:
        if not self.is_initialized:
            self.lazy_initialization(*states)
            self.keys, self.values = (s[:, :, :0] for s in states)
            self._buffers = [self.keys, self.values]
        old, rows = self.get_seq_length(), len(states[0])
        width = old + num_tokens
        for i, (name, new) in enumerate(zip(("keys", "values"), states, strict=True)):
            if width > self._buffers[i].shape[2]:
                _, heads, _, size = new.shape
                buffer = new.new_empty(rows, heads, width + _BLOCK_TOKENS, size)
                buffer[:, :, :old] = getattr(self, name)
                self._buffers[i] = buffer
            self._buffers[i][:rows, :, old:width] = new
            setattr(self, name, self._buffers[i][:rows, :, :width])


def grown(width: int, columns: int) -> int:
    """Return the columns that `GrowingLayer`s filled with `width` have room for at `columns`."""
    room = width + _BLOCK_TOKENS
    while room < columns:
        room += 1 + _BLOCK_TOKENS
    return room


def join_caches(
    config: PreTrainedConfig, width: int, parts: list[tuple[DynamicCache, Tensor]]
) -> DynamicCache:
    """Return one cache of the rows taken from `parts`, in order; `parts` are emptied.

    A part may have fewer than `width` columns: it is padded on the left, with zeros that its
    attention mask must hide.

    Args:
        config: Of the model.
        width: Tokens with padding that the joined cache holds, T.
        parts: Caches, and which of their rows [rows] are taken, in which order.
    """
    if len(parts) == 1 and not can_join(parts[0][0]):
        cache, rows = parts[0]
        if not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            cache.batch_select_indices(rows)
        return cache
    joined = DynamicCache(config=config)
    joined.layers = [
        _joined_layer(width, [(cache.layers[i], rows) for cache, rows in parts])
        for i in range(len(parts[0][0].layers))
    ]
    return joined


def can_join(cache: DynamicCache) -> bool:
    """Whether its layers hold nothing but keys and values, with or without a sliding window."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def _join(width: int, parts: list[tuple[DynamicLayer, Tensor]], room: int = 0) -> list[Tensor]:
    """Return keys and values [R, H, width + room, D], padded on the left with zeros."""
    total = sum(len(rows) for _, rows in parts)
    joined = []
    for name in ("keys", "values"):
        first: Tensor = getattr(parts[0][0], name)
        states = first.new_zeros(total, first.shape[1], width + room, first.shape[3])
        done = 0
        for layer, rows in parts:
            part = getattr(layer, name)
            columns = slice(width - part.shape[2], width)
            states[done : done + len(rows), :, columns] = part[rows]
            setattr(layer, name, None)  # its memory, before the next layer takes its own
            done += len(rows)
        joined.append(states)
    return joined


def _joined_layer(width: int, parts: list[tuple[DynamicLayer, Tensor]]) -> DynamicLayer:
    first = parts[0][0]
    if not isinstance(first, DynamicSlidingWindowLayer):
        layer = GrowingLayer()
        layer.fill(width, parts)
        return layer
    layer = DynamicSlidingWindowLayer(first.sliding_window)
    # the columns of the window but one, as the layer itself keeps them
    states = _join(min(width, first.sliding_window - 1), parts)
    layer.lazy_initialization(*states)
    layer.keys, layer.values = states
    layer.cumulative_length = width
    return layer
