"""Names -> objective classes: the package's own, those of entry points, and dotted paths."""

import importlib
import inspect
from importlib.metadata import entry_points

from opd_lightning.errors import ConfigError, nearest
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

ENTRY_POINT_GROUP = "opd_lightning.objectives"

_OWN = [
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
]
# no objectives by themselves: what a Mixture may add to one
_TERMS = [SupportMass, OutcomeReward]


def known_objectives() -> dict[str, type[Objective]]:
    """Return name -> class of the package's objectives and of the installed entry points.

    Raises:
        ConfigError: If an entry point takes a name that is in use, or is not an `Objective`.
    """
    known = {cls.__name__: cls for cls in _OWN}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        loaded = _checked(entry.load(), f"entry point {entry.name} = {entry.value}")
        if known.get(entry.name, loaded) is not loaded:
            raise ConfigError(
                f"entry point {entry.name!r} ({entry.value}) takes the name of "
                f"{known[entry.name].__module__}.{entry.name}. Rename one of them."
            )
        known[entry.name] = loaded
    return known


def known_terms() -> dict[str, type[Objective]]:
    """Return name -> class of what makes sense only beside an objective, in a Mixture."""
    return {cls.__name__: cls for cls in _TERMS}


def resolve_objective(name: str) -> type[Objective]:
    """Return the objective (or term) called `name`, a known name or a dotted path.

    Raises:
        ConfigError: If there is none; the message lists the known names and the nearest.
    """
    known = known_objectives() | known_terms()
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ConfigError(unknown_objective(name))
    try:
        return _checked(getattr(importlib.import_module(module), attribute), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{unknown_objective(name)} (Tried to import it: {error}.)") from error


def unknown_objective(name: str) -> str:
    """Return the message for an objective that is not known."""
    known = sorted(known_objectives())
    return (
        f"objective {name!r} is not known.{nearest(name, known)} Known: {', '.join(known)}. Your "
        f"own: give its dotted path, or register it in the entry-point group {ENTRY_POINT_GROUP}."
    )


def _checked(cls: object, origin: str) -> type[Objective]:
    if not (inspect.isclass(cls) and issubclass(cls, Objective)):
        raise ConfigError(f"{origin} is {cls!r}, not a subclass of opd_lightning.Objective.")
    return cls
