"""The growing cache against transformers' own, step by step."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from opd_lightning.rollout.cache import GrowingLayer, can_join, join_caches
from tests.tiny import tiny_model


def states(rows: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys and values of 2 heads, of sizes 3 and 4."""
    return tuple(torch.randn(rows, 2, tokens, size, generator=generator) for size in (3, 4))


def test_growing_layer_equals_transformers_layer():
    """Prompts, 300 tokens (several blocks), rows that leave, move and are repeated."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = GrowingLayer(), DynamicLayer()
    assert ours.get_seq_length() == 0
    selections = {3: [0, 5, 2], 100: [2, 1], 130: [0, 0, 1, 1], 200: [3, 2, 1], 250: [1]}
    rows, tokens = 6, 9
    for step in range(300):
        new = states(rows, tokens, generator)
        for found, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(found, expected), step
        tokens = 1
        if step in selections:
            indices = torch.tensor(selections[step])
            ours.batch_select_indices(indices)
            theirs.batch_select_indices(indices)
            rows = len(indices)
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_tokens_are_written_in_place_and_few_rows_are_copied():
    generator = torch.Generator().manual_seed(0)
    layer = GrowingLayer()
    layer.update(*states(6, 9, generator))
    places = set()
    for _ in range(256):
        layer.update(*states(len(layer.keys), 1, generator))
        places.add(layer.keys.data_ptr())
        if len(places) == 1 and len(layer.keys) == 6:
            layer.batch_select_indices(torch.tensor([0, 5, 2]))
    assert len(places) <= 3, "copied once in 128 tokens, and not when rows leave"


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_joined_parts_equal_one_reading_with_padding(name: str):
    """Two parts of 3 and 9 columns; gemma3's sliding layer keeps 3 of them."""
    model = tiny_model(name)
    short, long = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.arange(20, 29)[None]
    whole = torch.cat([torch.nn.functional.pad(short, (6, 0)), long])
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[:2, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def read(ids: Tensor, rows: slice, width: int) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(
            input_ids=ids,
            attention_mask=mask[rows, -width:],
            position_ids=positions[rows, -width:],
            past_key_values=cache,
        )
        return cache

    with torch.no_grad():
        expected = read(whole, slice(0, 3), 9)
        parts = [(read(short, slice(0, 2), 3), [1, 1, 0]), (read(long, slice(2, 3), 9), [0])]
    assert all(can_join(cache) for cache, _ in parts)
    found = join_caches(model.config, 9, [(c, torch.tensor(rows)) for c, rows in parts])
    real = mask[[1, 1, 0, 2]].bool()
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length() == 9
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert a.shape[1:] == b.shape[1:]
            seen = real[:, -a.shape[2] :, None]
            b = b[[1, 1, 0, 2]]
            assert torch.allclose(a.transpose(1, 2)[seen[..., 0]], b.transpose(1, 2)[seen[..., 0]])


def test_other_layers_are_not_joined():
    """A subclass may hold more than keys and values: one part, its rows chosen by itself."""

    class Indexed(DynamicLayer):
        pass

    generator = torch.Generator().manual_seed(0)
    config = tiny_model().config
    cache = DynamicCache(config=config)
    cache.layers = [Indexed(), Indexed()]
    new = states(2, 4, generator)
    for i in range(2):
        cache.update(*new, i)
    assert not can_join(cache)
    assert join_caches(config, 4, [(cache, torch.arange(2))]) is cache
    assert torch.equal(cache.layers[1].keys, new[0])
    repeated = join_caches(config, 4, [(cache, torch.tensor([0, 0, 1]))])
    assert type(repeated.layers[0]) is Indexed
    assert torch.equal(repeated.layers[1].keys, new[0][[0, 0, 1]])
