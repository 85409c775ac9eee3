"""The known objectives, and the terms that make sense only beside one."""

from opd_lightning.objectives.base import Objective
from opd_lightning.objectives.full_vocabulary import (
    EntropyAware,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewReverseKL,
)
from opd_lightning.objectives.mixture import Mixture, OutcomeReward
from opd_lightning.objectives.sampled_token import (
    PowerOPD,
    SampledTokenReverseKL,
    SequenceReverseKL,
)
from opd_lightning.objectives.topk import HeadTailReverseKL, SupportMass, TopKReverseKL
from opd_lightning.registry import Registry

OBJECTIVES: Registry[Objective] = Registry(
    Objective,
    [
        SampledTokenReverseKL,
        SequenceReverseKL,
        PowerOPD,
        TopKReverseKL,
        HeadTailReverseKL,
        ReverseKL,
        ForwardKL,
        JensenShannon,
        SkewReverseKL,
        EntropyAware,
        Mixture,
    ],
    "opd_lightning.objectives",
    # no objectives by themselves: what a Mixture may add to one
    unlisted=[SupportMass, OutcomeReward],
)


def known_objectives() -> dict[str, type[Objective]]:
    """Return name -> class of the package's objectives and of the installed entry points.

    Raises:
        ConfigError: If an entry point takes a name that is in use, or is not an `Objective`.
    """
    return OBJECTIVES.known()


def known_terms() -> dict[str, type[Objective]]:
    """Return name -> class of what makes sense only beside an objective, in a Mixture."""
    return dict(OBJECTIVES.unlisted)


def resolve_objective(name: str) -> type[Objective]:
    """Return the objective (or term) called `name`, a known name or a dotted path.

    Raises:
        ConfigError: If there is none; the message lists the known names and the nearest.
    """
    return OBJECTIVES.resolve(name)


def unknown_objective(name: str) -> str:
    """Return the message for an objective that is not known."""
    return OBJECTIVES.unknown(name)
