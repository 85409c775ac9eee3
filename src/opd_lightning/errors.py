"""What goes wrong, in two kinds: `ConfigError` before a run starts, `RunError` while it runs.

Every message says what was wrong, the value seen, what to do, and the nearest valid names.
`RunStopped` is no fault: a run was told to stop.
"""

import difflib
from collections.abc import Iterable


class OPDError(Exception):
    """Base of all errors this package raises on purpose; `exit_code` is what `opd` exits with."""

    exit_code = 1


class ConfigError(OPDError, ValueError):
    """Something that was asked for cannot work: names, arguments, files, wrong pairings."""

    exit_code = 2


class RunError(OPDError, RuntimeError):
    """A run had to stop: a loss that is not finite, an engine that failed."""


class RunStopped(OPDError):
    """A run was told to stop, and did so in order; the message is empty on all ranks but one."""

    exit_code = 0


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean X?"` for the closest of `known` (case is ignored), or nothing."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]}?" if close else ""
