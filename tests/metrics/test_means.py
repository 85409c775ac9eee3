"""TokenMeans against plain loops."""

import pytest
import torch

from opd_lightning.metrics import TokenMeans, completion_measures
from opd_lightning.records import PromptBatch, Rollout


def test_means_over_pieces_are_means_over_all():
    g = torch.Generator().manual_seed(0)
    sizes = [5, 0, 1, 12]
    pieces = [torch.randn(n, generator=g) for n in sizes]
    keeps = [torch.rand(n, generator=g) > 0.4 for n in sizes]
    keeps[2][:] = False
    means = TokenMeans()
    for piece, keep in zip(pieces, keeps, strict=True):
        means.update({"all": piece})
        means.update({"kept": piece, "frac": (piece > 0).float()}, keep=keep)
        means.add("sum", piece.sum())
    everything = [float(x) for piece in pieces for x in piece]
    kept = [
        float(x)
        for piece, keep in zip(pieces, keeps, strict=True)
        for x, k in zip(piece, keep, strict=True)
        if k
    ]
    assert 0 < len(kept) < len(everything)
    assert means.compute() == pytest.approx(
        {
            "all": sum(everything) / len(everything),
            "kept": sum(kept) / len(kept),
            "frac": sum(x > 0 for x in kept) / len(kept),
            "sum": sum(everything),
        },
        rel=1e-5,
    )


def test_what_is_not_kept_may_be_nan():
    means = TokenMeans()
    values = torch.tensor([1.0, torch.nan, 3.0])
    means.update({"kl": values}, keep=torch.tensor([True, False, True]))
    assert means.compute() == {"kl": 2.0}


def test_a_nan_that_is_kept_shows():
    means = TokenMeans()
    means.update({"kl": torch.tensor([1.0, torch.nan])})
    assert str(means.compute()["kl"]) == "nan"


def test_compute_starts_anew_and_sorts():
    means = TokenMeans()
    means.update({"b": torch.ones(2), "a": torch.zeros(1)})
    assert list(means.compute()) == ["a", "b"]
    assert means.compute() == {}
    means.update({"b": torch.tensor([5.0])})
    assert means.compute() == {"b": 5.0}


def test_values_may_be_of_any_dtype():
    means = TokenMeans()
    means.update({"x": torch.tensor([1, 2, 4], dtype=torch.bfloat16)})
    means.update({"x": torch.tensor([9.0], dtype=torch.float64)})
    means.add("s", torch.tensor(2.5, dtype=torch.float64))
    assert means.compute() == {"x": 4.0, "s": 2.5}


def test_completion_measures_are_by_row():
    prompts = PromptBatch.from_token_ids([[5], [6, 7], [8]])
    rollout = Rollout.from_completions(prompts, [[1, 2, 3], [], [4]], [True, False, False])
    measures = {key: value.tolist() for key, value in completion_measures(rollout).items()}
    assert measures == {
        "completions/mean_length": [3.0, 0.0, 1.0],
        "completions/clipped_ratio": [1.0, 0.0, 0.0],
    }
