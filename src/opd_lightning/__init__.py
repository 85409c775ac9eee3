"""On-policy distillation on PyTorch Lightning; a public name is imported when first used."""

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOM_OF = {
    "ConfigError": "errors",
    "RunError": "errors",
    "PromptBatch": "records",
    "Rollout": "records",
    "TokenDistribution": "distributions",
    "TopKDistribution": "distributions",
    "CausalPolicy": "policy",
    "PolicySpec": "policy",
    "Objective": "objectives",
    "ObjectiveOutput": "objectives",
    "TokenLoss": "objectives",
    "EntropyAware": "objectives",
    "ForwardKL": "objectives",
    "HeadTailReverseKL": "objectives",
    "JensenShannon": "objectives",
    "Mixture": "objectives",
    "OutcomeReward": "objectives",
    "PowerOPD": "objectives",
    "ReverseKL": "objectives",
    "SampledTokenReverseKL": "objectives",
    "SequenceReverseKL": "objectives",
    "SkewReverseKL": "objectives",
    "SupportMass": "objectives",
    "TopKReverseKL": "objectives",
    "AgreementSoFar": "weighting",
    "EntropyTopRatio": "weighting",
    "PositionDecay": "weighting",
    "PositionWindow": "weighting",
    "Reduction": "weighting",
    "SpecialTokenMask": "weighting",
    "TokenWeight": "weighting",
    "TruncatedRowWeight": "weighting",
    "LocalTeacher": "teachers",
    "Teacher": "teachers",
    "RolloutCallback": "rollout",
    "RolloutEngine": "rollout",
    "SamplingConfig": "rollout",
    "TransformersEngine": "rollout",
    "OPDDataModule": "data",
    "Arithmetic": "tasks",
    "Environment": "tasks",
    "ExactMatch": "tasks",
    "GuessNumber": "tasks",
    "Math": "tasks",
    "Task": "tasks",
    "Turn": "tasks",
    "Diagnostics": "callbacks",
    "Evaluate": "callbacks",
    "OPDProgressBar": "callbacks",
    "PredictionWriter": "callbacks",
    "RunCheckpoint": "callbacks",
    "RunSummary": "callbacks",
    "run_loggers": "callbacks",
    "OPDModule": "module",
    "FSDP2Strategy": "strategy",
}

__all__ = ["__version__", *sorted(_ROOM_OF)]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOM_OF])
