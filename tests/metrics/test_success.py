"""avg@k, pass@k, success rate against enumeration; intervals; splits over updates and ranks."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opd_lightning.errors import ConfigError
from opd_lightning.metrics import AverageAtK, PassAtK, SuccessRate, compare_pairs
from opd_lightning.metrics.success import PromptMetric, bootstrap_means

SCORES = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0.5, 0.9, 1, 0, 0]])
INDEX = torch.tensor([0, 1, 2, 3])


def computed(metric: PromptMetric) -> float:
    metric.update(SCORES, INDEX)
    return metric.compute().mean


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_mean_over_all_choices_of_k(k: int):
    of_prompts = [
        sum(max(choice) >= 1 for choice in chosen) / len(chosen)
        for row in SCORES.tolist()
        for chosen in [list(itertools.combinations(row, k))]
    ]
    assert computed(PassAtK(k)) == pytest.approx(sum(of_prompts) / 4, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_pass_at_k_is_unbiased(k: int):
    """Its expectation over all outcomes of n completions is 1 - (1 - p)^k."""
    p, n = 0.3, 4
    outcomes = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))
    chances = (p**outcomes * (1 - p) ** (1 - outcomes)).prod(dim=1).double()
    expected = (chances * PassAtK(k).of_prompts(outcomes)).sum()
    assert float(expected) == pytest.approx(1 - (1 - p) ** k, abs=1e-6)


def test_average_and_success_rate():
    assert computed(AverageAtK()) == pytest.approx((0.4 + 0 + 1 + 0.48) / 4)
    assert computed(SuccessRate()) == pytest.approx((0.4 + 0 + 1 + 0.2) / 4)
    assert computed(SuccessRate(threshold=0.5)) == pytest.approx((0.4 + 0 + 1 + 0.6) / 4)
    assert computed(PassAtK(5, threshold=0.5)) == pytest.approx(0.75)


def test_interval_against_enumeration():
    """Three prompts have 27 resamples: the bootstrap's quantiles are those of all of them."""
    values = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    exact = torch.tensor([sum(draw) / 3 for draw in itertools.product([0.0, 0.0, 1.0], repeat=3)])
    metric = AverageAtK(level=0.9, resamples=20_000)
    metric.update(values[:, None], torch.arange(3))
    estimate = metric.compute()
    ends = exact.double().quantile(torch.tensor([0.05, 0.95], dtype=torch.float64))
    assert [estimate.low, estimate.high] == pytest.approx(ends.tolist())
    means = bootstrap_means(values, 20_000, seed=1)
    assert float(means.mean()) == pytest.approx(1 / 3, abs=0.01)
    assert float(means.var()) == pytest.approx(float(exact.var(unbiased=False)), rel=0.05)


def test_interval_covers_at_its_level():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(100):
        metric = AverageAtK(level=0.8, resamples=100, seed=trial)
        values = (torch.rand(60, 1, generator=generator) < 0.4).float()
        metric.update(values, torch.arange(60))
        low, high = metric.compute()[1:]
        covered += low <= 0.4 <= high
    assert 68 <= covered <= 91  # 80 expected, standard deviation 4


def test_interval_is_a_function_of_the_seed_and_narrows_with_the_level():
    def of(**settings: float) -> tuple[float, float]:
        metric = AverageAtK(**settings)
        metric.update(torch.linspace(0, 1, 40)[:, None], torch.arange(40))
        return metric.compute()[1:]

    assert of(seed=3) == of(seed=3) != of(seed=4)
    (low, high), (inner_low, inner_high) = of(level=0.95), of(level=0.5)
    assert low < inner_low < 0.5 < inner_high < high


def test_splits_and_order_change_nothing():
    whole, split = PassAtK(2), PassAtK(2)
    whole.update(SCORES, INDEX)
    for part in ([3], [], [0, 2], [1]):
        split.update(SCORES[part], INDEX[part])
    assert split.compute() == whole.compute()
    merged, other = PassAtK(2), PassAtK(2)
    merged.update(SCORES[2:], INDEX[2:])
    other.update(SCORES[:2], INDEX[:2])
    merged.merge_state(other)
    assert merged.compute() == whole.compute()


def test_no_prompts_are_no_number():
    metric = AverageAtK()
    metric.update(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    assert all(value != value for value in metric.compute())


def test_two_ranks_with_unequal_shares_equal_one(tmp_path: Path):
    """Real gloo processes: rank 1 has no prompt in one of two rounds."""
    script = Path(__file__).with_name("two_ranks.py")
    processes = [
        subprocess.Popen([sys.executable, str(script), str(tmp_path / "store"), str(rank)],
                         stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]  # fmt: skip
    lines = [process.communicate(timeout=240)[0].strip() for process in processes]
    whole = [AverageAtK(), PassAtK(2)]
    for metric in whole:
        metric.update(SCORES, INDEX)
    wanted = repr([tuple(metric.compute()) for metric in whole])
    assert lines == [wanted, wanted]


def test_pairs():
    first = torch.tensor([0.0, 0.5, 1.0, 0.2])
    second = torch.tensor([1.0, 0.5, 0.5, 0.6])
    found = compare_pairs(first, second, resamples=20_000)
    assert found.difference.mean == pytest.approx(0.225)
    assert (found.wins, found.losses, found.ties) == (2, 1, 1)
    exact = torch.tensor([sum(d) / 4 for d in itertools.product([1.0, 0, -0.5, 0.4], repeat=4)])
    ends = exact.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert [found.difference.low, found.difference.high] == pytest.approx(ends, abs=0.03)
    back = compare_pairs(second, first)
    assert (back.wins, back.losses) == (1, 2)
    assert back.difference.mean == -found.difference.mean


def test_pairing_removes_what_prompts_have_in_common():
    base = torch.linspace(0, 0.9, 50)
    paired = compare_pairs(base, base + 0.1).difference
    assert paired.low == pytest.approx(0.1) and paired.high == pytest.approx(0.1)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: PassAtK(0), "k of at least 1; got 0"),
    (lambda: PassAtK(6).update(SCORES, INDEX), "at least 6 completions a prompt; there are 5"),
    (lambda: AverageAtK(level=95), "such as 0.95; got 95"),
    (lambda: AverageAtK(resamples=0), "resamples must be at least 1; got 0"),
    (lambda: compare_pairs(INDEX, INDEX[:3]), "4 and 3 prompts"),
])  # fmt: skip
def test_refuses(call: object, message: str):
    with pytest.raises(ConfigError, match=message):
        call()
