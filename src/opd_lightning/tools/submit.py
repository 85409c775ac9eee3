"""`opd submit`: writes a SLURM script into the run's folder and submits it; sweeps as arrays."""

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from opd_lightning.errors import ConfigError, RunError

# What a sweep may call an argument of `opd fit`.
_SHORT_NAMES = {"objective": "model.objective", "seed": "seed_everything"}

Resolve = Callable[[Sequence[str]], dict[str, Any]]
"""Checks arguments of `opd fit` and returns the whole configuration, or raises ConfigError."""


@dataclass
class Job:
    """What is asked of SLURM, for example `Job(nodes=2, gpus=8, time="12:00:00")`.

    Attributes:
        nodes: Number of nodes.
        gpus: GPUs of each node, one process a GPU; 0 for none.
        tasks: Processes of each node where there are no GPUs.
        cpus: CPUs of each process.
        time: Limit as SLURM writes it, such as `12:00:00` or `2-00:00:00`.
        partition: None: the cluster's default.
        account: None: the user's default.
        name: Job name.
        signal_seconds: How long before the limit the run is told to save and stop.
        options: Further options of `sbatch`, such as `--qos=long`.

    Raises:
        ConfigError: If a number is too small, or both GPUs and tasks are given.
    """

    nodes: int = 1
    gpus: int = 1
    tasks: int | None = None
    cpus: int = 8
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    name: str = "opd"
    signal_seconds: int = 120
    options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, value, least in [
            ("--nodes", self.nodes, 1),
            ("--gpus", self.gpus, 0),
            ("--tasks", 1 if self.tasks is None else self.tasks, 1),
            ("--cpus", self.cpus, 1),
            ("--signal-seconds", self.signal_seconds, 1),
        ]:
            if value < least:
                raise ConfigError(f"{name} must be at least {least}; got {value}.")
        if self.gpus and self.tasks is not None:
            raise ConfigError(
                f"--tasks {self.tasks} with --gpus {self.gpus}: there is one process a GPU. Leave "
                "--tasks out, or give --gpus 0."
            )

    def directives(self) -> dict[str, str | None]:
        """Return the values of the script's `#SBATCH` lines; None: no such line."""
        further = [option.lstrip("-").partition("=") for option in self.options]
        return {
            "job-name": self.name,
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.gpus or self.tasks or 1),
            "gpus-per-node": str(self.gpus) if self.gpus else None,
            "cpus-per-task": str(self.cpus),
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "signal": f"USR1@{self.signal_seconds}",
            **{name: value for name, _, value in further},
        }


