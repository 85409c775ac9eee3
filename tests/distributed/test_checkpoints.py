"""Checkpoints of one process and of two, in one file and in shards, loaded by one and by two."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_lightning.checkpoints import is_sharded, load_checkpoint
from opd_lightning.tools.export import export
from tests.distributed.cases import Case
from tests.distributed.job import models, write
from tests.distributed.processes import run_together
from tests.distributed.resumed import SAVED
from tests.module.harness import distance


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    write(folder)
    models(folder / "models", Case())
    run_together("tests.distributed.resumed", [(folder, 0, 1), (folder, 0, 2), (folder, 1, 2)])
    return folder


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", SAVED)
def test_a_run_goes_on_from_each_as_if_it_had_not_stopped(folder: Path, name: str, processes: int):
    ends = torch.load(folder / f"ends_of_{processes}.pt", weights_only=True)
    whole = torch.load(folder / "ends_of_1.pt", weights_only=True)["whole"]
    assert distance(ends[name], whole) < 1e-6
    fresh = AutoModelForCausalLM.from_pretrained(folder / "models/llama_untied/student")
    assert distance(fresh.state_dict(), whole) > 1e-3, "nothing was trained"


def test_all_hold_the_same_and_only_the_student(folder: Path):
    plain, one_file, shards = (load_checkpoint(folder / f"{name}.ckpt") for name in SAVED)
    assert is_sharded(folder / "shards.ckpt") and (folder / "one_file.ckpt").is_file()
    for other in (one_file, shards):
        assert other.keys() == plain.keys()
        assert distance(other["state_dict"], plain["state_dict"]) < 1e-6
        assert all(name.startswith("student.model.") for name in other["state_dict"])
        (state,), (expected,) = other["optimizer_states"], plain["optimizer_states"]
        assert state["state"].keys() == expected["state"].keys()
        for number, moments in expected["state"].items():
            assert distance(state["state"][number], moments) < 1e-5, number
        (group,), (expected_group,) = state["param_groups"], expected["param_groups"]
        assert group["params"] == expected_group["params"]
        assert group["lr"] == expected_group["lr"]


@pytest.mark.parametrize("name", SAVED)
def test_export_takes_each(folder: Path, tmp_path: Path, name: str):
    export(str(folder / f"{name}.ckpt"), str(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = load_checkpoint(folder / f"{name}.ckpt")["state_dict"]
    state = {key.removeprefix("student.model."): value for key, value in state.items()}
    assert distance(model.state_dict(), state) == 0
