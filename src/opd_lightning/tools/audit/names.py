"""From what a user writes to an objective, and back."""

import ast
import inspect
from typing import Any

from opd_lightning.errors import ConfigError
from opd_lightning.objectives import Objective, known_objectives, known_terms, resolve_objective

# The audit's vocabularies are small: this is the k of an objective that takes one.
SMALL_K = 3


def audited_objectives() -> list[Objective]:
    """Return every known objective and term with its defaults, and the variants it declares."""
    return [
        made(cls, settings)
        for cls in (known_objectives() | known_terms()).values()
        for settings in ({}, *cls.variants)
    ]


def made(cls: type[Objective], settings: dict[str, Any], *args: Any) -> Objective:
    """Return `cls(*args, **settings)`, with k = 3 where it takes a k and none is given.

    Raises:
        ConfigError: If the constructor refuses.
    """
    signature = inspect.signature(cls)
    small_k = {"k": SMALL_K} if "k" in signature.parameters else {}
    try:
        given = signature.bind_partial(*args, **settings).arguments
        return cls(**(small_k | given))
    except TypeError as error:
        raise ConfigError(
            f"{cls.__name__} cannot be made: {error}. Give its settings in parentheses, as in "
            "'TopKReverseKL(k=4, tail=\"bucket\")'."
        ) from error


def objective_from(text: str) -> Objective:
    """Return the objective that `text` names: a known name or a dotted path, maybe with settings.

    Example:
        >>> objective_from("TopKReverseKL(k=4, tail='bucket')")
        TopKReverseKL(k=4, support='teacher', renormalize=True, tail='bucket', ...)

    Raises:
        ConfigError: If it is no name, or the name is not known.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ConfigError(_not_an_objective(text)) from error
    if isinstance(node, ast.Call):
        return _value(node)
    return made(resolve_objective(text.strip()), {})


def _value(node: ast.expr) -> Any:
    """Evaluate literals, lists of them, and calls of objectives; nothing else."""
    if isinstance(node, ast.Call):
        cls = resolve_objective(ast.unparse(node.func))
        settings = {keyword.arg: _value(keyword.value) for keyword in node.keywords}
        return made(cls, settings, *map(_value, node.args))
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ConfigError(_not_an_objective(ast.unparse(node))) from error


def _not_an_objective(text: str) -> str:
    return (
        f"{text!r} names no objective. Give a name (ReverseKL), a dotted path, or one of them with "
        "settings, as in 'TopKReverseKL(k=4, tail=\"bucket\")'."
    )


def label(objective: Objective) -> str:
    """Return the class name with the settings that are not the class's defaults."""
    parameters = inspect.signature(type(objective)).parameters
    shown = {
        name: getattr(objective, name)
        for name, parameter in parameters.items()
        if hasattr(objective, name) and getattr(objective, name) != parameter.default
    }
    shown.pop("biased_ok", None)
    if shown.get("k") == SMALL_K:
        del shown["k"]
    settings = ", ".join(f"{name}={_shown(value)}" for name, value in shown.items())
    return f"{type(objective).__name__}({settings})" if settings else type(objective).__name__


def _shown(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, Objective) for item in value):
        return "[" + ", ".join(label(item) for item in value) + "]"
    return repr(value)
