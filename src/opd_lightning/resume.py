"""Which run `opd fit` continues, from which checkpoint, and what must not have changed since."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_lightning.callbacks.checkpoint import FOLDER, RUN_FILE, write_run_file
from opd_lightning.callbacks.loggers import cut_logs
from opd_lightning.callbacks.whole import (
    BrokenCheckpoint,
    check_sharded,
    check_whole,
    marker_of,
    read_marker,
)
from opd_lightning.errors import ConfigError, nearest

log = logging.getLogger("opd_lightning")

# Sections of the configuration, and arguments of the trainer, that the result depends on.
_SECTIONS = ("seed_everything", "model", "data", "rollout")
_OF_TRAINER = ("precision", "limit_train_batches", "reload_dataloaders_every_n_epochs")
# What changes nothing in training but its rounding, speed or memory, or is for evaluation.
_HARMLESS = (
    "data.num_workers",
    "data.val",
    "data.test",
    "data.predict",
    "data.eval_prompts_per_step",
    "rollout.init_args.evaluation",
    "rollout.evaluation",
    "model.micro_batch_tokens",
    "model.memory_limit_gb",
    "model.metrics_every",
)
_HARMLESS_NAMES = {
    "attn_implementation",
    "gradient_checkpointing",
    "compile",
    "packed",
    "trust_remote_code",
    "allow_pickle",
}
# The optimiser's and the schedule's settings are part of a checkpoint, and loaded with it.
_FIXED = ("model.optimizer", "model.lr_scheduler")
_ABSENT = "(nothing)"
_WHOLE_FILE_BYTES = 2**26
_SAMPLES, _SAMPLE_BYTES = 64, 2**12


@dataclass
class Resume:
    """How `opd fit` begins.

    Attributes:
        mode: "never": a new run; "auto": the newest run of `trainer.default_root_dir`, from its
            newest whole checkpoint, or a new one where there is none; or the path of a checkpoint
            or a run folder, to go on in that folder.
        allow_change: Dotted names of settings that may differ from the run that is continued.
    """

    mode: str = "never"
    allow_change: list[str] = field(default_factory=list)


@dataclass
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: To continue from; None for the beginning.
        facts: What its marker says.
    """

    checkpoint: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------- the run's folder


def run_version(resume: Resume, root: Path) -> int | None:
    """Return the N of the `version_N` in `root` that a run goes on in; None for a new one.

    Raises:
        ConfigError: If a path is given that is no run folder's.
    """
    if resume.mode == "never":
        return None
    if resume.mode == "auto":
        versions = list(_versions(root))
        begun = [number for number, folder in versions if (folder / RUN_FILE).is_file()]
        # killed before it had written anything
        unborn = [number for number, folder in versions if not any(folder.glob("[!.]*"))]
        return max(begun or unborn, default=None)
    folder = run_folder_of(Path(resume.mode))
    for number, known in _versions(root):
        if known.resolve() == folder.resolve():
            return number
    raise ConfigError(
        f"--resume {resume.mode}: its run folder is {folder}, but this run's folders are {root}/"
        f"version_<n>. Give --trainer.default_root_dir {folder.parent}, or --ckpt_path to go on in "
        "a new folder."
    )


def _versions(root: Path) -> Iterator[tuple[int, Path]]:
    for folder in root.glob("version_*"):
        number = folder.name.partition("_")[2]
        if number.isdigit() and folder.is_dir():
            yield int(number), folder


def run_folder_of(path: Path) -> Path:
    """Return the run folder of a checkpoint, or of itself.

    Raises:
        ConfigError: If there is nothing at `path`, or it is neither.
    """
    if not path.exists():
        siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ConfigError(
            f"--resume {path}: there is no such checkpoint or run folder."
            f"{nearest(path.name, siblings)} Give auto, never, a checkpoint or a run folder."
        )
    if path.is_dir() and (path / FOLDER).is_dir():
        return path
    if path.absolute().parent.name == FOLDER:
        return path.absolute().parent.parent
    raise ConfigError(
        f"--resume {path}: neither a run folder nor a checkpoint in the `{FOLDER}` of one. Give "
        "auto, never, or one of these; --ckpt_path takes a checkpoint from anywhere."
    )


