"""Says in one message what the parser found wrong, with the nearest valid names."""

import importlib
import inspect
import re
from collections.abc import Iterable

import torch
from lightning.pytorch import Callback

from opd_lightning.errors import nearest
from opd_lightning.objectives.registry import unknown_objective
from opd_lightning.rollout import RolloutEngine
from opd_lightning.teachers import Teacher
from opd_lightning.weighting import TokenWeight

# Last part of an argument's name -> what its classes derive from.
_BASES = {
    "teacher": Teacher,
    "weights": TokenWeight,
    "engine": RolloutEngine,
    "callbacks": Callback,
    "optimizer": torch.optim.Optimizer,
    "lr_scheduler": torch.optim.lr_scheduler.LRScheduler,
}
_KEY = re.compile(r'Parser key "([\w.]+)"')
_NOT_A_CLASS = re.compile(r"(?:dot import path string: |Import error: |No module named ')([\w.]+)")
_CHOICES = re.compile(r"Literal\[(?P<choices>[^\]]*)\]")
_GIVEN = re.compile(r"Given value: (\S+)|Got value: (\S+)")
_NO_OPTION = re.compile(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted")
_NO_KEY = re.compile(
    r"nrecognized arguments: --([\w.]+)|does not accept nested key '([\w.]+)'|Key '([\w.]+)' is not"
)


def explain(message: str, known_keys: Iterable[str]) -> str:
    """Return the parser's `message` as one paragraph, with the nearest names where one is wrong.

    Args:
        message: What jsonargparse says.
        known_keys: Dotted names of all arguments.
    """
    keys = _KEY.findall(message)
    key = keys[0] if keys else ""
    if found := _NO_OPTION.search(message):
        cls, option = found.groups()
        known = _arguments(cls)
        return (
            f"{cls.rsplit('.')[-1]} has no argument {option!r}.{nearest(option, known)} "
            f"Known: {', '.join(known)}."
        )
    if found := _NO_KEY.search(message):
        unknown = next(group for group in found.groups() if group)
        return f"there is no argument {unknown!r}.{nearest(unknown, known_keys)} See --help."
    if (found := _CHOICES.search(message)) and (given := _GIVEN.findall(message)):
        value = "".join(given[0])
        known = re.findall(r"'([^']*)'", found["choices"])
        return f"{key} {value!r} is not known.{nearest(value, known)} Known: {', '.join(known)}."
    if found := _NOT_A_CLASS.search(message):
        return _unknown_class(key, found[1]) or " ".join(message.split())
    return " ".join(message.split())


def _unknown_class(key: str, name: str) -> str | None:
    last = key.rsplit(".", 1)[-1]
    if last == "objective":
        return unknown_objective(name)
    if last not in _BASES:
        return None
    known = sorted(_names_of_subclasses(_BASES[last]))
    return (
        f"{key} {name!r} is not known.{nearest(name, known)} Known: {', '.join(known)}. Your own: "
        "give its dotted path."
    )


def _names_of_subclasses(base: type) -> set[str]:
    names = set()
    for cls in base.__subclasses__():
        names |= _names_of_subclasses(cls)
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            names.add(cls.__name__)
    return names


def _arguments(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
