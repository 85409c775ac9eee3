"""The runs that two processes and one are compared on: name -> how it departs from the default."""

from dataclasses import dataclass, field
from typing import Any

from opd_lightning.objectives import (
    Mixture,
    Objective,
    ReverseKL,
    SampledTokenReverseKL,
    TopKReverseKL,
    known_objectives,
)


@dataclass
class Case:
    """One run of five updates; the default meets every unevenness that the data can bring.

    Attributes:
        objective: The loss.
        tied: Whether student and teacher share embedding and head.
        strategy: Of two processes: "fsdp2" or "ddp".
        sharding: Arguments of the strategy.
        settings: Of OPDModule, instead of the default ones.
        student: Of the student's PolicySpec, on all processes.
        teacher: Of the LocalTeacher.
        model: Which tiny model.
        tolerance: Largest distance of the weights, relative to their norm; above 1e-5 rollouts
            may part too.
    """

    objective: Objective = field(default_factory=ReverseKL)
    tied: bool = False
    strategy: str = "fsdp2"
    sharding: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"
    tolerance: float = 1e-5


def cases() -> dict[str, Case]:
    """Every known objective with each kind of head; then each option with one of them."""
    found = {}
    for name, objective in known_objectives().items():
        for tied in (False, True):
            found[f"{name}, {'tied' if tied else 'untied'}"] = Case(objective(), tied)
    two = {"mini_batches": 2}
    stale = SampledTokenReverseKL(clip_ratio=0.2)
    mixture = Mixture([TopKReverseKL(k=5, tail="bucket"), stale])
    return found | {
        "ddp": Case(strategy="ddp"),
        "ddp, tied": Case(TopKReverseKL(k=5), True, strategy="ddp"),
        "ddp, two updates": Case(stale, strategy="ddp", settings=two),
        "two updates": Case(stale, settings=two),
        "two updates of a mixture": Case(mixture, True, settings=two),
        "one micro-batch": Case(settings={"micro_batch_tokens": None}),
        "not clipped": Case(settings={"max_grad_norm": None}),
        "seq-mean-token-mean": Case(settings={"reduction": "seq-mean-token-mean"}),
        "gradient checkpointing": Case(student={"gradient_checkpointing": True}),
        "frozen embedding": Case(student={"freeze": ["embed_tokens"]}),
        "frozen but for the head": Case(student={"freeze": ["layers", "embed_tokens", "norm"]}),
        "layers stay gathered": Case(sharding={"reshard_after_forward": False}),
        "offloaded": Case(sharding={"offload_student": True, "offload_teacher": True}),
        "two replicas": Case(sharding={"replicas": 2}),
        "budget found": Case(settings={"micro_batch_tokens": "auto", "memory_limit_gb": 60.0}),
        "gathered in bf16": Case(
            sharding={"param_dtype": "bfloat16", "reduce_dtype": "float32"}, tolerance=2e-2
        ),
        "softcap and window": Case(TopKReverseKL(k=5), model="gemma2"),
        "head with a bias": Case(model="phi"),
    }
