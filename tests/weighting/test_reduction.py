"""The four reductions against a loop over rows, and what they refuse."""

import pytest
import torch

from opd_lightning.errors import ConfigError
from opd_lightning.records import Rollout
from opd_lightning.weighting import Reduction, UpdateSize

ROWS = [[4, 1], [], [2, 2, 7, 9], [5], []]  # completions; two rows have none
NAMES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def rollout_of(rows: list[list[int]]) -> Rollout:
    ids = [i for row in rows for i in row]
    row = [r for r, ids_of_row in enumerate(rows) for _ in ids_of_row]
    return Rollout.from_flat(
        torch.tensor(ids, dtype=torch.long),
        torch.tensor(row, dtype=torch.long),
        task=["default"] * len(rows),
    )


def size_of(rows: list[list[int]]) -> UpdateSize:
    lengths = [len(r) for r in rows if r]
    return UpdateSize(sum(lengths), len(lengths), max(lengths, default=0))


def reduced_by_loop(name: str, losses: list[list[float]], horizon: int | None = None) -> float:
    """The scalar by definition, rows without tokens left out."""
    counted = [row for row in losses if row]
    tokens = [loss for row in counted for loss in row]
    if name == "token-mean":
        return sum(tokens) / len(tokens)
    if name == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in counted) / len(counted)
    total = sum(sum(row) for row in counted) / len(counted)
    if name == "seq-mean-token-sum":
        return total
    return total / (horizon or max(len(row) for row in counted))


@pytest.mark.parametrize("horizon", [None, 1, 10])
@pytest.mark.parametrize("name", NAMES)
def test_scaled_sum_equals_the_loop(name: str, horizon: int | None):
    if name != "seq-mean-token-sum-norm":
        horizon = None
    g = torch.Generator().manual_seed(0)
    losses = [torch.randn(len(row), generator=g).tolist() for row in ROWS]
    scale = Reduction(name, horizon).scale(rollout_of(ROWS), size_of(ROWS))
    flat = torch.tensor([loss for row in losses for loss in row])
    assert scale.shape == flat.shape
    torch.testing.assert_close(float((scale * flat).sum()), reduced_by_loop(name, losses, horizon))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [[[0, 1], [2, 3, 4]], [[3], [4], [1, 2], [0]]])
def test_scales_do_not_depend_on_the_micro_batches(name: str, parts: list[list[int]]):
    whole = rollout_of(ROWS)
    scale = Reduction(name).scale(whole, size_of(ROWS))
    for rows in parts:
        part = whole.select_rows(torch.tensor(rows))
        expected = torch.cat([scale[whole.row == r] for r in rows])
        assert torch.equal(Reduction(name).scale(part, size_of(ROWS)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_reductions_differ_from_one_another(name: str):
    scales = {n: Reduction(n).scale(rollout_of(ROWS), size_of(ROWS)) for n in NAMES}
    others = [s for n, s in scales.items() if n != name]
    assert not any(torch.equal(scales[name], other) for other in others)


@pytest.mark.parametrize("name", NAMES)
def test_an_update_without_any_completion_token_divides_by_nothing(name: str):
    scale = Reduction(name).scale(rollout_of([[], []]), UpdateSize(0, 0, 0))
    assert scale.shape == (0,)


def test_several_spans_of_a_row_count_as_one_row():
    rollout = rollout_of([[1, 2, 3], [4]])
    rollout.completion_mask[0, 2] = False  # what another speaker said
    size = UpdateSize(3, 2, 2)
    scale = Reduction("seq-mean-token-mean").scale(rollout, size)
    torch.testing.assert_close(scale, torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64))


def test_an_unknown_name_is_answered_by_the_nearest_and_by_all():
    with pytest.raises(
        ConfigError, match=r"'token-men' is not known. Did you mean token-mean\?"
    ) as error:
        Reduction("token-men")
    for name in NAMES:
        assert name in str(error.value)


@pytest.mark.parametrize(("name", "horizon"), [
    ("token-mean", 100),
    ("seq-mean-token-sum", 100),
    ("seq-mean-token-sum-norm", 0),
    ("seq-mean-token-sum-norm", -5),
])  # fmt: skip
def test_a_horizon_without_effect_or_below_one_is_refused(name: str, horizon: int):
    with pytest.raises(ConfigError) as error:
        Reduction(name, horizon=horizon)
    text = str(error.value)
    assert f"horizon={horizon} must be at least 1" in text and repr(name) in text
    assert "Leave horizon out or change the reduction" in text
