"""Arrows between the rooms go one way; what an import loads; the public names exist."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import opd_lightning

SOURCE = Path(opd_lightning.__file__).parent

# room -> rooms it may import (`errors` is at the very bottom, for all); also in CONTRIBUTING.md
TABLE: dict[str, set[str]] = {
    "errors": set(),
    "records": set(),
    "distributions": set(),
    "policy": {"records", "distributions"},
    "objectives": {"records", "distributions"},
    "weighting": {"records", "distributions"},
    "teachers": {"records", "distributions", "policy"},
    "rollout": {"records", "policy", "tasks"},
    "data": {"records", "tasks"},
    "tasks": {"records"},
    "metrics": {"records", "distributions"},
    "callbacks": {"records", "distributions", "rollout", "metrics", "tasks"},
    # the four of the table, and what these four are themselves made of
    "module": {"policy", "objectives", "weighting", "teachers", "records", "distributions"},
    "study": {"records", "distributions", "objectives", "weighting"},
}

# Arrows that the table does not have: parts of module.py and cli.py in files of their own, and the
# metrics that module.py logs.
PARTS: dict[str, set[str]] = {
    "registry": set(),
    "figures": set(),
    "sharding": {"policy"},
    "checkpoints": set(),
    "strategy": {"sharding", "checkpoints"},
    "updates": {"records", "weighting"},
    "memory": {"records"},
    "resume": {"callbacks"},
    "predictions": {"records", "policy", "rollout"},
    "checks": {"records", "objectives", "teachers", "rollout"},
    "config_errors": {"objectives", "weighting", "teachers", "rollout", "tasks"},
}
FURTHER: dict[str, set[str]] = {
    "objectives": {"registry"},
    "tasks": {"registry"},
    "callbacks": {"checkpoints", "figures"},
    "study": {"figures"},
    "teachers": {"sharding"},
    "rollout": {"sharding"},
    "module": {"metrics", "checkpoints", "sharding", "updates", "memory", "predictions", "checks"},
}

WHOLE = set(TABLE) | set(PARTS)
ALLOWED = {room: TABLE.get(room, set()) | FURTHER.get(room, set()) for room in TABLE} | PARTS
ALLOWED |= {"tools": WHOLE, "cli": WHOLE | {"tools"}}

# what has to work without a model or a trainer
LIGHT_ROOMS = ["errors", "records", "distributions", "objectives", "weighting", "tasks"]
HEAVY = {"lightning", "pytorch_lightning", "transformers"}


def room_of(module: str) -> str | None:
    """The room of a dotted name: `opd_lightning.data.files` -> data; None outside the package."""
    parts = module.split(".")
    if parts[0] != "opd_lightning":
        return None
    name = parts[1] if len(parts) > 1 else ""
    return opd_lightning._ROOM_OF.get(name, name)


def imported(source: str, package: str) -> set[str]:
    """Every dotted name that `source` imports, at any depth; `package` resolves relative ones."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def forbidden(source: str, room: str, package: str = "opd_lightning") -> set[str]:
    """The rooms that a file of `room` imports and may not."""
    rooms = {r for name in imported(source, package) if (r := room_of(name)) is not None}
    return rooms - ALLOWED[room] - {room, "errors"}


FILES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_room_imports_only_what_stands_below_it(path: Path):
    place = path.relative_to(SOURCE).with_suffix("").parts
    assert place[0] in ALLOWED, f"the room {place[0]!r} is not in the table; add it with its arrows"
    package = ".".join(["opd_lightning", *place[:-1]])
    assert forbidden(path.read_text(), place[0], package) == set()


def test_the_table_has_no_circle():
    """Rooms can be put in an order in which each imports only earlier ones."""
    left = dict(ALLOWED)
    while left:
        free = [room for room, below in left.items() if not (below - {room}) & set(left)]
        assert free, f"these import one another in a circle: {sorted(left)}"
        for room in free:
            del left[room]


@pytest.mark.parametrize(("room", "source", "found"), [
    ("records", "from opd_lightning.objectives import ReverseKL", {"objectives"}),
    ("records", "import opd_lightning.module", {"module"}),
    ("records", "from opd_lightning import module", {"module"}),
    ("records", "from opd_lightning import ReverseKL", {"objectives"}),
    ("objectives", "def f():\n    import opd_lightning.teachers.local", {"teachers"}),
    ("objectives", "from ..policy import CausalPolicy", {"policy"}),
    ("objectives", "from .. import policy", {"policy"}),
    ("tools", "if True:\n    from opd_lightning.cli import main", {"cli"}),
    ("objectives", "from .base import Need\nfrom opd_lightning.errors import nearest", set()),
    ("objectives", "import torch\nfrom opd_lightning.records import Rollout", set()),
])  # fmt: skip
def test_the_check_sees_every_form_of_import(room: str, source: str, found: set[str]):
    assert forbidden(source, room, f"opd_lightning.{room}") == found


@pytest.mark.parametrize("room", LIGHT_ROOMS)
def test_light_rooms_name_no_heavy_package(room: str):
    files = [p for p in FILES if p.relative_to(SOURCE).with_suffix("").parts[0] == room]
    names = {name for p in files for name in imported(p.read_text(), "opd_lightning")}
    assert not {name.split(".")[0] for name in names} & HEAVY


def heavy_packages_loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split()) & HEAVY


def test_objectives_load_neither_lightning_nor_transformers():
    statement = "import opd_lightning.objectives, opd_lightning.weighting, opd_lightning.records"
    assert heavy_packages_loaded_by(statement) == set()


def test_that_check_can_fail():
    loaded = heavy_packages_loaded_by("import opd_lightning.objectives, opd_lightning.module")
    assert {"lightning", "transformers"} <= loaded


@pytest.mark.parametrize("name", opd_lightning.__all__)
def test_public_name_resolves(name: str):
    assert getattr(opd_lightning, name) is not None
    assert name in dir(opd_lightning)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'opd_lightning' has no attribute 'Nothing'"):
        opd_lightning.Nothing  # noqa: B018
