"""The exponents are those of the data, and what grows too fast is seen."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import common, scaling


def sizes() -> dict:
    return scaling.SMALL | {"points": {"tokens": [1, 2, 4, 8]}, "repeats": 1}


def answers(power: dict[str, float]):
    """Stands in for the processes: seconds and peaks that grow by these powers."""

    def run_case(function: Callable, name: str, sizes: dict, exact_memory: bool = True) -> dict:
        scale = 0.1 if function.__name__ == "seconds" else 100 * common.MIB
        points = sizes["points"][name]
        return {"loss": [scale * p ** power[function.__name__] for p in points]}

    return run_case


@pytest.mark.parametrize("power", [0.0, 1.0, 1.7])
def test_an_exponent_is_the_power_of_the_size(power: float) -> None:
    points = [3, 6, 12, 24]
    assert scaling.exponent(points, [5 * p**power for p in points]) == pytest.approx(power)


def test_time_above_linear_is_flagged_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "run_case", answers({"seconds": 1.5, "peaks": 0.0}))
    result = scaling.measure(sizes())
    assert result["time_above_limit"] == ["loss over tokens N: exponent 1.50, limit 1"]
    assert "**Time grows faster than it should: loss over tokens N" in scaling.table(result)


def test_linear_growth_is_not_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "run_case", answers({"seconds": 1.0, "peaks": 1.0}))
    result = scaling.measure(sizes())
    assert result["time_above_limit"] == []
    assert "| loss | tokens N, 1 to 8 | 1.00 | 1.00 | 1 | 0.1 → 0.8 | 100 → 800 |" in (
        scaling.table(result)
    )


def test_memory_above_linear_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "run_case", answers({"seconds": 1.0, "peaks": 1.5}))
    with pytest.raises(common.BenchmarkError, match=r"loss over tokens N: exponent 1\.50"):
        scaling.measure(sizes())


def test_the_same_numbers_draw_the_same_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(common, "run_case", answers({"seconds": 1.0, "peaks": 1.0}))
    result = scaling.measure(sizes())
    for name in ("a", "b"):
        scaling.figure(result, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_each_axis_measures_both_time_and_memory_at_each_point() -> None:
    small = {
        "loss": {"tokens": 8, "vocab_size": 64, "k": 4, "hidden_size": 16},
        "step": {"length": 12, "rows": 2, "depth": 1, "hidden_size": 64, "vocab_size": 64},
        "points": {"tokens": [4, 8], "k": [2, 4], "depth": [1, 2]},
        "repeats": 1,
    }
    for name, whats in {
        "tokens": {"TopKReverseKL(k=4)", "ReverseKL"},
        "k": {"TopKReverseKL"},
        "depth": {"update", "rollout"},
    }.items():
        for measured in (scaling.seconds(name, small), scaling.peaks(name, small)):
            assert set(measured) == whats
            assert all(len(values) == 2 for values in measured.values())
