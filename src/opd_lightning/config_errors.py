"""Says in one message what the parser found wrong, with the nearest valid names."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Callback

from opd_lightning.errors import nearest
from opd_lightning.objectives import Objective
from opd_lightning.objectives.registry import (
    known_objectives,
    known_terms,
    unknown_objective,
)
from opd_lightning.rollout import RolloutEngine
from opd_lightning.tasks import Task
from opd_lightning.teachers import Teacher
from opd_lightning.weighting import Reduction, TokenWeight

# Last part of an argument's name -> what its classes derive from.
_BASES = {
    "objective": Objective,
    "objectives": Objective,
    "teacher": Teacher,
    "weights": TokenWeight,
    "reduction": Reduction,
    "tasks": Task,
    "engine": RolloutEngine,
    "callbacks": Callback,
    "optimizer": torch.optim.Optimizer,
    "lr_scheduler": torch.optim.lr_scheduler.LRScheduler,
}
_KEY = re.compile(r'Parser key "([\w.]+)"')
_GIVEN = re.compile(r"(?:Given value|Got value): (.+)")
_TYPES = re.compile(r"Expected a <class '([\w.]+)'>")
_CHOICES = re.compile(r"Literal\[([^\]]*)\]")


def explain(message: str, known_keys: Iterable[str], args: Sequence[str] = ()) -> str:
    """Return the parser's `message` as one paragraph, with the nearest names where one is wrong.

    Args:
        message: What jsonargparse says.
        known_keys: Dotted names of all arguments.
        args: The command line, for the names of the configuration files.
    """
    # a class's own arguments are reported inside the argument that takes the class
    key = ".".join(dict.fromkeys(_KEY.findall(message)))
    known = list(known_keys)
    for rule in (_file, _option, _unknown_key(known), _required, _plain_name, _choice, _class):
        if said := rule(message, key, args):
            return said
    return _type(message, key, args) or " ".join(message.split())


def _file(message: str, key: str, args: Sequence[str]) -> str | None:
    if found := re.search(r"File does not exist: '(.*)'", message):
        path = Path(found[1])
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        return f"configuration file {str(path)!r} does not exist.{nearest(path.name, siblings)}"
    if not re.search(r"Problems parsing config|Unexpected config", message):
        return None
    for path in _config_files(args):
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            return (
                f"{path}:{mark.line + 1}: not valid YAML ({error.problem}, column "
                f"{mark.column + 1}). Mend the line or what stands before it."
            )
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            return f"{path}: cannot be read as YAML ({error})."
        if not isinstance(content, dict):
            return (
                f"{path}: holds {content!r:.60} where arguments were expected. Give for example "
                "`trainer: {max_steps: 10}`."
            )
    return None


def _config_files(args: Sequence[str]) -> list[str]:
    separate = [value for flag, value in pairwise(args) if flag in ("-c", "--config")]
    return separate + [a.partition("=")[2] for a in args if a.startswith("--config=")]


def _option(message: str, key: str, args: Sequence[str]) -> str | None:
    """An argument that a class does not have."""
    found = re.search(
        r"class_path '(?P<cls>[\w.]+)':\s+(?:Option '|unrecognized arguments: --)(?P<option>\w+)",
        message,
    ) or re.search(
        r"Option '(?P<option>\w+)[\w.]*' is not accepted\. Got value: "
        r"Namespace\(class_path='(?P<cls>[\w.]+)'",
        message,
    )
    if not found:
        return None
    known = _arguments(found["cls"])
    return (
        f"{found['cls'].rsplit('.')[-1]} has no argument {found['option']!r}."
        f"{nearest(found['option'], known)} Known: {', '.join(known)}."
    )


def _unknown_key(known: list[str]) -> Callable[[str, str, Sequence[str]], str | None]:
    """An argument that the verb does not have."""

    def rule(message: str, key: str, args: Sequence[str]) -> str | None:
        found = re.search(
            r"(?:nrecognized arguments: --|does not accept (?:nested key|option) '|Key ')([\w.]+)",
            message,
        )
        if found:
            return f"there is no argument {found[1]!r}.{nearest(found[1], known)} See --help."
        if found := re.search(r"nrecognized arguments: (.+)", message):
            return (
                f"{found[1]!r} belongs to no argument. Names start with --, lists are written "
                "[a,b]. See --help."
            )
        return None

    return rule


def _required(message: str, key: str, args: Sequence[str]) -> str | None:
    found = re.search(
        r"(?:class_path '([\w.]+)':\s+)?the following arguments are required: ([\w., ]+)", message
    )
    if not found:
        return None
    names = found[2].split(", ")
    if found[1]:
        options = " ".join(f"--{key}.{name} ..." for name in names)
        return f"{found[1].rsplit('.')[-1]} needs {', '.join(names)}. Give {options} as well."
    verb = names[0].partition(".")[0]
    names = [name.removeprefix(f"{verb}.") for name in names]
    return (
        f"{verb} needs {', '.join(names)}. Give them by --config run.yaml, or one by one: "
        f"--{names[0]} ..."
    )


def _plain_name(message: str, key: str, args: Sequence[str]) -> str | None:
    """An argument of a class, where the class is given by a plain name or path so far."""
    given = re.search(r"Given value: NestedArg\(key='([\w.]+)', val=(.*)\)", message)
    name = re.search(r"Expected a dot import path string: (\S+)", message)
    last = key.rsplit(".", 1)[-1]
    # where the two are one, it is the value of that argument itself that is not known
    if not (given and name) or last not in _BASES or last == given[1]:
        return None
    known = _known_classes(key)
    return (
        f"{key} is {name[1]!r}, which takes no argument {given[1]!r}. Name the class first: "
        f"--{key} {known[0]} --{key}.{given[1]} {given[2].strip(chr(39))}, with all its arguments. "
        f"Known: {', '.join(known)}."
    )


def _choice(message: str, key: str, args: Sequence[str]) -> str | None:
    choices = ", ".join(_CHOICES.findall(message)).replace("'", "")
    given = _GIVEN.search(message)
    if not (choices and given):
        return None
    known = list(dict.fromkeys(choices.split(", ")))
    return f"{key} {given[1]!r} is not known.{nearest(given[1], known)} Known: {', '.join(known)}."


def _class(message: str, key: str, args: Sequence[str]) -> str | None:
    """A class that cannot be found, or is none of those that the argument takes."""
    if key.rsplit(".", 1)[-1] not in _BASES:
        return None
    if found := re.search(r"Import path ([\w.]+) does not correspond to a subclass", message):
        base = _BASES[key.rsplit(".", 1)[-1]]
        known = ", ".join(_known_classes(key))
        return f"{key} {found[1]!r} is not a subclass of {base.__name__}. Known: {known}."
    missing = r"(?P<why>No module named '[\w.]+'|module '[\w.]+' has no attribute '\w+')"
    found = (
        re.search(rf"class_path '(?P<name>[\w.]+)':\s+{missing}", message)
        or re.search(rf"{missing}\. Got value: (?P<name>[\w.]+)", message)
        or re.search(r"(?:dot import path string: |Import error: )(?P<name>[\w.]+)", message)
    )
    if found:
        reason = found.groupdict().get("why")
        return _unknown_class(key, found["name"]) + (
            f" (Importing it: {reason}.)" if reason else ""
        )
    if found := re.search(
        r"Expected a <class 'collections.abc.Sequence'>. Got value: (.+)", message
    ):
        return (
            f"{key} takes a list; got {found[1]!r}. Write [{found[1]}], or --{key}+ {found[1]} to "
            f"add one. Known: {', '.join(_known_classes(key))}."
        )
    return None


def _unknown_class(key: str, name: str) -> str:
    if key.rsplit(".", 1)[-1] == "objective":
        return unknown_objective(name)
    known = _known_classes(key)
    return (
        f"{key} {name!r} is not known.{nearest(name, known)} Known: {', '.join(known)}. Your own: "
        "give its dotted path."
    )


def _type(message: str, key: str, args: Sequence[str]) -> str | None:
    types, given = list(dict.fromkeys(_TYPES.findall(message))), _GIVEN.search(message)
    if not (key and types and given):
        return None
    names = ["null" if name == "NoneType" else name.rsplit(".")[-1] for name in types]
    return f"{key} must be of type {' or '.join(names)}; got {given[1]!r}."


def _known_classes(key: str) -> list[str]:
    name = key.rsplit(".", 1)[-1]
    base = _BASES[name]
    if base is Objective:
        return sorted(known_objectives() | (known_terms() if name == "objectives" else {}))
    # the only base that is also a choice
    own = {"Reduction"} if base is Reduction else set()
    return sorted(own | _names_of_subclasses(base))


def _names_of_subclasses(base: type) -> set[str]:
    names = set()
    for cls in base.__subclasses__():
        names |= _names_of_subclasses(cls)
        # accelerate's optimisers are wrappers of others; they are loaded by transformers
        if (
            not inspect.isabstract(cls)
            and not cls.__name__.startswith("_")
            and not cls.__module__.startswith("accelerate")
        ):
            names.add(cls.__name__)
    return names


def _arguments(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    # first ones of optimisers and schedulers, which the module gives them
    return [name for name in parameters if name not in ("params", "optimizer")]
