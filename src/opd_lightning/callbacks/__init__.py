"""What happens around training: progress, summary, files of a run."""

from opd_lightning.callbacks.checkpoint import RunCheckpoint
from opd_lightning.callbacks.diagnostics import Diagnostics
from opd_lightning.callbacks.evaluate import Evaluate
from opd_lightning.callbacks.loggers import run_loggers
from opd_lightning.callbacks.predictions import PredictionWriter
from opd_lightning.callbacks.progress import OPDProgressBar
from opd_lightning.callbacks.signals import StopOnSignal
from opd_lightning.callbacks.summary import RunSummary

__all__ = [
    "Diagnostics",
    "Evaluate",
    "OPDProgressBar",
    "PredictionWriter",
    "RunCheckpoint",
    "RunSummary",
    "StopOnSignal",
    "run_loggers",
]
