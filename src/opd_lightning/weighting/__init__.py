"""What each token counts: token weights (they multiply) and the one place that divides."""

from opd_lightning.weighting.agreement import AgreementSoFar
from opd_lightning.weighting.base import TokenWeight, combined_weight
from opd_lightning.weighting.entropy import EntropyTopRatio
from opd_lightning.weighting.position import PositionDecay, PositionWindow
from opd_lightning.weighting.reduction import Reduction, ReductionName, UpdateSize
from opd_lightning.weighting.special_tokens import SpecialTokenMask
from opd_lightning.weighting.truncated_rows import TruncatedRowWeight

__all__ = [
    "AgreementSoFar",
    "EntropyTopRatio",
    "PositionDecay",
    "PositionWindow",
    "Reduction",
    "ReductionName",
    "SpecialTokenMask",
    "TokenWeight",
    "TruncatedRowWeight",
    "UpdateSize",
    "combined_weight",
]
