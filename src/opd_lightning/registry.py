"""Names -> classes of one kind: the package's own, those of entry points, and dotted paths."""

import importlib
import inspect
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from opd_lightning.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes of one kind by name.

    Args:
        base: What they derive from.
        own: The package's.
        group: Entry-point group of everybody else's.
        unlisted: Further ones of the package that `resolve` finds and messages do not name.
        any_case: Whether upper and lower case are alike in names.
    """

    def __init__(
        self,
        base: type[T],
        own: Sequence[type[T]],
        group: str,
        unlisted: Sequence[type[T]] = (),
        any_case: bool = False,
    ) -> None:
        self.base = base
        self.own = list(own)
        self.group = group
        self.unlisted = {cls.__name__: cls for cls in unlisted}
        self.any_case = any_case

    @property
    def kind(self) -> str:
        """What messages call one of them: `task`."""
        return self.base.__name__.lower()

    def known(self) -> dict[str, type[T]]:
        """Return name -> class of the package's and of the installed entry points.

        Raises:
            ConfigError: If an entry point takes a name that is in use, or is of another kind.
        """
        known = {cls.__name__: cls for cls in self.own}
        for entry in entry_points(group=self.group):
            loaded = self._checked(entry.load(), f"entry point {entry.name} = {entry.value}")
            if known.get(entry.name, loaded) is not loaded:
                raise ConfigError(
                    f"entry point {entry.name!r} ({entry.value}) takes the name of "
                    f"{known[entry.name].__module__}.{entry.name}. Rename one of them."
                )
            known[entry.name] = loaded
        return known

    def find(self, name: str) -> type[T] | None:
        """Return the class of a known or unlisted name; None where there is none.

        Dotted paths are not followed: a name that comes from data must not import anything.
        """
        classes = self.known() | self.unlisted
        if self.any_case:
            name, classes = name.lower(), {known.lower(): cls for known, cls in classes.items()}
        return classes.get(name)

    def resolve(self, name: str) -> type[T]:
        """Return the class called `name`, a known name or a dotted path.

        Raises:
            ConfigError: If there is none; the message lists the known names and the nearest.
        """
        if (cls := self.find(name)) is not None:
            return cls
        module, _, attribute = name.rpartition(".")
        if not module:
            raise ConfigError(self.unknown(name))
        try:
            return self._checked(getattr(importlib.import_module(module), attribute), name)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.unknown(name)} (Tried to import it: {error}.)") from error

    def unknown(self, name: str) -> str:
        """Return the message for a name that is not known."""
        known = sorted(self.known())
        return (
            f"{self.kind} {name!r} is not known.{nearest(name, known)} Known: {', '.join(known)}. "
            f"Your own: give its dotted path, or register it in the entry-point group {self.group}."
        )

    def _checked(self, cls: object, origin: str) -> type[T]:
        if not (inspect.isclass(cls) and issubclass(cls, self.base)):
            raise ConfigError(
                f"{origin} is {cls!r}, not a subclass of opd_lightning.{self.base.__name__}."
            )
        return cls
