"""How an update is split into micro-batches, padded or ordered leaves its gradient as it is."""

import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from opd_lightning.module import OPDModule
from opd_lightning.objectives import (
    Objective,
    ReverseKL,
    SampledTokenReverseKL,
    SequenceReverseKL,
    TopKReverseKL,
    known_objectives,
)
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.weighting import Reduction, ReductionName
from tests.module.harness import Frozen, Gradients, answered, distance, fit, module

FURTHER = {
    "bucket": TopKReverseKL(4, tail="bucket"),
    "sampled tail": TopKReverseKL(4, tail="sampled"),
    "student support": TopKReverseKL(4, support="student+sampled"),
    "head alone": TopKReverseKL(4, renormalize=False, biased_ok=True),
    "clipped": SampledTokenReverseKL(clip_ratio=0.2, dual_clip=1.5, log_ratio_clamp=3.0),
    "clipped sequences": SequenceReverseKL(gamma=0.9, clip_ratio=0.2),
}
NAMES = [*known_objectives(), *FURTHER]
LENGTHS = (5, 2, 7, 0, 1, 9)  # one row without a completion


def objective(name: str) -> Objective:
    if name in FURTHER:
        return FURTHER[name]
    cls = known_objectives()[name]
    return cls(k=4) if "k" in inspect.signature(cls).parameters else cls()


def first_batch(models: Path, dtype: torch.dtype = torch.float64) -> PromptBatch:
    """With log-probabilities like those of an earlier student: PPO's ratio lies around 1."""
    batch = answered(LENGTHS)
    ids = batch.rollout.input_ids
    student = AutoModelForCausalLM.from_pretrained(models / "student", dtype=dtype)
    with torch.no_grad():
        logprobs = student(input_ids=ids).logits.log_softmax(-1)[:, :-1]
    now = logprobs.gather(2, ids[:, 1:, None])[:, :, 0]
    noise = torch.randn(ids.shape, generator=torch.Generator().manual_seed(5), dtype=dtype)
    old = 0.2 * noise
    old[:, 1:] += now
    batch.rollout = replace(batch.rollout, old_logprobs=old)
    return batch


def padded(rollout: Rollout, columns: int) -> Rollout:
    """The same rows with more padding on the right; the ids there are not all 0."""

    def wider(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() != 2:
            return value
        return torch.cat([value, value.new_zeros(len(value), columns)], dim=1)

    wide = replace(rollout, **{name: wider(value) for name, value in vars(rollout).items()})
    wide.input_ids[:, -2:] = 17
    return wide


@dataclass
class Split:
    """One way to compute the same update."""

    reduction: ReductionName
    budget: int | None
    rollout: Rollout
    micro_batches: int


class Sweep(L.Callback):
    """Sets reduction and budget for each batch, and checks how many micro-batches they make."""

    def __init__(self, splits: list[Split]) -> None:
        self.splits = splits

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: OPDModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        split = self.splits[batch_idx]
        pl_module.reduction = Reduction(split.reduction)
        pl_module.micro_batch_tokens = split.budget
        (update,) = pl_module.plan_updates(batch.rollout)
        assert len(update.micro_batches) == split.micro_batches


def splits(reduction: str, rollout: Rollout) -> list[Split]:
    order = torch.tensor([3, 5, 0, 4, 2, 1])
    return [
        Split(reduction, None, rollout, 1),
        Split(reduction, 33, rollout, 3),
        Split(reduction, 12, rollout, 5),
        Split(reduction, 1, rollout, 6),
        Split(reduction, None, padded(rollout, 7), 1),
        Split(reduction, 12, padded(rollout, 7), 5),
        Split(reduction, None, rollout.select_rows(order), 1),
        Split(reduction, 12, rollout.select_rows(order), 5),
    ]


def gradients(model: OPDModule, batch: PromptBatch, ways: list[Split]) -> list[dict[str, Tensor]]:
    kept = Gradients()
    fit(model, [replace(batch, rollout=way.rollout) for way in ways], Sweep(ways), Frozen(), kept)
    return kept.steps


@pytest.mark.parametrize("name", NAMES)
def test_any_split_gives_one_gradient_in_float64(models: Path, name: str):
    model = module(models, objective(name), "float64", max_grad_norm=None, metrics_every=0)
    batch = first_batch(models)
    names = ReductionName.__args__
    ways = [way for reduction in names for way in splits(reduction, batch.rollout)]
    steps = gradients(model, batch, ways)
    number = len(ways) // len(names)
    of_reduction = [steps[i : i + number] for i in range(0, len(steps), number)]
    for reduction, (whole, *others) in zip(names, of_reduction, strict=True):
        apart = [distance(other, whole) for other in others]
        assert max(apart) < 1e-12, (reduction, apart)
    firsts = [group[0] for group in of_reduction]
    pairs = [(a, b) for i, a in enumerate(firsts) for b in firsts[:i]]
    assert min(distance(a, b) for a, b in pairs) > 1e-3, "four reductions, four gradients"


@pytest.mark.parametrize("name", ["ReverseKL", "SampledTokenReverseKL", "TopKReverseKL"])
def test_any_split_gives_one_gradient_in_float32(models: Path, name: str):
    model = module(models, objective(name), max_grad_norm=None, metrics_every=0)
    batch = first_batch(models, torch.float32)
    whole, *others = gradients(model, batch, splits("token-mean", batch.rollout))
    assert max(distance(other, whole) for other in others) < 1e-6


def test_the_losses_logged_do_not_depend_on_the_split(models: Path):
    shown = {}
    for budget in (None, 12):
        model = module(models, ReverseKL(), "float64", micro_batch_tokens=budget)
        trainer = fit(model, [answered(LENGTHS)])
        shown[budget] = {k: float(v) for k, v in trainer.progress_bar_metrics.items()}
    for key in ("loss", "kl/reverse"):
        assert shown[None][key] == pytest.approx(shown[12][key], rel=1e-6)
    assert shown[None]["loss"] == pytest.approx(shown[None]["kl/reverse"], rel=1e-6)
