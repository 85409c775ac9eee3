"""Diagnostics in real runs of tiny models: numbers, files, words, the end of a collapsed run."""

import csv
import json
import logging
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from opd_lightning.callbacks.diagnostics import Diagnostics
from opd_lightning.errors import ConfigError
from opd_lightning.records import PromptBatch
from tests.module.harness import QUIET, answered, loader, module
from tests.tiny import tiny_tokenizer

LENGTHS = (9, 4, 12, 6)


def run(
    folder: Path,
    models: Path,
    callback: Diagnostics,
    batches: list[PromptBatch],
    **settings: object,
) -> L.Trainer:
    logger = CSVLogger(folder, name="", version="run", flush_logs_every_n_steps=1)
    trainer = L.Trainer(
        **QUIET | {"logger": logger, "callbacks": [callback]},
        max_steps=settings.pop("max_steps", len(batches)),
        default_root_dir=folder,
    )
    trainer.fit(module(models, **settings), loader(*batches))
    return trainer


def measured(folder: Path, step: int) -> dict:
    return json.loads((folder / "run" / "diagnostics" / f"step_{step:06d}.json").read_text())


def test_files_and_log_keys_of_the_due_steps(tmp_path: Path, models: Path):
    batches = [answered(LENGTHS, seed=seed) for seed in range(5)]
    run(tmp_path, models, Diagnostics(every=3, k=4, watch=["five"], figures_every=5), batches)
    found = sorted(path.name for path in (tmp_path / "run" / "diagnostics").iterdir())
    figures = ["offending_tokens.png", "positions.png", "sampled_tokens.png"]
    for step in (1, 4):  # the first and the last of those measured
        assert {f"step_{step:06d}_{figure}" for figure in figures} < set(found)
    assert [name for name in found if name.endswith(".json")] == [
        "step_000001.json",
        "step_000004.json",
    ]
    assert "support.png" in found
    with (tmp_path / "run" / "metrics.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    logged = {int(r["step"]): r for r in rows if r.get("diagnostics/support/overlap")}
    assert sorted(logged) == [1, 4]
    for key, value in measured(tmp_path, 4)["measures"].items():
        assert float(logged[4][f"diagnostics/{key}"]) == pytest.approx(value, abs=1e-9), key
    page = (tmp_path / "run" / "diagnostics" / "step_000001.html").read_text()
    assert page.count("<span") in LENGTHS


@pytest.mark.parametrize("micro_batch_tokens", [8, 30])
def test_micro_batches_change_no_measure(tmp_path: Path, models: Path, micro_batch_tokens: int):
    found = {}
    for name, budget in (("whole", None), ("split", micro_batch_tokens)):
        batch = [answered(LENGTHS)]
        callback = Diagnostics(every=1, k=4, figures_every=0)
        run(tmp_path / name, models, callback, batch, micro_batch_tokens=budget)
        found[name] = measured(tmp_path / name, 1)
    split = found["split"]["measures"]
    assert split.pop("gradient/variance") > 0
    assert split.pop("gradient/noise_to_signal") > 0
    assert split == pytest.approx(found["whole"]["measures"], rel=1e-4, abs=1e-5)
    for one, other in zip(
        found["split"]["by_position"], found["whole"]["by_position"], strict=True
    ):
        assert one == pytest.approx(other, abs=1e-5)


def test_only_the_first_update_of_a_round_is_measured(tmp_path: Path, models: Path):
    batches = [answered(LENGTHS, seed=seed) for seed in range(3)]
    callback = Diagnostics(every=4, k=4, figures_every=0)
    run(tmp_path, models, callback, batches, mini_batches=2, max_steps=6)
    files = sorted(path.name for path in (tmp_path / "run" / "diagnostics").glob("*.json"))
    assert files == ["step_000001.json", "step_000005.json"]
    assert sum(bucket["tokens"] for bucket in measured(tmp_path, 1)["by_position"]) == 9 + 4


def test_training_is_that_without_diagnostics(tmp_path: Path, models: Path):
    weights = []
    for every in (1, 1000):
        torch.manual_seed(0)
        batches = [answered(LENGTHS, seed=seed) for seed in range(3)]
        callback = Diagnostics(every=every, k=4, figures_every=0)
        trainer = run(tmp_path / str(every), models, callback, batches)
        weights.append(trainer.lightning_module.student.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_a_mismatch_is_told_with_what_to_do(
    tmp_path: Path, models: Path, caplog: pytest.LogCaptureFixture
):
    """The student is sure of token 77, which the teacher cannot say: rows of both heads are set."""
    token = 77
    batches = [answered((6, 6), seed=1), answered((6, 6), seed=2)]
    for batch in batches:
        batch.rollout.input_ids[:, -2] = token
    opd = module(models)
    logger = CSVLogger(tmp_path, name="", version="run")
    callback = Diagnostics(every=1, k=4, figures_every=0)
    trainer = L.Trainer(
        **QUIET | {"logger": logger, "callbacks": [callback, _Bend(token)]},
        max_steps=2,
        default_root_dir=tmp_path,
    )
    logging.getLogger("opd_lightning").propagate = True
    with caplog.at_level(logging.WARNING, logger="opd_lightning"):
        trainer.fit(opd, loader(*batches))
    warned = [r.getMessage() for r in caplog.records if "SpecialTokenMask" in r.getMessage()]
    assert len(warned) == 1, "once a run"
    assert f"(id {token})" in warned[0]
    assert f"tokens: [{token}]" in warned[0]
    offending = measured(tmp_path, 1)["offending_tokens"][0]
    assert offending["token_id"] == token
    assert offending["advantage"] < -10


class _Bend(L.Callback):
    """Gives both heads a bias at one token, for the student +30 and for the teacher -30."""

    def __init__(self, token_id: int) -> None:
        self.token_id = token_id

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object):
        for policy, shift in ((pl_module.student, 30.0), (pl_module.teacher.policy, -30.0)):
            head = policy.model.get_output_embeddings()
            bias = torch.zeros(head.weight.shape[0])
            bias[self.token_id] = shift
            head.bias = torch.nn.Parameter(bias, requires_grad=False)


def test_a_collapsed_run_is_ended_if_asked(tmp_path: Path, models: Path):
    """Completions of one token over and over: all 4-grams but the first are repeated."""
    batches = [answered((20, 20), seed=seed) for seed in range(6)]
    for batch in batches:
        batch.rollout.input_ids[batch.rollout.completion_mask] = 5
    callback = Diagnostics(every=1, k=4, figures_every=0, stop_on_collapse=2)
    trainer = run(tmp_path, models, callback, batches)
    assert trainer.global_step == 2
    patient = Diagnostics(every=1, k=4, figures_every=0)
    assert run(tmp_path / "patient", models, patient, batches).global_step == 6
    found = measured(tmp_path, 1)["measures"]
    assert found["repetition/ngrams"] == pytest.approx(16 / 17)
    assert found["repetition/longest_loop"] == 20


@pytest.mark.parametrize("name, least", [("every", 0), ("k", 1), ("position_bucket", 1)])
def test_settings_out_of_range_are_refused(name: str, least: int):
    with pytest.raises(ConfigError, match=f"{name} must be at least {least}; got {least - 1}"):
        Diagnostics(**{name: least - 1})


def test_never_is_never(tmp_path: Path, models: Path):
    run(tmp_path, models, Diagnostics(every=0), [answered(LENGTHS)])
    assert not (tmp_path / "run" / "diagnostics").exists()


def test_every_key_is_in_the_documentation(tmp_path: Path, models: Path):
    page = (Path(__file__).parents[2] / "docs" / "diagnostics.md").read_text()
    documented = set(re.findall(r"`([a-z_]+/[a-z0-9_<>/]+)`", page))
    callback = Diagnostics(every=1, k=4, figures_every=0, watch=["five"])
    batch = answered((20, 6))
    mask = batch.rollout.completion_mask
    batch.rollout.input_ids[0, mask[0]] = torch.tensor(4 * [9, 8, 7, 6, 5])
    batch.rollout.sampling_logprobs = torch.full(mask.shape, -1.0)
    watched = tiny_tokenizer().encode("five")[0]
    batch.rollout.input_ids[1, mask[1]] = torch.tensor([watched, 2, 3, 4, 5, 6])
    run(tmp_path, models, callback, [batch], micro_batch_tokens=1)
    kinds = {
        re.sub(r"^(mismatch/(?:ratio|advantage)/).*", r"\1<token>", key)
        for key in measured(tmp_path, 1)["measures"]
    }
    assert kinds == documented - {"rollout/log_nucleus_mass"}
