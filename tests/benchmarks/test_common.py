"""The harness measures what it says."""

import time

import pytest
import torch

from benchmarks import common


def allocating(mib: int) -> dict[str, float]:
    """A case: keep 50 MB, then allocate `mib` MiB for a moment."""
    kept = torch.ones(50 * common.MIB, dtype=torch.uint8)
    found = common.measure(lambda: torch.ones(mib * common.MIB, dtype=torch.uint8))
    return found | {"kept": int(kept[0])}


def failing() -> dict[str, float]:
    """A case that fails."""
    raise RuntimeError("the sum of 2 and 2 is 5")


def test_a_case_reports_what_it_allocates_and_not_what_was_there_before() -> None:
    found = common.run_case(allocating, mib=200)
    assert 195 < common.mib(found["peak_bytes"]) < 215


def test_the_peak_of_one_measurement_is_not_that_of_an_earlier_larger_one() -> None:
    peaks = []
    for mib in (150, 40):
        with common.PeakMemory() as memory:
            torch.ones(mib * common.MIB, dtype=torch.uint8)
        peaks.append(common.mib(memory.peak_bytes))
    assert 145 < peaks[0] < 165
    assert 35 < peaks[1] < 55


def test_memory_is_sampled_where_the_kernel_keeps_no_high_water_mark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(common, "_reset_high_water_mark", lambda: False)
    with common.PeakMemory() as memory:
        kept = torch.ones(100 * common.MIB, dtype=torch.uint8)
        time.sleep(0.1)
    assert kept[0] == 1
    assert 95 < common.mib(memory.peak_bytes) < 115


def test_a_failing_case_says_which_and_why() -> None:
    with pytest.raises(common.BenchmarkError, match=r"test_common:failing(.|\n)*2 and 2 is 5"):
        common.run_case(failing)


def test_seconds_are_those_of_the_work_without_its_warm_up() -> None:
    pauses = iter([0.5, 0.05, 0.05, 0.05])
    found = common.measure(lambda: time.sleep(next(pauses)), repeats=3, warm_up=1)
    assert 0.05 <= found["seconds"] < 0.2


def test_the_ratio_is_the_median_over_pairs_and_not_the_ratio_of_medians() -> None:
    theirs, ours = [10.0, 40.0, 3.0], [5.0, 10.0, 3.0]
    # pairs: 2, 4, 1; medians: 10 / 5 = 2 as well, so take one where they differ
    assert common.ratio(theirs, ours) == 2.0
    assert common.ratio([10.0, 40.0, 30.0], [1.0, 20.0, 10.0]) == 3.0  # medians: 30 / 10
    assert common.ratio([4.0, 9.0, 10.0], [4.0, 1.0, 5.0]) == 2.0  # medians: 9 / 4
    with pytest.raises(ValueError, match="shorter"):
        common.ratio([1.0, 2.0], [1.0])


def test_cases_take_turns_and_every_other_round_goes_backwards() -> None:
    order: list[str] = []

    def case(name: str) -> dict[str, int]:
        order.append(name)
        return {"turn": len(order)}

    found = common.interleave({"a": lambda: case("a"), "b": lambda: case("b")}, rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [{"turn": 1}, {"turn": 4}, {"turn": 5}],
                     "b": [{"turn": 2}, {"turn": 3}, {"turn": 6}]}  # fmt: skip


def test_a_table_has_three_digits_and_numbers_on_the_right() -> None:
    assert common.markdown(["name", "s"], [["a", 0.012345], ["b", 1234.5], ["c", 99.96]]) == (
        "| name | s |\n| --- | ---: |\n| a | 0.0123 |\n| b | 1234 |\n| c | 100 |"
    )


def test_machine_and_versions_do_not_name_the_host() -> None:
    import platform

    described = str(common.machine()) + str(common.versions())
    assert torch.__version__ in described
    assert platform.node() not in described
