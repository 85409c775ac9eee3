"""Run all benchmarks, keep their results, and write them into docs/performance.md.

    python benchmarks/run_all.py [--full] [--only step scaling] [--page]

`make bench` runs it. Results go to benchmarks/results/<date>.json (-full with full sizes). With
`--only`, the other sections of the page keep the results that the newest file has; `--page`
measures nothing and writes the page again from the newest file.
"""

import argparse
import importlib
import json
import re
import sys
import time
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common, scaling

SECTIONS = ("loss", "step", "rollout", "scaling")
RESULTS = common.ROOT / "benchmarks" / "results"
PAGE = common.ROOT / "docs" / "performance.md"
FIGURE = common.ROOT / "docs" / "figures" / "scaling.png"
NOT_MEASURED = "Not measured yet: `make bench`."


def scripts(names: list[str]) -> dict[str, ModuleType]:
    """Return the modules of the benchmarks.

    Raises:
        BenchmarkError: If one is missing, cannot be imported, or lacks `run` or `table`.
    """
    found = {}
    for name in names:
        try:
            module = importlib.import_module(f"benchmarks.{name}")
        except ImportError as error:
            raise common.BenchmarkError(
                f"benchmarks/{name}.py cannot be used: {error}. `make bench` installs what the "
                "benchmarks need."
            ) from error
        for function in ("run", "table"):
            if not hasattr(module, function):
                raise common.BenchmarkError(
                    f"benchmarks/{name}.py has no function {function}: `run(small)` returns JSON "
                    "values, `table(result)` returns Markdown."
                )
        found[name] = module
    return found


def measure(names: list[str], small: bool) -> dict[str, Any]:
    """Return the results of these benchmarks, and how long each took.

    Raises:
        BenchmarkError: If a script is missing or a check in it fails, with its name.
    """
    results, seconds = {}, {}
    for name, module in scripts(names).items():
        print(f"{name} ...", flush=True)
        started = time.perf_counter()
        try:
            results[name] = module.run(small=small)
        except Exception as error:
            raise common.BenchmarkError(f"benchmarks/{name}.py stopped: {error}") from error
        seconds[name] = round(time.perf_counter() - started)
        print(f"{name}: {seconds[name]} s", flush=True)
    return {
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
        "small": small,
        "machine": common.machine(),
        "versions": common.versions(),
        "seconds": seconds,
        "results": results,
    }


def newest() -> dict[str, Any] | None:
    """Return the results file that was written last, None where there is none."""
    files = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    return max(files, key=lambda found: found["finished"], default=None)


def merged(found: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """Return `found` with the sections that only `before` has.

    Raises:
        BenchmarkError: If they were measured with other versions, machines or sizes.
    """
    if before is None or set(found["results"]) >= set(before["results"]):
        return found
    differing = [k for k in ("machine", "versions", "small") if before[k] != found[k]]
    if differing:
        raise common.BenchmarkError(
            f"the newest results have another {' and '.join(differing)}; they cannot stand beside "
            "these. Run all sections, without --only."
        )
    return found | {key: before[key] | found[key] for key in ("results", "seconds")}


def blocks(found: dict[str, Any]) -> dict[str, str]:
    """Return the generated parts of the page, by name."""
    made = {"machine": _machine(found)}
    for name in SECTIONS:
        result = found["results"].get(name)
        module = None if result is None else scripts([name])[name]
        made[name] = NOT_MEASURED if module is None else module.table(result)
    return made


def _machine(found: dict[str, Any]) -> str:
    machine = found["machine"] | {"sizes": "small" if found["small"] else "full"}
    rows = [[key.replace("_", " "), value] for key, value in machine.items()]
    rows += [[key, value] for key, value in found["versions"].items()]
    rows += [["measured", found["finished"][:10]]]
    rows += [[f"{name}: took", f"{seconds} s"] for name, seconds in found["seconds"].items()]
    return common.markdown(["", ""], [[key, str(value)] for key, value in rows])


def part(text: str, name: str) -> str:
    """Return what stands between the markers of `name`.

    Raises:
        BenchmarkError: If the page has no such markers.
    """
    return _match(text, name).group(2)


def filled(text: str, made: dict[str, str]) -> str:
    """Return the page with the generated parts put between their markers.

    Raises:
        BenchmarkError: If the page lacks a marker.
    """
    for name, block in made.items():
        match = _match(text, name)
        text = f"{text[: match.start(2)]}{block}{text[match.end(2) :]}"
    return text


def _match(text: str, name: str) -> re.Match[str]:
    pattern = rf"(<!-- generated: {name} -->\n\n)(.*?)(\n\n<!-- end: {name} -->)"
    match = re.search(pattern, text, re.DOTALL)
    if match is None:
        raise common.BenchmarkError(
            f"{PAGE.name} has no place for {name!r}. Add the lines '<!-- generated: {name} -->' "
            f"and '<!-- end: {name} -->', with an empty line, a word and an empty line between."
        )
    return match


def write_page(found: dict[str, Any]) -> None:
    """Write tables and figure into the docs."""
    PAGE.write_text(filled(PAGE.read_text(), blocks(found)))
    if "scaling" in found["results"]:
        scaling.figure(found["results"]["scaling"], FIGURE)


def main() -> None:
    """Measure, keep, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="full sizes: an hour and more")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--page", action="store_true", help="write the page from the newest file")
    given = parser.parse_args()
    try:
        if given.page:
            found = newest()
            if found is None:
                raise common.BenchmarkError(f"no results in {RESULTS.relative_to(common.ROOT)}.")
        else:
            found = merged(measure(given.only, small=not given.full), newest())
            RESULTS.mkdir(exist_ok=True)
            name = found["finished"][:10] + ("-full" if given.full else "")
            (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        write_page(found)
    except common.BenchmarkError as error:
        sys.exit(f"{error}")
    print(f"{PAGE.relative_to(common.ROOT)} is written")


if __name__ == "__main__":
    main()
