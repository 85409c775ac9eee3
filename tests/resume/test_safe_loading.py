"""Nothing in a checkpoint is executed, by any verb, however it was made."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from opd_lightning.callbacks.whole import check_sharded, marker_of, sums_of
from opd_lightning.cli import main
from opd_lightning.errors import ConfigError
from opd_lightning.tools.export import load_checkpoint
from tests.resume.kit import Run


class Touches:
    """Unpickled without restriction, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def touched(tmp_path: Path) -> Path:
    return tmp_path / "touched"


def test_the_trap_works(touched: Path):
    pickle.loads(pickle.dumps(Touches(touched)))
    assert touched.exists()


@pytest.fixture(scope="module")
def ended(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(world, tmp_path_factory.mktemp("safe") / "ended", "--trainer.max_steps=2")
    run.finish()
    return run


def poisoned(run: Run, folder: Path, touched: Path) -> Path:
    """A whole checkpoint of the run, marker and all, that would execute something."""
    shutil.copytree(run.run_folder, folder / "version_0", symlinks=True)
    path = folder / "version_0" / "checkpoints" / "step_00000002.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["callbacks"]["RunCheckpoint"]["note"] = Touches(touched)
    torch.save(saved, path)
    facts = json.loads(marker_of(path).read_text())
    facts["files"] = sums_of([path], path.parent)
    marker_of(path).write_text(json.dumps(facts))
    return path


@pytest.mark.parametrize("verb", ["fit", "resume", "validate", "test", "predict", "export"])
def test_no_verb_executes_what_a_checkpoint_holds(
    ended: Run, tmp_path: Path, touched: Path, verb: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    path = poisoned(ended, tmp_path / "runs", touched)
    root = f"--trainer.default_root_dir={tmp_path / 'runs'}"
    args = [*ended.args[1:], root, "--trainer.max_steps=4"]
    line = {
        "fit": ["fit", *args, "--resume=never", f"--ckpt_path={path}"],
        "resume": ["fit", *args],
        "export": ["export", "--ckpt", str(path), "--out", str(tmp_path / "out")],
    }.get(verb, [verb, *args, f"--ckpt_path={path}"])
    monkeypatch.setattr("sys.argv", ["opd", *line])
    with pytest.raises(SystemExit) as exit_:
        main(line)
    assert exit_.value.code != 0
    said = capsys.readouterr().err
    assert "Weights only load failed" in said or "weights_only" in said, said
    assert not touched.exists()


def sharded(folder: Path, **extra: Any) -> Path:
    state = {"state_dict": {"w": torch.ones(3)}, "optimizer_0": {"lr": 0.1, "betas": (0.9, 0.95)}}
    dcp.save(state | extra, checkpoint_id=folder, no_dist=True)
    return folder


def in_the_index(folder: Path, touched: Path) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data["w"] = Touches(touched)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def by_way_of_a_module(folder: Path, touched: Path) -> None:
    """A name that is reached through an allowed module: protocol 4 takes dotted ones."""
    command = f"touch {touched}".encode()
    module, name = b"torch.distributed.checkpoint.metadata", b"os.system"
    text = b"\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name
    call = b"\x93\x8c" + bytes([len(command)]) + command + b"\x85R."
    (folder / ".metadata").write_bytes(b"\x80\x04" + text + call)


def in_an_entry(folder: Path, touched: Path) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    ((entry, place),) = [(k, v) for k, v in index.storage_data.items() if k.fqn.endswith("lr")]
    poison = io.BytesIO()
    torch.save(Touches(touched), poison)
    path = folder / place.relative_path
    place.offset, place.length = path.stat().st_size, len(poison.getvalue())
    with path.open("ab") as file:
        file.write(poison.getvalue())
    index.storage_data[entry] = place
    (folder / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("poison", [in_the_index, by_way_of_a_module, in_an_entry])
def test_a_sharded_checkpoint_is_read_with_care_before_torch_reads_it(
    tmp_path: Path, touched: Path, poison: Callable[[Path, Path], None]
):
    folder = sharded(tmp_path / "step.ckpt")
    check_sharded(folder)
    poison(folder, touched)
    with pytest.raises(ConfigError, match="no sharded checkpoint that may be loaded"):
        check_sharded(folder)
    assert not touched.exists()
    state = {"state_dict": {"w": torch.ones(3)}, "optimizer_0": {"lr": 0.0, "betas": (0.0, 0.0)}}
    with pytest.raises(BaseException):  # noqa: B017 torch's own way of failing afterwards differs
        dcp.load(state, checkpoint_id=folder, no_dist=True)
        assert not touched.exists(), "torch alone would have executed it"


def test_export_reads_weights_only(tmp_path: Path, touched: Path):
    torch.save({"opd_lightning": Touches(touched)}, tmp_path / "x.ckpt")
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights.only"):
        load_checkpoint(str(tmp_path / "x.ckpt"))
    assert not touched.exists()
