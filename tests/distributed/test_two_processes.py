"""Two real processes, by FSDP2 and by DDP, end where one does: weights, rollouts, logged values."""

from typing import Any

import pytest
import torch

from tests.distributed.cases import cases
from tests.distributed.job import CLIP, UPDATES, models, write
from tests.distributed.processes import run_together
from tests.module.harness import distance

CASES = cases()


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What [the one process] and [the first, the second of two] end with, by case."""
    one, two = (tmp_path_factory.mktemp("job") / name for name in ("one", "two"))
    for folder in (one, two):
        folder.mkdir()
        write(folder)
        for case in CASES.values():
            models(folder / "models", case)
    jobs = [(one, 0, 1), (two, 0, 2), (two, 1, 2)]
    run_together("tests.distributed.job", jobs)
    loaded = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for folder, rank, _ in jobs]
    return [loaded[:1], loaded[1:]]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_end_where_one_does(ends: list[list[dict[str, Any]]], name: str):
    ((one,), (first, second)) = ([end[name] for end in ends_of] for ends_of in ends)
    assert distance(first["weights"], one["weights"]) < CASES[name].tolerance
    if CASES[name].tolerance > 1e-5:
        return
    drawn = {key: ids for key, ids in (first["drawn"] | second["drawn"]).items() if key[2] != "-"}
    assert drawn == one["drawn"]
    for alone, shared in zip(one["lines"], first["lines"], strict=True):
        assert alone.keys() == shared.keys()
        for key in alone.keys() - {"perf/padding_fraction"}:
            if not key.startswith("perf/"):
                assert shared[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6), key


def test_the_cases_are_as_uneven_as_they_should_be(ends: list[list[dict[str, Any]]]):
    """Otherwise the equalities above would say little."""
    ((one,), (first, second)) = ends
    for name, case in CASES.items():
        lengths = {len(ids) for ids in one[name]["drawn"].values()}
        assert min(lengths) < 3 and max(lengths) == 12, name
        full, empty = zip(first[name]["micro_batches"], second[name]["micro_batches"], strict=True)
        if case.tolerance <= 1e-5 and "micro_batch_tokens" not in case.settings:
            assert sum(empty) > 0, f"{name}: no rank had an empty micro-batch"
            assert min(full) > UPDATES
        norms = [line["grad_norm"] for line in one[name]["lines"] if "grad_norm" in line]
        updates = UPDATES * case.settings.get("mini_batches", 1)
        assert len(norms) == updates
        assert min(norms) > CLIP, name
        validated = first[name]["drawn"].keys() | second[name]["drawn"].keys()
        assert any(key[2] == "-" for key in validated), f"{name}: no rank was without a prompt"


def test_each_process_holds_its_share(ends: list[list[dict[str, Any]]]):
    ((one,), (first, second)) = ends
    for name, case in CASES.items():
        if case.strategy != "fsdp2":
            continue
        weights = one[name]["weights"]
        whole = sum(value.numel() for value in weights.values())
        if case.tied:
            whole -= weights["lm_head.weight"].numel()
        if case.sharding.get("replicas") == 2:
            assert first[name]["held"] == second[name]["held"] == whole
        else:
            assert first[name]["held"] + second[name]["held"] == whole, name
            assert abs(first[name]["held"] - second[name]["held"]) < 0.1 * whole
