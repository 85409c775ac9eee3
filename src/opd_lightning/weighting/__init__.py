"""What each token counts: token weights (they multiply) and the one place that divides."""

from opd_lightning.weighting.base import TokenWeight, combined_weight
from opd_lightning.weighting.reduction import Reduction, ReductionName, UpdateSize
from opd_lightning.weighting.special_tokens import SpecialTokenMask

__all__ = [
    "Reduction",
    "ReductionName",
    "SpecialTokenMask",
    "TokenWeight",
    "UpdateSize",
    "combined_weight",
]
