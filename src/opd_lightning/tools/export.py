"""`opd export`: a Hugging Face folder from a checkpoint."""

import json
import zipfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opd_lightning import checkpoints
from opd_lightning.callbacks.whole import check_sharded
from opd_lightning.errors import ConfigError, nearest
from opd_lightning.policy import CausalPolicy, PolicySpec, export_policy

_PREFIX = "student.model."
_KEYS_SHOWN = 5
_WHERE = "They lie in the run folder: runs/<name>/version_<n>/checkpoints/*.ckpt."


def export(checkpoint: str, out: str, model: str | None = None) -> Path:
    """Write the student of a checkpoint as a Hugging Face folder.

    Args:
        checkpoint: A `.ckpt` file or folder of `opd fit`.
        out: Folder to write; must not hold a model already.
        model: Folder whose tokenizer and generation config are copied; default: the one that the
            run started from.

    Raises:
        ConfigError: If the checkpoint is missing or not of this package, or `out` holds a model.
    """
    folder = Path(out)
    if (folder / "config.json").exists():
        raise ConfigError(f"{out!r} holds a model already. Name another folder, or remove it.")
    saved = load_checkpoint(checkpoint)
    origin = PolicySpec(model or saved["opd_lightning"]["student_path"])
    tokenizer = origin.load_tokenizer()
    student = student_of(saved)
    origin.set_generation_config(student)
    export_policy(CausalPolicy(student), tokenizer, folder)
    return folder


def load_checkpoint(path: str) -> dict[str, Any]:
    """Return the contents of a checkpoint: tensors, numbers and strings only.

    Raises:
        ConfigError: If there is none at `path`, or it is not one of this package.
    """
    check_checkpoint(path)
    if Path(path).is_dir():
        if not checkpoints.is_sharded(path):
            raise ConfigError(f"checkpoint {path!r} is a folder without shards. {_WHERE}")
        check_sharded(Path(path))
    saved = checkpoints.load_checkpoint(path)
    if "opd_lightning" not in saved:
        keys = [str(key) for key in saved][:_KEYS_SHOWN]
        raise ConfigError(
            f"checkpoint {path!r} was not written by opd fit (it holds {', '.join(keys)}, ...). "
            f"{_WHERE}"
        )
    return saved


def check_checkpoint(path: str) -> None:
    """Refuse, without reading it, what cannot be a checkpoint; a folder may be a sharded one.

    Raises:
        ConfigError: If there is nothing at `path`, or a file of another kind or cut off.
    """
    place = Path(path)
    if not place.exists():
        raise ConfigError(f"checkpoint {path!r} does not exist.{_near(path)} {_WHERE}")
    if place.is_dir() and (files := sorted(file.name for file in place.glob("*.ckpt"))):
        raise ConfigError(f"checkpoint {path!r} is a folder. Name one of it: {', '.join(files)}.")
    # the table of a zip file stands at its end, so that a file that was cut off has none
    if place.is_file() and not zipfile.is_zipfile(place):
        raise ConfigError(
            f"checkpoint {path!r} ({place.stat().st_size} bytes) is a file of another kind, or was "
            f"cut off while it was written. {_WHERE}"
        )


def _near(path: str) -> str:
    siblings = [file.name for file in Path(path).parent.glob("*.ckpt")]
    return nearest(Path(path).name, siblings)


def student_of(saved: dict[str, Any]) -> PreTrainedModel:
    """Return the student model with the checkpoint's weights."""
    fields = json.loads(saved["opd_lightning"]["student_config"])
    config = AutoConfig.for_model(fields["model_type"]).from_dict(fields)
    weights = {
        key.removeprefix(_PREFIX): value
        for key, value in saved["state_dict"].items()
        if key.startswith(_PREFIX)
    }
    dtype = next(iter(weights.values())).dtype
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(weights)
    return model
