"""Measures of the failure modes on tables written by hand."""

import pytest
import torch

from opd_lightning.metrics.failure_modes import (
    by_position,
    engine_mismatch,
    imbalance,
    offending_tokens,
    token_mismatch,
    unreliable_teacher,
)
from opd_lightning.metrics.gradients import GradientVariance
from opd_lightning.metrics.tokens import COLUMNS, TokenTable


def table(
    ids: list[int], student: list[float], teacher: list[float], **columns: list
) -> TokenTable:
    size = len(ids)
    values = dict.fromkeys(COLUMNS, [0.0] * size) | {
        "token_id": ids,
        "position": list(range(size)),
        "counts": [1.0] * size,
        "student_logprob": student,
        "teacher_logprob": teacher,
    }
    values |= columns
    tokens = torch.tensor([values[name] for name in COLUMNS]).T
    rows = torch.tensor([[float(size), 1.0, 0.5, 12.0], [3.0, 0.0, 0.0, 80.0]])
    return TokenTable(tokens, rows)


def test_imbalance_of_ten_tokens():
    advantages = [-8.0, 1.0, -0.5, 0.0, 0.5, -1.0, -1.0, 2.0, -4.0, -2.0]
    found = imbalance(
        table([7, 1, 2, 3, 4, 5, 5, 6, 7, 8], [-1.0] * 10, [a - 1 for a in advantages])
    )
    assert found["imbalance/negative_frac"] == pytest.approx(0.6)
    assert found["imbalance/positive_frac"] == pytest.approx(0.3)
    assert found["imbalance/positive_part"] == pytest.approx(3.5 / 20)
    assert found["imbalance/share_of_top_10pct"] == pytest.approx(8 / 20)
    assert found["imbalance/share_of_top_10_ids"] == pytest.approx(1.0)
    assert found["imbalance/advantage_min"] == -8
    assert found["imbalance/advantage_max"] == 2
    assert found["imbalance/advantage_mean"] == pytest.approx(-1.3)


def test_masked_tokens_are_left_out_and_counted():
    counted = table([1, 2, 3], [-1.0] * 3, [-2.0, -50.0, -2.0], counts=[1.0, 0.0, 1.0])
    assert imbalance(counted)["imbalance/advantage_min"] == -1
    assert token_mismatch(counted, {})["mismatch/masked_frac"] == pytest.approx(1 / 3)


def test_mismatch_of_watched_tokens():
    found = token_mismatch(
        table([2, 2, 5, 6], [-0.1, -3.0, -0.2, -1.0], [-58.7, -20.0, -0.3, -2.0]),
        {2: "<end>", 9: "<other>"},
    )
    # of the two, one has a student that is not sure
    assert found["mismatch/ratio/<end>"] == pytest.approx(0.5)
    assert found["mismatch/advantage/<end>"] == pytest.approx(-(58.6 + 17) / 2, rel=1e-5)
    assert found["mismatch/watched_share"] == pytest.approx(75.6 / 76.7, rel=1e-5)
    assert found["mismatch/extreme_frac"] == pytest.approx(0.5)
    assert not any("<other>" in key for key in found)


def test_offending_tokens_are_ordered_by_their_share():
    found = offending_tokens(
        table([2, 2, 5, 6], [-0.1, -0.2, -0.2, -1.0], [-58.7, -20.0, -0.3, -2.0]), number=2
    )
    assert [entry["token_id"] for entry in found] == [2, 6]
    assert found[0]["count"] == 2
    assert found[0]["mismatched"] == 2
    assert found[0]["teacher_logprob"] == pytest.approx(-39.35)


def test_reliability_and_repetition():
    columns = {
        "overlap": [0.5, 1.0],
        "in_support": [1.0, 0.0],
        "student_entropy": [2.0, 1.0],
        "teacher_entropy": [1.0, 1.0],
        "repeated": [0.0, 1.0],
        "student_support_mass": [0.25, 0.75],
    }
    found = unreliable_teacher(table([1, 2], [-1.0, -10.0], [-2.0, -9.5], **columns))
    assert found["support/overlap"] == 0.75
    assert found["support/student_mass"] == 0.5
    assert found["support/miss_rate"] == 0.5
    assert found["teacher_reliability/entropy_gap"] == 0.5
    assert found["teacher_reliability/unlikely_samples"] == 0.5
    assert found["repetition/advantage_inside"] == 0.5
    assert found["repetition/advantage_outside"] == -1
    assert found["repetition/longest_loop"] == 80
    assert found["repetition/loop_rows"] == 0.5
    assert found["truncation/rows"] == 0.5


def test_unknown_numbers_are_left_out():
    nan = [float("nan")] * 2
    found = unreliable_teacher(table([1, 2], [-1.0, -1.0], [-2.0, -2.0], teacher_entropy=nan))
    assert "teacher_reliability/entropy_gap" not in found
    assert "repetition/advantage_inside" not in found  # nothing is repeated
    assert all(value == value for value in found.values())


def test_engine_mismatch_with_and_without_truncated_sampling():
    half = torch.tensor(0.5).log().item()
    sampled = {"sampling_logprob": [half, half]}
    found = engine_mismatch(table([1, 2], [half, 2 * half], [-1.0, -1.0], **sampled), False)
    assert found["rollout/probs_diff_max"] == pytest.approx(0.25)
    assert found["rollout/probs_diff_mean"] == pytest.approx(0.125)
    cut = engine_mismatch(table([1, 2], [half, 2 * half], [-1.0, -1.0], **sampled), True)
    assert cut == {"rollout/log_nucleus_mass": pytest.approx(half / 2)}
    unknown = {"sampling_logprob": [float("nan")] * 2}
    assert engine_mismatch(table([1, 2], [half] * 2, [-1.0] * 2, **unknown), False) == {}


def test_positions_are_put_into_buckets():
    advantages = [0.0, -1.0, -2.0, -3.0, -4.0]
    found = by_position(table([1] * 5, [-1.0] * 5, [a - 1 for a in advantages]), 2)
    assert [bucket["first"] for bucket in found] == [0, 2, 4]
    assert [bucket["tokens"] for bucket in found] == [2, 2, 1]
    assert [bucket["advantage"] for bucket in found] == [-0.5, -2.5, -4.0]
    assert found[1]["advantage_q01"] == -3


def test_gradient_variance_is_that_of_the_micro_batches():
    model = torch.nn.Sequential(torch.nn.Linear(4, 40, bias=False), torch.nn.LayerNorm(40))
    g = torch.Generator().manual_seed(0)
    parts, variance = [torch.randn(3, 4, generator=g) for _ in range(3)], GradientVariance()
    each = []
    for part in parts:
        loss = model(part).square().mean() + model(part)[0, 0]
        each.append(torch.autograd.grad(loss, model[1].bias, retain_graph=True)[0])
        loss.backward()
        variance.update(model)
    each = torch.stack(each)
    wanted = (each - each.mean(0)).square().sum(1).mean()
    assert variance.compute()["gradient/variance"] == pytest.approx(float(wanted), rel=1e-4)
    assert GradientVariance().compute() == {}