# -------------------------------------------------------------------------- the checkpoint


def find_start(resume: Resume, folder: Path, limits: Sequence[int | None]) -> Start:
    """Return from where a run in `folder` goes on: its newest whole checkpoint, or the beginning.

    Checkpoints that are not whole are named in a warning and passed over, and so are those made
    between the updates of a round, unless the run has ended there.

    Args:
        resume: What was asked for.
        folder: The run folder.
        limits: `max_steps` and `max_epochs` of this run.

    Raises:
        ConfigError: If the one that was asked for is not whole.
    """
    if resume.mode == "never":
        return Start()
    named = Path(resume.mode)
    if resume.mode != "auto" and not (named / FOLDER).is_dir():
        named = named.resolve()  # of `last.ckpt`, which is a link
        try:
            return Start(named, check_whole(named))
        except BrokenCheckpoint as error:
            raise ConfigError(
                f"--resume {resume.mode}: not a whole checkpoint: {error}. Give another, or auto."
            ) from error
    for path in _newest_first(folder / FOLDER):
        try:
            facts = check_whole(path)
        except BrokenCheckpoint as error:
            log.warning("checkpoint %s is not whole and passed over: %s", path, error)
            continue
        if facts["mid_round"] and not is_finished(facts, limits):
            log.info("checkpoint %s, made within a round, is passed over", path)
            continue
        return Start(path, facts)
    return Start()


def _newest_first(folder: Path) -> list[Path]:
    paths = [path for path in folder.glob("step_*.ckpt") if not path.is_symlink()]
    # a marker whose checkpoint is gone counts too: it is named
    paths += [
        marker.with_suffix("")
        for marker in folder.glob("step_*.ckpt.json")
        if not marker.with_suffix("").exists()
    ]
    return sorted(paths, key=lambda path: path.name, reverse=True)


def is_finished(facts: dict[str, Any], limits: Sequence[int | None]) -> bool:
    """Whether the run of this checkpoint has ended, by the limits that it has this time."""
    return bool(facts["finished"]) and list(facts["until"]) == list(limits)


def begin(folder: Path, start: Start, identity: dict[str, Any]) -> None:
    """Note which run the folder holds, and cut its logs back to the checkpoint.

    Logs in a folder that was not one of `opd fit` are left alone.
    """
    is_run = (folder / RUN_FILE).is_file() or start.checkpoint is not None
    write_run_file(folder, identity)
    if is_run:
        cut_logs(folder, start.facts.get("logs", {}))


# ---------------------------------------------------------------------------- what a run is


def identity_of(config: dict[str, Any]) -> dict[str, list[str]]:
    """Return what the result of a run depends on: dotted name -> [value shown, value compared].

    Model folders and data files are compared by their content, whatever their path. Left out is
    what changes nothing but rounding, speed, memory, logs and evaluation.

    Args:
        config: The resolved configuration of `opd fit`.
    """
    chosen = {name: config.get(name) for name in _SECTIONS}
    chosen["trainer"] = {name: config["trainer"].get(name) for name in _OF_TRAINER}
    identity = {}
    for name, value in leaves(chosen):
        if name.startswith(_HARMLESS) or name.rpartition(".")[2] in _HARMLESS_NAMES:
            continue
        # a model is its folder's name, or a class that has one
        key = name.removesuffix(".path") if name.startswith("model.student") else name
        shown = "null" if value is None else str(value)
        content = _content(value) if isinstance(value, str) else None
        identity[key] = [shown, content or shown]
    return identity


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted names and values of a configuration; lists of settings count by number."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        items = enumerate(value)
    if not items:
        yield name, value
    for key, item in items:
        yield from leaves(item, f"{name}.{key}" if name else str(key))


