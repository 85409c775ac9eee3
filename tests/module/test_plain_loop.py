"""Whole updates against a loop that shares nothing with the package: one row at a time."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR
from transformers import AutoModelForCausalLM

from opd_lightning.objectives import Objective, ReverseKL, SampledTokenReverseKL
from opd_lightning.records import PromptBatch
from tests.module.harness import answered, distance, fit, module, weights

OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, lr=0.3, momentum=0.9, nesterov=True),
}
SCHEDULE = partial(LinearLR, start_factor=0.25, total_iters=4)


def reverse_kl(student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    p = student.exp()
    return (p * (student - teacher)).sum()


def sampled_token(student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    here = torch.arange(len(y))
    advantages = (teacher - student)[here, y].detach()
    return -(advantages * student[here, y]).sum()


def plain_loop(
    models: Path,
    batches: list[PromptBatch],
    dtype: torch.dtype,
    optimizer: Callable,
    loss_of_row: Callable[[Tensor, Tensor, Tensor], Tensor],
    temperature: float,
) -> dict[str, Tensor]:
    student = AutoModelForCausalLM.from_pretrained(models / "student", dtype=dtype)
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher", dtype=dtype)
    stepper = optimizer(student.parameters())
    schedule = SCHEDULE(stepper)
    for batch in batches:
        mask = batch.rollout.completion_mask
        total = 0.0
        for ids, real, answer in zip(
            batch.rollout.input_ids, batch.rollout.attention_mask, mask, strict=True
        ):
            length, first = int(real.sum()), int(answer.nonzero()[0])
            row = ids[None, :length]
            with torch.no_grad():
                q = torch.log_softmax(teacher(row).logits[0, first - 1 : -1] / temperature, dim=-1)
            p = torch.log_softmax(student(row).logits[0, first - 1 : -1] / temperature, dim=-1)
            total = total + loss_of_row(p, q, row[0, first:])
        stepper.zero_grad()
        (total / int(mask.sum())).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        stepper.step()
        schedule.step()
    return {k: v.detach() for k, v in student.state_dict().items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("objective", "loss_of_row"),
    [(ReverseKL(), reverse_kl), (SampledTokenReverseKL(), sampled_token)],
    ids=["ReverseKL", "SampledTokenReverseKL"],
)
def test_three_steps_are_those_of_a_plain_loop(
    models: Path, objective: Objective, loss_of_row: Callable, dtype: str, optimizer: str
):
    batches = [answered((5, 2, 7, 1), seed=i) for i in range(3)]
    model = module(
        models,
        objective,
        dtype,
        optimizer=OPTIMIZERS[optimizer],
        lr_scheduler=SCHEDULE,
        micro_batch_tokens=12,
        temperature=0.8,
    )
    trainer = fit(model, batches)
    assert trainer.global_step == 3
    expected = plain_loop(
        models, batches, getattr(torch, dtype), OPTIMIZERS[optimizer], loss_of_row, 0.8
    )
    start = AutoModelForCausalLM.from_pretrained(models / "student").state_dict()
    moved = distance(expected, start)
    assert moved > 1e-4
    apart = distance(weights(model), expected)
    assert apart < 1e-6, f"apart by {apart:.1e}; the three steps moved {moved:.1e}"
    if dtype == "float64":
        assert apart < 1e-8, "what is left is the reduction's factor 1 / N, which is in float32"
