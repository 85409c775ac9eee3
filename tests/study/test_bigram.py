"""`opd study bigram`: the digits of the tables, and the estimators against plain definitions."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_lightning.errors import ConfigError
from opd_lightning.objectives import SampledTokenReverseKL, SequenceReverseKL
from opd_lightning.study import bigram as study
from opd_lightning.study.bigram import Bigram, all_completions, bigram, exact_rows, sampled_rows
from opd_lightning.study.tables import Row, read_csv

GAMMAS = [0, 0.25, 0.5, 0.75, 1]
# T: sequence KL; relative bias by gamma; variance by gamma, and of gamma 0 with the KL baseline
EXACT = {
    1: ("0.586", ["0"] * 5, ["0.686"] * 5, "0.677"),
    2: (
        "0.754",
        ["0.145", "0.109", "0.0725", "0.0362", "0"],
        ["0.874", "0.860", "0.875", "0.920", "0.994"],
        "0.873",
    ),
    4: (
        "1.252",
        ["0.174", "0.129", "0.0851", "0.0420", "0"],
        ["1.49", "1.60", "1.90", "2.58", "4.05"],
        "1.44",
    ),
    6: (
        "1.742",
        ["0.194", "0.143", "0.0942", "0.0465", "0"],
        ["2.09", "2.34", "2.99", "4.68", "9.79"],
        "1.98",
    ),
    8: (
        "2.231",
        ["0.202", "0.149", "0.0978", "0.0482", "0"],
        ["2.68", "3.08", "4.09", "7.00", "18.7"],
        "2.52",
    ),
}
# variance at T = 4, 8, 16, 32, 64, 128 (three digits), slope over the last three (two decimals)
SAMPLED = {
    "gamma 0": ([1.49, 2.68, 5.07, 9.87, 19.4, 38.5], 0.98),
    "gamma 0.5": ([1.91, 4.09, 8.53, 17.3, 34.9, 70.3], 1.01),
    "gamma 1": ([4.08, 18.7, 98.1, 577, 3940, 28300], 2.81),
    "whole cost R S": ([8.31, 44.9, 265, 1640, 11400, 83900], 2.84),
}


@cache
def exact() -> list[Row]:
    return exact_rows()


@cache
def sampled() -> list[Row]:
    return sampled_rows()


def assert_shown(value: float, printed: str) -> None:
    if printed == "0":
        assert value < 1e-12
    else:
        assert f"{value:.{len(printed.partition('.')[2])}f}" == printed


@pytest.mark.parametrize("length", EXACT)
def test_exact_bias_and_variance_are_those_of_the_table(length: int):
    kl, biases, variances, with_baseline = EXACT[length]
    rows = [row for row in exact() if row["tokens"] == length]
    assert [row["gamma"] for row in rows] == [*GAMMAS, 0]
    for row, bias, variance in zip(
        rows, [*biases, biases[0]], [*variances, with_baseline], strict=True
    ):
        assert_shown(row["sequence_kl"], kl)
        assert_shown(row["relative_bias"], bias)
        assert_shown(row["variance"], variance)
    assert [row["baseline"] for row in rows] == ["none"] * 5 + ["kl"]


@pytest.mark.parametrize("length", EXACT)
def test_the_page_shows_the_same_digits(length: int):
    kl, biases, variances, with_baseline = EXACT[length]
    pairs = [f"{b} / {v}" for b, v in zip(biases, variances, strict=True)]
    line = f"| {' | '.join([str(length), kl, *pairs, with_baseline])} |"
    assert line in (Path(__file__).parents[2] / "docs" / "study.md").read_text().splitlines()


@pytest.mark.parametrize("length", [4, 6, 8])
def test_bias_falls_and_variance_rises_with_gamma(length: int):
    rows = [r for r in exact() if r["tokens"] == length and r["baseline"] == "none"]
    assert np.all(np.diff([r["relative_bias"] for r in rows]) < 0)
    assert np.all(np.diff([r["variance"] for r in rows]) > 0)


@pytest.mark.parametrize("length", [2, 4, 6, 8])
def test_the_baseline_lowers_the_variance_and_leaves_the_mean(length: int):
    plain, baseline = [r for r in exact() if r["tokens"] == length and r["gamma"] == 0]
    assert baseline["variance"] < plain["variance"]
    assert baseline["relative_bias"] == pytest.approx(plain["relative_bias"], abs=1e-12)


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_variances_and_slopes_are_those_of_the_table(name: str):
    (row,) = [row for row in sampled() if row["estimator"] == name]
    variances, slope = SAMPLED[name]
    found = [row[f"variance_{n}"] for n in (4, 8, 16, 32, 64, 128)]
    assert [float(f"{v:.3g}") for v in found] == pytest.approx(variances, rel=0.002)
    assert round(row["slope"], 2) == slope


@pytest.mark.parametrize("gamma", [0, 0.5, 1])
def test_sampled_variance_agrees_with_the_exact_one(gamma: float):
    (row,) = [row for row in sampled() if row["estimator"] == f"gamma {gamma:g}"]
    for length in (4, 8):
        (wanted,) = [
            r["variance"]
            for r in exact()
            if (r["tokens"], r["gamma"], r["baseline"]) == (length, gamma, "none")
        ]
        assert row[f"variance_{length}"] == pytest.approx(wanted, rel=0.05)


def test_another_seed_moves_the_samples_and_hardly_the_slopes():
    rows = sampled_rows((16, 32, 64), num_completions=2000, seed=1)
    again = sampled_rows((16, 32, 64), num_completions=2000, seed=1)
    other = sampled_rows((16, 32, 64), num_completions=2000, seed=2)
    assert rows == again
    assert rows != other
    assert [row["slope"] for row in rows] == pytest.approx([1, 1, 2.7, 2.75], abs=0.2)


def plain_gradient(model: Bigram, tokens: Tensor, gamma: float) -> Tensor:
    """sum_t (sum_{t' >= t} gamma^(t'-t) r_t') grad log pi(y_t), token by token; [4, 3]."""
    log_p, log_q = model.student.log_softmax(1), model.teacher.log_softmax(1)
    ids = tokens.tolist()
    seen = [3, *ids[:-1]]
    costs = [float(log_p[s, y] - log_q[s, y]) for s, y in zip(seen, ids, strict=True)]
    total = torch.zeros(4, 3, dtype=torch.float64)
    for t, (s, y) in enumerate(zip(seen, ids, strict=True)):
        g = sum(gamma**i * cost for i, cost in enumerate(costs[t:]))
        total[s] -= g * log_p[s].exp()
        total[s, y] += g
    return total


@pytest.mark.parametrize("gamma", [0, 0.5, 1])
def test_an_estimator_is_the_sum_over_tokens_by_its_definition(gamma: float):
    model = Bigram.draw()
    tokens = model.sample(5, 7, np.random.default_rng(3))
    wanted = torch.stack([plain_gradient(model, row, gamma) for row in tokens])
    found = model.estimator(SequenceReverseKL(gamma=gamma))(tokens)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_the_sequence_kl_is_that_of_all_completions():
    model, tokens = Bigram.draw(), all_completions(4)
    p = model.probabilities(tokens)
    q = Bigram(model.teacher, model.teacher).probabilities(tokens)
    assert float(p.sum()) == pytest.approx(1, abs=1e-14)
    wanted = float((p * (p / q).log()).sum())
    assert float(model.sequence_kl(4)) == pytest.approx(wanted, abs=1e-13)


def test_the_exact_gradient_is_a_difference_quotient():
    model, step = Bigram.draw(), 1e-5
    gradient = model.exact_gradient(6)
    for place in ((3, 0), (0, 2), (1, 1)):
        nudge = torch.zeros(4, 3, dtype=torch.float64)
        nudge[place] = step
        ends = [model.sequence_kl(6, model.student + sign * nudge) for sign in (1, -1)]
        assert float(gradient[place]) == pytest.approx(
            float(ends[0] - ends[1]) / 2 / step, abs=1e-9
        )


def test_the_non_causal_estimator_is_unbiased_and_noisier():
    model, tokens = Bigram.draw(), all_completions(4)
    p = model.probabilities(tokens)
    mean, variance = study.mean_and_variance(model.non_causal(tokens), p)
    torch.testing.assert_close(mean, model.exact_gradient(4), rtol=0, atol=1e-13)
    causal = study.mean_and_variance(model.estimator(SequenceReverseKL(gamma=1.0))(tokens), p)[1]
    assert variance > 1.5 * causal


def test_samples_follow_the_student():
    model = Bigram.draw()
    tokens = model.sample(2, 200_000, np.random.default_rng(0))
    counts = torch.bincount(3 * tokens[:, 0] + tokens[:, 1], minlength=9) / len(tokens)
    # standard error of a share is at most 0.0012
    torch.testing.assert_close(
        counts.double(), model.probabilities(all_completions(2)), rtol=0, atol=0.005
    )


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    whole = sampled_rows((2, 3, 5), num_completions=101)
    monkeypatch.setattr(study, "_TOKENS_AT_ONCE", 50)
    parts = sampled_rows((2, 3, 5), num_completions=101)
    for a, b in zip(whole, parts, strict=True):
        assert list(a.values())[1:] == pytest.approx(list(b.values())[1:], rel=1e-12)


def test_token_level_distillation_is_gamma_zero():
    model, tokens = Bigram.draw(), all_completions(3)
    a = model.estimator(SampledTokenReverseKL())(tokens)
    assert torch.equal(a, model.estimator(SequenceReverseKL(gamma=0.0))(tokens))


def test_the_files_are_written_and_read_back(tmp_path: Path):
    paths = bigram(tmp_path / "out", num_completions=200)
    assert [p.name for p in paths] == ["bigram.csv", "bigram_slopes.csv", "bigram.png"]
    assert read_csv(paths[0]) == exact()
    assert read_csv(paths[1]) == sampled_rows(num_completions=200)
    assert paths[2].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert paths[2].stat().st_size > 20_000


def test_a_variance_or_slope_of_too_little_is_refused():
    with pytest.raises(ConfigError, match=r"lengths must be at least 3; got 2\. The slope"):
        sampled_rows((4, 8))
    with pytest.raises(ConfigError, match=r"num_completions must be at least 2; got 1\. One"):
        sampled_rows(num_completions=1)
