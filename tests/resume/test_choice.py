"""Which checkpoint a run goes on from, what is refused, and how it is asked for."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml

from opd_lightning.cli import main
from opd_lightning.errors import ConfigError
from opd_lightning.resume import (
    Resume,
    Start,
    begin,
    find_start,
    identity_of,
    nested_arguments,
    nested_settings,
    run_version,
)
from tests.resume.kit import Run, assert_equal
from tests.resume.test_kills import die_in_evaluation

AUTO = Resume("auto")
LIMITS = [12, -1]


@pytest.fixture(scope="module")
def ended(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 12 steps with checkpoints of steps 8 and 12, its last evaluation at 12."""
    run = Run(world, tmp_path_factory.mktemp("choice") / "ended", "--trainer.max_steps=12")
    run.finish()
    assert run.steps_saved() == [8, 12]
    return run


@pytest.fixture
def folder(ended: Run, tmp_path: Path) -> Path:
    """A copy of its run folder."""
    return Path(shutil.copytree(ended.run_folder, tmp_path / "version_0", symlinks=True))


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / "step_00000012.ckpt"


def cut_off(path: Path) -> str:
    os.truncate(path, path.stat().st_size - 1)
    return r"bytes, not the \d+ that were written"


def holed(path: Path) -> str:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))
    return r"holds other bytes than were written"


def without_marker(path: Path) -> str:
    path.with_suffix(".ckpt.json").unlink()
    return r"has no marker step_00000012\.ckpt\.json"


def half_a_marker(path: Path) -> str:
    marker = path.with_suffix(".ckpt.json")
    os.truncate(marker, marker.stat().st_size // 2)
    return r"has a marker that cannot be read"


def marker_alone(path: Path) -> str:
    path.unlink()
    return r"lacks step_00000012\.ckpt"


@pytest.mark.parametrize("damage", [cut_off, holed, without_marker, half_a_marker, marker_alone])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    folder: Path, damage: Callable[[Path], str], caplog: pytest.LogCaptureFixture
):
    logging.getLogger("opd_lightning").propagate = True
    path = newest(folder)
    assert find_start(AUTO, folder, [24, -1]).checkpoint == path
    assert not caplog.records
    expected = damage(path)
    start = find_start(AUTO, folder, [24, -1])
    assert start.checkpoint == folder / "checkpoints" / "step_00000008.ckpt"
    assert start.facts["step"] == 8
    # one warning; it is caught twice where the logger did not propagate before
    (record,) = {r.getMessage(): r for r in caplog.records if r.name == "opd_lightning"}.values()
    assert str(path) in record.getMessage() and record.levelname == "WARNING"
    assert re.search(expected, record.getMessage())
    with pytest.raises(ConfigError, match=expected):
        find_start(Resume(str(path)), folder, LIMITS)


def test_without_a_whole_checkpoint_a_run_begins_anew(folder: Path):
    for path in (folder / "checkpoints").glob("step_*.ckpt"):
        cut_off(path)
    assert find_start(AUTO, folder, LIMITS).checkpoint is None
    assert find_start(AUTO, folder.parent / "nothing", LIMITS).checkpoint is None
    assert find_start(Resume("never"), folder, LIMITS).checkpoint is None


def test_auto_goes_on_in_the_newest_folder_of_a_fit(folder: Path):
    root = folder.parent
    assert run_version(AUTO, root / "nothing") is None
    (root / "unborn" / "version_2").mkdir(parents=True)
    assert run_version(AUTO, root / "unborn") == 2
    (root / "version_7").mkdir()
    (root / "version_7" / "predictions.jsonl").touch()  # of another verb
    (root / "version_best").mkdir()
    assert run_version(AUTO, root) == 0
    shutil.copytree(folder, root / "version_3", symlinks=True)
    assert run_version(AUTO, root) == 3
    assert run_version(Resume("never"), root) is None
    for path in (folder, folder / "checkpoints" / "last.ckpt", newest(folder)):
        assert run_version(Resume(str(path)), root) == 0
    with pytest.raises(ConfigError, match=r"no such checkpoint or run folder\. Did you mean vers"):
        run_version(Resume(str(root / "version_O")), root)
    with pytest.raises(ConfigError, match=r"this run's folders are .*Give --trainer.default_root"):
        run_version(Resume(str(folder)), root / "elsewhere")
    with pytest.raises(ConfigError, match=r"neither a run folder nor a checkpoint"):
        run_version(Resume(str(root / "version_7")), root)


def test_going_on_with_more_steps_equals_a_longer_run(world: Path, ended: Run, tmp_path: Path):
    at_once = Run(world, tmp_path / "at once", "--trainer.max_steps=20")
    at_once.finish()
    longer = Run(world, tmp_path / "longer", "--trainer.max_steps=20")
    shutil.copytree(ended.folder, longer.folder, symlinks=True, dirs_exist_ok=True)
    longer.finish()
    assert "at step 12\n" in longer.log.read_text()
    assert_equal(longer, at_once)