def submit(
    job: Job,
    fit: Sequence[str],
    resolve: Resolve,
    folder: Path | None = None,
    sweep: Sequence[str] = (),
    template: Path | None = None,
    dry_run: bool = False,
) -> str:
    """Check every run, write its configuration and the script, and submit; return what to print.

    Args:
        job: What is asked of SLURM.
        fit: Arguments of `opd fit`, which all runs share.
        resolve: See `Resolve`.
        folder: Of the run; each run of a sweep has a folder in it. Submitted again, a run goes on
            in its folder. None: a new one in the configuration's `trainer.default_root_dir`.
        sweep: Axes such as `objective=ReverseKL,ForwardKL`; all combinations are run.
        template: A script with the lines of `configs/slurm/train.sbatch`; None: that one.
        dry_run: Return the script; write and submit nothing.

    Raises:
        ConfigError: If an argument, a combination or the template is not valid, or `sbatch` is
            not there.
        RunError: If `sbatch` refuses.
    """
    if not dry_run and shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on the PATH: opd submit runs where jobs can be submitted, on a login "
            "node of the cluster. --dry-run prints the script; opd fit trains here."
        )
    runs = combinations(sweep)
    names = [folder_name(run) for run in runs]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--sweep names a run twice: {', '.join(sorted(repeated))}.")
    configurations = [_checked(resolve, fit, run) for run in runs]
    if folder is None:
        root = Path(configurations[0]["trainer"]["default_root_dir"])
        folder = root / time.strftime("%Y%m%d-%H%M%S")
    folder = folder.absolute()
    folders = [folder / name for name in names]
    text = script(job, folder, folders, template)
    if dry_run:
        return text
    for place, configuration in zip(folders, configurations, strict=True):
        place.mkdir(parents=True, exist_ok=True)
        configuration["trainer"]["default_root_dir"] = str(place)
        (place / "submitted.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False))
    path = folder / "train.sbatch"
    path.write_text(text)
    number = _sbatch(path)
    log = str(folder / _log_name(sweep)).replace("%j", number).replace("%A", number)
    lines = [f"job {number} submitted, script {path}", f"log: {log.replace('%a', 'TASK')}"]
    if sweep:
        lines += [f"  task {task}: {place.name}" for task, place in enumerate(folders)]
    return "\n".join(lines)


def _checked(
    resolve: Resolve, fit: Sequence[str], run: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    try:
        return resolve([*fit, *(part for key, value in run for part in (f"--{key}", value))])
    except ConfigError as error:
        raise ConfigError(
            f"{error} (in the run {folder_name(run)})" if run else str(error)
        ) from error


def combinations(sweep: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Return one list of (argument, value) a run; without a sweep, one run with nothing.

    Raises:
        ConfigError: If an axis is not NAME=VALUE,VALUE... or is given twice.
    """
    axes: dict[str, list[str]] = {}
    for text in sweep:
        name, equals, values = text.partition("=")
        key = _SHORT_NAMES.get(name, name)
        parts = [part for part in _split(values) if part]
        if not (name and equals and parts):
            raise ConfigError(
                f"--sweep takes NAME=VALUE,VALUE,..., such as objective=ReverseKL,ForwardKL or "
                f"model.objective.k=16,64; got {text!r}."
            )
        if key in axes:
            raise ConfigError(f"--sweep {name} is given twice. Give all its values at once.")
        axes[key] = parts
    named = [[(key, value) for value in values] for key, values in axes.items()]
    return [list(run) for run in product(*named)]


def _split(values: str) -> list[str]:
    """Split at commas, but not inside brackets: `[a,b],c` -> `[a,b]`, `c`."""
    parts, depth = [""], 0
    for character in values:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def folder_name(run: Sequence[tuple[str, str]]) -> str:
    """Return a folder's name that says what the run is, such as `objective=ReverseKL,seed=1`."""
    short = {key: name for name, key in _SHORT_NAMES.items()}
    name = ",".join(f"{short.get(key, key)}={value}" for key, value in run)
    return re.sub(r"[^\w.=,+-]", "_", name)


def script(job: Job, folder: Path, folders: Sequence[Path], template: Path | None = None) -> str:
    """Return the template with its block filled.

    Args:
        job: What is asked of SLURM.
        folder: Where the log goes.
        folders: The folder of each run; several make an array job.
        template: See `submit`.

    Raises:
        ConfigError: If the template cannot be read or has none of the lines to be filled.
    """
    is_array = folders[0] != folder
    values = job.directives() | {
        "output": str(folder / _log_name(is_array)),
        "array": f"0-{len(folders) - 1}" if is_array else None,
    }
    variables = {
        "RUN_FOLDERS": _bash_array(folders),
        "OPD": _bash_array([sys.executable, "-m", "opd_lightning.cli"]),
    }
    lines = _template(template)
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    present = {match[1] for line in lines if (match := re.match(r"#SBATCH --([\w-]+)", line))}
    missing = [name for name in variables if not any(_sets(line, name) for line in lines)]
    if missing or not directives:
        raise ConfigError(
            f"template {template} has no line {missing[0] + '=' if missing else '#SBATCH'}. Start "
            "from configs/slurm/train.sbatch."
        )
    added = {name: value for name, value in values.items() if name not in present}
    filled = []
    for i, line in enumerate(lines):
        match = re.match(r"#SBATCH --([\w-]+)", line)
        if match and match[1] in values:
            filled += _directive(match[1], values[match[1]])
        else:
            name = next((name for name in variables if _sets(line, name)), None)
            filled.append(line if name is None else f"{name}={variables[name]}")
        if i == directives[-1]:
            for name, value in added.items():
                filled += _directive(name, value)
    return "\n".join(filled) + "\n"


def _template(path: Path | None) -> list[str]:
    if path is None:
        return (files("opd_lightning.tools") / "train.sbatch").read_text().splitlines()
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"template {str(path)!r} cannot be read ({error}).") from error


def _sets(line: str, variable: str) -> bool:
    return line.startswith(f"{variable}=")


def _directive(name: str, value: str | None) -> list[str]:
    if value is None:
        return []
    return [f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"]


def _bash_array(parts: Sequence[object]) -> str:
    return f"({' '.join(shlex.quote(str(part)) for part in parts)})"


def _log_name(is_array: object) -> str:
    return "%A_%a.log" if is_array else "%j.log"


def _sbatch(path: Path) -> str:
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RunError(
            f"sbatch refuses {path}: {done.stderr.strip() or done.stdout.strip()}. Change the "
            "options, or the script, and submit it again."
        )
    return done.stdout.strip().partition(";")[0]
