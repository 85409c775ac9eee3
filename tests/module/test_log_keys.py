"""The keys that runs log are those of the table in docs/log_keys.md, on steps that are updates."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.data import OPDDataModule
from opd_lightning.distributions import TokenDistribution, TopKDistribution
from opd_lightning.objectives import (
    Mixture,
    Objective,
    ReverseKL,
    SampledTokenReverseKL,
    SequenceReverseKL,
    TopKReverseKL,
)
from opd_lightning.records import Rollout
from opd_lightning.teachers import LocalTeacher
from opd_lightning.weighting import SpecialTokenMask
from tests.module.harness import csv_logger, fit, logged, module, rollouts, until, write_prompts

TABLE = Path(__file__).parents[2] / "docs" / "log_keys.md"


class TopKTeacher(LocalTeacher):
    """Hands over its 8 likeliest tokens and the sampled one, as a served teacher does."""

    provides = "topk"

    def read(self, rollout: Rollout, reader: Callable, temperature: float = 1.0) -> Any:
        def cut(whole: TokenDistribution) -> TopKDistribution:
            with torch.no_grad():
                return TopKDistribution(*whole.topk(8), whole.logprobs(rollout.token_ids))

        whole = super().read(rollout, lambda teacher: cut(teacher), temperature)
        return reader(whole)


ALWAYS = {
    "loss",
    "grad_norm",
    "lr",
    "weights/masked_frac",
    "completions/mean_length",
    "completions/clipped_ratio",
    "completions/tokens",
    "perf/step_seconds",
    "perf/tokens_per_second",
    "perf/padding_fraction",
    "perf/rollout_seconds",
    "perf/teacher_seconds",
    "perf/student_seconds",
    "perf/optimizer_seconds",
    "entropy",
}
EVALUATED = {"completions/mean_length", "completions/clipped_ratio", "entropy"}
WHOLE = {"kl/reverse", "teacher/entropy"}
SAMPLED = {"kl/reverse_k1", "advantage/mean", "advantage/negative_frac"}
# name -> objective, whether the teacher gives the top K only, and the keys beside ALWAYS
RUNS: dict[str, tuple[Objective, bool, set[str]]] = {
    "TopKReverseKL": (TopKReverseKL(4), False, WHOLE | {"teacher/support_mass"}),
    "bucket": (
        TopKReverseKL(4, tail="bucket"),
        True,
        {"kl/reverse_k1", "teacher/support_mass", "student/support_mass"},
    ),
    "SampledTokenReverseKL": (SampledTokenReverseKL(), False, WHOLE | SAMPLED),
    "clipped": (
        SampledTokenReverseKL(clip_ratio=0.2, dual_clip=3.0),
        False,
        WHOLE | SAMPLED | {"loss/ratio_clipped_frac", "loss/ratio_dual_clipped_frac"},
    ),
    "clipped sequences": (
        SequenceReverseKL(clip_ratio=0.2),
        False,
        WHOLE | SAMPLED | {"loss/ratio_clipped_frac"},
    ),
    "top-p": (
        TopKReverseKL(4, support="top-p"),
        True,
        {"kl/reverse_k1", "teacher/support_mass", "teacher/support_size"},
    ),
    "importance": (
        SampledTokenReverseKL(importance_cap=2.0),
        False,
        WHOLE | SAMPLED | {"importance/weight", "importance/ess"},
    ),
    "mixture": (
        Mixture([ReverseKL(), SampledTokenReverseKL(importance_cap=2.0)]),
        False,
        WHOLE
        | SAMPLED
        | {"importance/weight", "importance/ess"}
        | {"loss/ReverseKL", "loss/SampledTokenReverseKL"},
    ),
    "ReverseKL": (ReverseKL(), False, WHOLE),
    "auto": (ReverseKL(), False, WHOLE | {"perf/micro_batch_tokens"}),
}


def documented() -> list[str]:
    rows = re.findall(r"^\|\s*`([^`]+)`\s*\|", TABLE.read_text(), re.MULTILINE)
    assert len(rows) > 20
    return rows


@pytest.fixture(scope="module")
def runs(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, float]]]:
    """The lines logged by fit and test of each configuration, two updates on each rollout."""
    lines = {}
    for name, (objective, served, _) in RUNS.items():
        folder = tmp_path_factory.mktemp("run")
        prompts = write_prompts(folder / "p.jsonl", 8)
        data = OPDDataModule(prompts, val=prompts, prompts_per_step=4)
        settings = {"teacher": TopKTeacher(str(models / "teacher"))} if served else {}
        if name == "auto":
            settings = {"micro_batch_tokens": "auto", "memory_limit_gb": 50}
        model = module(
            models, objective, mini_batches=2, weights=[SpecialTokenMask([5])], **settings
        )
        options = {"logger": csv_logger(folder), "num_sanity_val_steps": -1}
        trainer = fit(model, data, rollouts(), **until(4, val_check_interval=1), **options)
        trainer.test(model, data, verbose=False)
        lines[name] = logged(folder)
    return lines


def keys(lines: list[dict[str, float]]) -> set[str]:
    return {key for line in lines for key in line} - {"step", "epoch"}


def by_table(found: set[str]) -> set[str]:
    """The rows of the table that stand for these keys."""
    return {re.sub(r"^loss/[A-Z]\w+$", "loss/<term>", key) for key in found}


@pytest.mark.parametrize("name", RUNS)
def test_exactly_these_keys_are_logged(runs: dict, name: str):
    own = RUNS[name][2]
    measured = own & (WHOLE | {"kl/reverse_k1"})
    # a teacher that gives everything is measured by the divergence and not by its estimate
    evaluated = EVALUATED | (measured - {"kl/reverse_k1"} if measured & WHOLE else measured)
    expected = ALWAYS | own | {f"{stage}/{k}" for stage in ("val", "test") for k in evaluated}
    assert keys(runs[name]) == expected


def test_the_table_and_the_runs_name_the_same_keys(runs: dict):
    table = documented()
    assert len(table) == len(set(table))
    seen = by_table(set().union(*(keys(lines) for lines in runs.values())))
    assert seen - set(table) == set(), "logged and not in docs/log_keys.md"
    assert set(table) - seen == set(), "in docs/log_keys.md and never logged"


@pytest.mark.parametrize("name", RUNS)
def test_a_step_is_an_update_and_validation_starts_at_0(runs: dict, name: str):
    lines = runs[name]
    trained = [line["step"] for line in lines if "loss" in line]
    assert trained == [1, 2, 3, 4]
    validated = [line["step"] for line in lines if "val/entropy" in line]
    assert validated == [0, 2, 4]
    assert [line["step"] for line in lines if "test/entropy" in line] == [4]


@pytest.mark.parametrize("name", RUNS)
def test_the_values_fit_their_units(runs: dict, name: str):
    for line in runs[name]:
        for key, value in line.items():
            assert value == value, f"{key} is NaN at step {line['step']}"
            if key.endswith(("_frac", "_fraction", "_ratio", "support_mass")):
                assert 0 <= value <= 1 + 1e-6, key
            if key.endswith(("_seconds", "entropy", "tokens", "mean_length")):
                assert value >= 0, key
    for line in runs[name]:
        if "loss" in line:
            parts = ("rollout", "teacher", "student", "optimizer")
            total = sum(line.get(f"perf/{part}_seconds", 0.0) for part in parts)
            assert total == pytest.approx(line["perf/step_seconds"], rel=1e-3)
            speed = line["completions/tokens"] / line["perf/step_seconds"]
            assert line["perf/tokens_per_second"] == pytest.approx(speed, rel=1e-3)
    first = [line for line in runs[name] if "perf/rollout_seconds" in line]
    assert [line["step"] for line in first] == [1, 3], "a rollout counts once"


def test_the_loss_of_the_full_divergence_is_the_divergence(runs: dict):
    masked = [line.get("weights/masked_frac", 0.0) for line in runs["ReverseKL"]]
    for line in runs["ReverseKL"]:
        if "loss" in line and line["weights/masked_frac"] == 0:
            assert line["loss"] == pytest.approx(line["kl/reverse"], rel=1e-5)
    assert 0 in masked
