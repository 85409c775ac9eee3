"""Checkpoints that are whole or not there: written beside, synced, renamed, and told apart later.

A checkpoint is a file, or a folder of shards, and beside it a marker, `NAME.ckpt.json`, that is
written last: step, facts of the run, and size and CRC-32 of every file.
"""

import io
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch

from opd_lightning.checkpoints import AnyCheckpointIO
from opd_lightning.errors import ConfigError, RunError

MARKER_ENDING = ".json"
WRITING = ".writing_"
"""What a name begins with while its file or folder is being written."""
_BLOCK_BYTES = 2**22
# What the index of a sharded checkpoint is made of; nothing else is imported for it. Exact names: a
# module's own imports could be reached through it.
_INDEX_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "TensorProperties",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name in dir(torch) if type(getattr(torch, name)) is torch.dtype)},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"},
}

Sums = dict[str, list[int]]
"""Name of a file, relative to the checkpoint's folder -> [bytes, CRC-32]."""


class BrokenCheckpoint(Exception):
    """Why a checkpoint is not whole, in a few words."""


class WholeCheckpointIO(AnyCheckpointIO):
    """Lightning's reading and writing of checkpoint files, such that a file is whole or not there.

    Written under another name in the same folder, synced to disk, renamed. Read with
    `weights_only=True`, whatever is asked for: nothing in a checkpoint is ever executed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, list[int]] = {}
        """Path of the file written last -> [bytes, CRC-32]."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write it; what stood at `path` before stays there until then.

        Raises:
            RunError: If the disk is full or the file cannot be written; nothing is left of it.
        """
        place = Path(path)
        beside = place.with_name(f"{WRITING}{place.name}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                summed = _Summed(file)
                torch.save(checkpoint, summed)
                file.flush()
                os.fsync(file.fileno())
            rename(beside, place)
            self.sums = {str(path): [summed.size, summed.crc]}
        except (OSError, RuntimeError) as error:  # torch wraps the disk's error in its own
            beside.unlink(missing_ok=True)
            raise RunError(
                f"cannot write the checkpoint {place}: {_reason(error)}. Earlier checkpoints are "
                "intact. Make room, or lower keep_last and keep_best; then start again from them."
            ) from error


class _Summed:
    """A file to be written from front to back, with its size and CRC-32 so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.size = self.crc = 0

    def write(self, block: Any) -> int:
        self.crc = zlib.crc32(block, self.crc)
        written = self.file.write(block)
        self.size += written
        return written

    def flush(self) -> None:
        self.file.flush()


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
    return str(error).strip().partition("\n")[0]


def rename(source: Path, target: Path) -> None:
    """Rename, and sync the folder so that the new name outlives a power cut.

    A folder at `target` is removed first: it cannot be replaced in one step.
    """
    if target.is_dir() and not target.is_symlink():
        remove(target)
    os.replace(source, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Sync the names of a folder to disk, where the system can."""
    if os.name == "nt":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_files(folder: Path) -> None:
    """Sync all files below a folder, and the folder itself, to disk."""
    for path in files_of(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def write_whole(path: Path, text: str) -> None:
    """Write a small text file such that it is the old or the new one, never a part."""
    beside = path.with_name(f"{WRITING}{path.name}")
    with beside.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    rename(beside, path)


def marker_of(checkpoint: Path) -> Path:
    """Return where the marker of a checkpoint stands."""
    return checkpoint.with_name(checkpoint.name + MARKER_ENDING)


def sums_of(paths: Iterable[Path], folder: Path) -> Sums:
    """Return size and CRC-32 of files, named relative to `folder`."""
    return {str(path.relative_to(folder)): list(_sum(path)) for path in paths}


def _sum(path: Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def files_of(checkpoint: Path) -> list[Path]:
    """Return the files of a checkpoint: itself, or all in its folder."""
    if checkpoint.is_dir():
        return sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return [checkpoint]


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, its marker first: what is left of it is then known not to be whole."""
    marker_of(checkpoint).unlink(missing_ok=True)
    if checkpoint.is_dir() and not checkpoint.is_symlink():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """Return what the marker of a checkpoint says.

    Raises:
        BrokenCheckpoint: If it is missing or not readable.
    """
    marker = marker_of(checkpoint)
    try:
        facts = json.loads(marker.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BrokenCheckpoint(f"it has no marker {marker.name}, which is written last") from None
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(f"it has a marker that cannot be read ({error})") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("files"), dict):
        raise BrokenCheckpoint("it has a marker that lists no files")
    return facts


def check_whole(checkpoint: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its marker, and return what the marker says.

    Sizes first; then all is read once, at the speed of the disk (the CRC-32 runs at 2.6 GB/s).

    Raises:
        BrokenCheckpoint: If the marker or a file is missing, shorter, longer or another.
    """
    facts = read_marker(checkpoint)
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    for name, (size, _) in facts["files"].items():
        if not (folder / name).is_file():
            raise BrokenCheckpoint(f"it lacks {name}")
        if (seen := (folder / name).stat().st_size) != size:
            raise BrokenCheckpoint(f"{name} has {seen} bytes, not the {size} that were written")
    for name, (_, crc) in facts["files"].items():
        if _sum(folder / name)[1] != crc:
            raise BrokenCheckpoint(f"{name} holds other bytes than were written (CRC-32)")
    return facts


class _IndexReader(pickle.Unpickler):
    """Reads the index of a sharded checkpoint, and imports nothing but what an index is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would import {module}.{name}")


def check_sharded(folder: Path) -> None:
    """Refuse a sharded checkpoint whose files would execute something when they are loaded.

    Torch unpickles the index, and entries that are no tensors, without restriction.

    Raises:
        ConfigError: If they are more than tensors, numbers, strings and containers of these.
    """
    try:
        index = _IndexReader(io.BytesIO((folder / ".metadata").read_bytes())).load()
        for name, entry in index.state_dict_metadata.items():
            if type(entry).__name__ == "BytesStorageMetadata":
                _check_entry(folder, name, index.storage_data)
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"checkpoint {str(folder)!r} is no sharded checkpoint that may be loaded: {reason}. "
            "Checkpoints hold tensors, numbers and strings only."
        ) from error


def _check_entry(folder: Path, name: str, places: dict[Any, Any]) -> None:
    for index, place in places.items():
        if index.fqn == name:
            with (folder / place.relative_path).open("rb") as file:
                torch.load(_part(file, place.offset, place.length), weights_only=True)


def _part(file: IO[bytes], offset: int, length: int) -> io.BytesIO:
    file.seek(offset)
    return io.BytesIO(file.read(length))