def _content(value: str) -> str | None:
    """Return a hash of the model folder or file at `value`; None if it is neither."""
    path = Path(value).expanduser()
    try:
        if path.is_file():
            return f"sha256 {_hash_file(path)}"
        if (path / "config.json").is_file():
            files = sorted(p for p in path.iterdir() if p.is_file())
            joined = "".join(f"{p.name} {_hash_file(p)}\n" for p in files if p.suffix != ".md")
            return f"sha256 {hashlib.sha256(joined.encode()).hexdigest()}"
    except OSError:  # a value that is no name of a file
        pass
    return None


def _hash_file(path: Path) -> str:
    """Hash a file; of one above 64 MiB its size, its head and 64 blocks spread over it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_FILE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for number in range(_SAMPLES):
            file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def check_identity(
    saved: dict[str, Any], own: dict[str, Any], checkpoint: Path, allowed: Sequence[str]
) -> None:
    """Refuse to continue a run with other settings.

    Args:
        saved: The identity in the checkpoint's marker; empty where none is known.
        own: That of this run.
        checkpoint: For the message.
        allowed: Dotted names that may differ, with all below them.

    Raises:
        ConfigError: If they differ in another name (with the old and new values), or `allowed`
            names what is none.
    """
    for name in allowed:
        if not any(_is_below(key, [name]) for key in [*own, *saved]):
            raise ConfigError(
                f"--resume.allow_change {name}: there is no such setting."
                f"{nearest(name, [*own, *saved])} Names are dotted, as in --print_config."
            )
        if name.startswith(_FIXED):
            raise ConfigError(
                f"--resume.allow_change {name} would have no effect: the optimiser's and the "
                "schedule's settings are part of the checkpoint. Export the student (opd export) "
                "and begin a new run from it."
            )
    if not saved:
        return
    different = []
    for name in [*own, *(name for name in saved if name not in own)]:
        old, new = saved.get(name, [_ABSENT] * 2), own.get(name, [_ABSENT] * 2)
        if old[1] != new[1] and not _is_below(name, allowed):
            said = f"{old[0]} -> {new[0]}"
            different.append(f"{name}: {said if old[0] != new[0] else f'{said}, other content'}")
    if different:
        raise ConfigError(
            f"the run of {checkpoint} is another one: {'; '.join(different)}. Go on with the "
            "settings that it began with, begin a new run (--resume never), or allow the change "
            f"(--resume.allow_change {different[0].partition(':')[0]})."
        )


def _is_below(name: str, parents: Sequence[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def check_given_checkpoint(path: Path, own: dict[str, Any], allowed: Sequence[str]) -> None:
    """Check a checkpoint given by `--ckpt_path`: what it would execute, and whose run it is.

    Raises:
        ConfigError: If it is a sharded one that may not be loaded, or another run's.
    """
    path = path.resolve()
    if path.is_dir():
        check_sharded(path)
    if marker_of(path).is_file():
        try:
            facts = read_marker(path)
        except BrokenCheckpoint as error:
            raise ConfigError(f"checkpoint {path} is not whole: {error}. Give another.") from error
        check_identity(facts["identity"], own, path, allowed)


# ------------------------------------------------------------- `resume: auto`, in both spellings


def nested_settings(config: Any) -> Any:
    """Return a configuration with `resume: auto` written as `resume: {mode: auto}`."""
    if isinstance(config, dict) and isinstance(config.get("resume"), str):
        return config | {"resume": {"mode": config["resume"]}}
    return config


def nested_arguments(args: Sequence[str]) -> list[str]:
    """Return a command line with the short spellings of resuming written out.

    `--resume auto` becomes `--resume.mode auto`; `--resume.allow_change a b` and `[a, b]` become
    `--resume.allow_change ["a", "b"]`.
    """
    done: list[str] = []
    left = list(args)
    while left:
        arg = left.pop(0)
        flag, equals, value = arg.partition("=")
        if flag == "--resume":
            done.append(f"--resume.mode{equals}{value}")
        elif flag == "--resume.allow_change":
            names = [value] if equals else []
            while not equals and left and not left[0].startswith("-"):
                names.append(left.pop(0))
            split = " ".join(names).replace("[", " ").replace("]", " ").replace(",", " ").split()
            done.append(f"{flag}={json.dumps([name.strip(chr(34) + chr(39)) for name in split])}")
        else:
            done.append(arg)
    return done
