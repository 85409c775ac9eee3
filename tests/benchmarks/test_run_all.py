"""The page holds what the newest results say, and what cannot be run stops with its name."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import common, run_all


def found(finished: str = "2026-01-02T03:04:05+00:00", **results: dict) -> dict:
    return {
        "finished": finished,
        "small": True,
        "machine": {"processor": "abacus"},
        "versions": {"torch": "2"},
        "seconds": dict.fromkeys(results, 1),
        "results": results,
    }


def test_the_page_is_the_table_of_the_newest_results() -> None:
    page, newest = run_all.PAGE.read_text(), run_all.newest()
    if newest is None:
        expected = dict.fromkeys(("machine", *run_all.SECTIONS), run_all.NOT_MEASURED)
    else:
        expected = run_all.blocks(newest)
    assert {name: run_all.part(page, name) for name in expected} == expected


def test_filling_changes_what_stands_between_the_markers_only() -> None:
    page = "a\n\n<!-- generated: loss -->\n\nold\n\n<!-- end: loss -->\n\nb\n"
    new = run_all.filled(page, {"loss": "| new |\n\n\\1"})
    assert new == page.replace("old", "| new |\n\n\\1")
    assert run_all.part(new, "loss") == "| new |\n\n\\1"


def test_a_page_without_a_place_says_what_to_add() -> None:
    with pytest.raises(common.BenchmarkError, match=r"no place for 'loss'.*generated: loss"):
        run_all.filled("nothing", {"loss": "x"})


def test_the_newest_results_are_those_that_were_finished_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run_all, "RESULTS", tmp_path)
    assert run_all.newest() is None
    for name, day in (("z", "01"), ("a", "03"), ("m", "02")):
        text = run_all.json.dumps(found(f"2026-01-{day}T00:00:00+00:00"))
        (tmp_path / f"{name}.json").write_text(text)
    assert run_all.newest()["finished"].startswith("2026-01-03")


def test_sections_that_were_not_run_again_are_kept() -> None:
    before = found(loss={"a": 1}, step={"a": 1})
    both = run_all.merged(found(step={"a": 2}), before)
    assert both["results"] == {"loss": {"a": 1}, "step": {"a": 2}}


def test_results_of_other_versions_do_not_stand_beside_new_ones() -> None:
    before = found(loss={}, step={}) | {"versions": {"torch": "1"}}
    with pytest.raises(common.BenchmarkError, match="another versions"):
        run_all.merged(found(step={}), before)
    assert run_all.merged(found(loss={}, step={}), before)["versions"] == {"torch": "2"}


def test_a_missing_script_is_named() -> None:
    with pytest.raises(common.BenchmarkError, match=r"benchmarks/nothing\.py cannot be used"):
        run_all.scripts(["nothing"])
    with pytest.raises(common.BenchmarkError, match=r"decisions\.py has no function run"):
        run_all.scripts(["decisions"])


def test_a_failing_check_stops_with_the_name_of_its_benchmark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(small: bool) -> dict:
        raise common.BenchmarkError("the losses differ by 0.1")

    monkeypatch.setattr(run_all, "scripts", lambda names: {"step": SimpleNamespace(run=run)})
    with pytest.raises(common.BenchmarkError, match=r"step\.py stopped: the losses differ by 0\.1"):
        run_all.measure(["step"], small=True)