def test_auto_takes_up_a_run_that_was_begun_without_it(world: Path, tmp_path: Path):
    run = Run(world, tmp_path, "--trainer.max_steps=8")
    run.start("--resume=never", prepare=partial(die_in_evaluation, 4))
    assert run.wait()[0] == -9 and run.steps_saved() == [4, 6]
    run.finish()
    assert "at step 6\n" in run.log.read_text()


def test_logs_of_others_are_left_alone(tmp_path: Path):
    (tmp_path / "metrics.csv").write_text("mine\n1\n")
    for _ in range(2):
        begin(tmp_path, Start(), {"a": ["1", "1"]})
        (tmp_path / "run.json").unlink()
    assert (tmp_path / "metrics.csv").read_text() == "mine\n1\n"


def test_a_finished_run_says_so_and_is_left_alone(ended: Run):
    before = {p: p.stat().st_mtime_ns for p in ended.run_folder.rglob("*")}
    ended.finish()
    assert "finished after 12 steps. Raise trainer.max_steps" in ended.log.read_text()
    assert {p: p.stat().st_mtime_ns for p in ended.run_folder.rglob("*")} == before


def test_max_steps_within_a_round_loses_no_half_of_it(world: Path, tmp_path: Path):
    """7 steps with two a round: the last checkpoint is not one to go on from."""
    at_once = Run(world, tmp_path / "at once", "--model.mini_batches=2", "--trainer.max_steps=12")
    at_once.finish()
    run = Run(world, tmp_path / "odd", "--model.mini_batches=2")
    run.finish("--trainer.max_steps=7")
    assert run.steps_saved() == [4, 6, 7] or run.steps_saved() == [4, 7]
    run.finish("--trainer.max_steps=7")
    assert "finished after 7 steps" in run.log.read_text()
    last = str(run.run_folder / "checkpoints" / "step_00000007.ckpt")
    other = Run(world, tmp_path / "other", "--model.mini_batches=2", "--trainer.max_steps=12")
    other.start("--resume=never", f"--ckpt_path={last}")
    assert other.wait() == [2]
    assert "between the updates of a round (model.mini_batches=2)" in other.log.read_text()
    run.finish("--trainer.max_steps=12")
    assert_equal(run, at_once)


# ------------------------------------------------------------------------------- other settings


@pytest.fixture
def refused(ended: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run `opd fit` on the run's folder, expect it to be refused, and return the message."""

    def run(*args: str) -> str:
        line = [*ended.args, "--trainer.max_steps=13", *args]
        monkeypatch.setattr("sys.argv", ["opd", *line])
        with pytest.raises(SystemExit) as exit_:
            main(line)
        said = capsys.readouterr().err
        assert exit_.value.code == 2, said
        return said.partition("opd: ")[2]

    return run


@pytest.mark.parametrize(("args", "expected"), [
    (["--model.objective=ReverseKL"],
     "model.objective.class_path: opd_lightning.TopKReverseKL -> opd_lightning.ReverseKL"),
    (["--model.objective.k=9"], "model.objective.init_args.k: 8 -> 9"),
    (["--seed_everything=1"], "seed_everything: 0 -> 1"),
    (["--data.prompts_per_step=2"], "data.prompts_per_step: 4 -> 2"),
    (["--rollout.sampling.top_p=0.9"], "rollout.init_args.sampling.top_p: 1.0 -> 0.9"),
    (["--model.optimizer.lr=0.1"], "model.optimizer.init_args.lr: 0.01 -> 0.1"),
    (["--trainer.precision=bf16-mixed"], "trainer.precision: null -> bf16-mixed"),
])  # fmt: skip
def test_another_run_is_refused_with_the_difference(
    refused: Callable[..., str], args: list[str], expected: str
):
    said = refused(*args)
    assert expected in said
    assert "--resume.allow_change" in said and "--resume never" in said


def test_other_content_behind_the_same_path_is_refused(
    world: Path, ended: Run, refused: Callable[..., str], tmp_path: Path
):
    train, weights = world / "train.jsonl", world / "teacher" / "model.safetensors"
    for path in (train, weights):
        before = path.read_bytes()
        changed = bytearray(before)
        changed[-3] ^= 1
        try:
            path.write_bytes(bytes(changed))
            said = refused()
        finally:
            path.write_bytes(before)
        given = str(train if path == train else world / "teacher")
        assert f"{given} -> {given}, other content" in said
    # the same content elsewhere is the same data
    moved = Path(shutil.copyfile(train, tmp_path / "moved.jsonl"))
    config = yaml.safe_load((ended.run_folder / "config.yaml").read_text())
    there = identity_of(config)
    config["data"]["train"] = str(moved)
    here = identity_of(config)
    assert there["data.train"][1] == here["data.train"][1]
    assert there["data.train"][0] != here["data.train"][0]


def test_what_changes_nothing_may_differ(world: Path, ended: Run):
    config = yaml.safe_load((ended.run_folder / "config.yaml").read_text())
    before = identity_of(config)
    config["trainer"] |= {"max_steps": 99, "devices": 2, "strategy": "ddp", "logger": False,
                          "enable_progress_bar": True, "val_check_interval": 3}  # fmt: skip
    config["model"] |= {"micro_batch_tokens": 64, "metrics_every": 0}
    config["data"] |= {"num_workers": 1, "val": None}
    assert {k: v[1] for k, v in identity_of(config).items()} == {k: v[1] for k, v in before.items()}


def test_allowed_changes_are_made(world: Path, ended: Run, refused: Callable[..., str]):
    other = ["--model.objective=ReverseKL", "--rollout.sampling.top_p=0.9"]
    said = refused(*other, "--resume.allow_change", "model.objective")
    assert "top_p: 1.0 -> 0.9" in said and "model.objective" not in said.partition("Go on")[0]
    said = refused(*other, "--resume.allow_change", "model.objectiv")
    assert "no such setting. Did you mean model.objective" in said
    said = refused("--model.optimizer.lr=0.1", "--resume.allow_change", "model.optimizer")
    assert "would have no effect" in said
    run = Run(world, ended.folder.parent / "changed", "--trainer.max_steps=14")
    shutil.copytree(ended.folder, run.folder, symlinks=True, dirs_exist_ok=True)
    run.finish(*other, "--resume.allow_change", "model.objective", "rollout")
    assert "at step 12\n" in run.log.read_text()
    assert [row["step"] for row in run.metrics() if row["loss"]] == [str(i + 1) for i in range(14)]


def test_ckpt_path_goes_on_in_a_new_folder_and_is_checked_too(
    ended: Run, refused: Callable[..., str], tmp_path: Path
):
    last = f"--ckpt_path={ended.run_folder / 'checkpoints' / 'last.ckpt'}"
    fresh = [f"--trainer.default_root_dir={tmp_path}", "--resume=never", last]
    assert "seed_everything: 0 -> 1" in refused(*fresh, "--seed_everything=1")
    assert not list(tmp_path.glob("*/metrics.csv"))


# --------------------------------------------------------------------------------- spellings


@pytest.mark.parametrize(("given", "meant"), [
    (["--resume", "auto"], ["--resume.mode", "auto"]),
    (["--resume=auto"], ["--resume.mode=auto"]),
    (["--resume.mode=auto"], ["--resume.mode=auto"]),
    (["--resume.allow_change", "a.b", "c", "--x"], ['--resume.allow_change=["a.b", "c"]', "--x"]),
    (["--resume.allow_change=[a.b, c]"], ['--resume.allow_change=["a.b", "c"]']),
    (["--resume.allow_change", "[a.b,c]"], ['--resume.allow_change=["a.b", "c"]']),
    (["--resume.allow_change=a.b"], ['--resume.allow_change=["a.b"]']),
])  # fmt: skip
def test_spellings_of_the_command_line(given: list[str], meant: list[str]):
    assert nested_arguments(["fit", *given]) == ["fit", *meant]


def test_spellings_of_files_and_both_together(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert nested_settings({"resume": "auto", "x": 1}) == {"resume": {"mode": "auto"}, "x": 1}

    def printed(*args: str) -> dict:
        with pytest.raises(SystemExit) as exit_:
            main(["fit", "--config", str(world / "run.yaml"), *args, "--print_config"])
        assert exit_.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)["resume"]

    full = tmp_path / "full.yaml"
    full.write_text(yaml.safe_dump({"resume": {"mode": "never", "allow_change": ["data.train"]}}))
    assert printed() == {"mode": "auto", "allow_change": []}
    both = printed("--resume", "never", "--resume.allow_change", "model.objective", "data")
    assert both == {"mode": "never", "allow_change": ["model.objective", "data"]}
    assert printed("--resume.allow_change", "data") == {"mode": "auto", "allow_change": ["data"]}
    assert printed("--config", str(full)) == {"mode": "never", "allow_change": ["data.train"]}
    assert printed("--config", str(full), "--resume=auto")["allow_change"] == ["data.train"]


def test_a_marker_says_what_the_run_is(ended: Run):
    facts = json.loads(newest(ended.run_folder).with_suffix(".ckpt.json").read_text())
    assert facts["step"] == 12 and facts["finished"] and not facts["mid_round"]
    assert facts["files"].keys() == {"step_00000012.ckpt"}
    assert facts["identity"]["model.objective.init_args.k"] == ["8", "8"]
    assert facts["identity"]["model.teacher"][1].startswith("sha256 ")
