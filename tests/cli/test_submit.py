"""What `opd submit` writes and refuses, without a cluster; with one: tests/slurm."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from opd_lightning.cli import main
from opd_lightning.errors import ConfigError
from opd_lightning.tools.submit import Job, combinations, folder_name, script, submit
from tests.cli.conftest import ROOT

TEMPLATE = ROOT / "configs" / "slurm" / "train.sbatch"


def directives(text: str) -> dict[str, str]:
    pairs = (re.match(r"#SBATCH --([\w-]+)=?(.*)", line) for line in text.splitlines())
    return {match[1]: match[2] for match in pairs if match}


def variable(text: str, name: str, **environment: str) -> str:
    """What bash makes of a line of the script."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name}=")]
    asked = subprocess.run(
        ["bash", "-c", f'{line}; printf "%s\\n" "${{{name}[@]}}"'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return asked.stdout.splitlines()


def test_the_block_of_the_script_is_filled_and_the_rest_is_the_template():
    folder = Path("/runs/a b")
    job = Job(nodes=2, gpus=8, time="1:00", partition="big", account="me", options=["--qos=long"])
    text = script(job, folder, [folder])
    assert directives(text) == {
        "job-name": "opd",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "8",
        "time": "1:00",
        "output": "/runs/a b/%j.log",
        "signal": "USR1@120",
        "requeue": "",
        "open-mode": "append",
        "partition": "big",
        "account": "me",
        "qos": "long",
    }
    assert variable(text, "RUN_FOLDERS") == ["/runs/a b"]
    assert variable(text, "OPD")[1:] == ["-m", "opd_lightning.cli"]
    lines, template = text.splitlines(), TEMPLATE.read_text().splitlines()
    assert (
        lines[lines.index("set -euo pipefail") :] == template[template.index("set -euo pipefail") :]
    )
    assert "--kill-on-bad-exit=1" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:]), "ignored there"


def test_without_gpus_there_is_no_line_for_them():
    text = script(Job(gpus=0, tasks=3), Path("/r"), [Path("/r")])
    assert "gpus-per-node" not in directives(text)
    assert directives(text)["ntasks-per-node"] == "3"
    assert "partition" not in directives(text) and "array" not in directives(text)


def test_the_template_itself_is_a_script_that_can_be_submitted():
    text = TEMPLATE.read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    for name in variable(text, "CONFIGS"):
        assert (ROOT / name).is_file()
    assert set(directives(text)) >= set(Job().directives()) - {"partition", "account"}


def test_a_sweep_is_the_product_of_its_axes():
    runs = combinations(["objective=ReverseKL,ForwardKL", "seed=1,2", "model.x=[a,b],c"])
    assert len(runs) == 8
    assert runs[0] == [
        ("model.objective", "ReverseKL"),
        ("seed_everything", "1"),
        ("model.x", "[a,b]"),
    ]
    assert folder_name(runs[0]) == "objective=ReverseKL,seed=1,model.x=_a,b_"
    assert runs[-1] == [
        ("model.objective", "ForwardKL"),
        ("seed_everything", "2"),
        ("model.x", "c"),
    ]
    assert combinations([]) == [[]]


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (["seed"], "NAME=VALUE,VALUE.* got 'seed'"),
        (["seed="], "got 'seed='"),
        (["=1,2"], "got '=1,2'"),
        (["seed=1", "seed_everything=2"], "seed_everything is given twice"),
        (["seed=1,1"], "names a run twice: seed=1"),
    ],
)
def test_a_sweep_that_means_nothing_is_refused(sweep: list[str], words: str):
    with pytest.raises(ConfigError, match=words):
        submit(Job(), [], lambda args: {}, sweep=sweep, dry_run=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nodes": 0}, "--nodes must be at least 1; got 0"),
        ({"gpus": -1}, "--gpus must be at least 0; got -1"),
        ({"tasks": 2}, "--tasks 2 with --gpus 1"),
    ],
)
def test_a_job_that_means_nothing_is_refused(options: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        Job(**options)


def test_dry_run_prints_the_script_of_an_array_and_writes_nothing(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    main([
        "submit", "--dry-run", "--config", str(world / "unread.yaml"), "--gpus", "4",
        "--sweep", "objective=ReverseKL,JensenShannon", "--sweep", "seed=1,2,3",
        "--folder", str(tmp_path / "runs"),
    ])  # fmt: skip
    text = capsys.readouterr().out
    assert directives(text)["array"] == "0-5"
    assert directives(text)["output"] == f"{tmp_path}/runs/%A_%a.log"
    folders = variable(text, "RUN_FOLDERS")
    assert folders[0] == f"{tmp_path}/runs/objective=ReverseKL,seed=1"
    assert folders[5] == f"{tmp_path}/runs/objective=JensenShannon,seed=3"
    assert not (tmp_path / "runs").exists()


def test_each_run_gets_its_whole_configuration(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    """With a stand-in for sbatch that says what SLURM's says."""
    (tmp_path / "sbatch").write_text(
        '#!/bin/sh\n[ "$1" = --parsable ] && [ -f "$2" ] && echo "41;c"\n'
    )
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    main([
        "submit", "--config", str(world / "unread.yaml"), "--model.objective.k", "5",
        "--sweep", "seed=3,4", "--trainer.default_root_dir", str(tmp_path / "root"),
    ])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    (folder,) = (tmp_path / "root").iterdir()
    assert lines == [
        f"job 41 submitted, script {folder}/train.sbatch",
        f"log: {folder}/41_TASK.log",
        "  task 0: seed=3",
        "  task 1: seed=4",
    ]
    for seed in (3, 4):
        config = yaml.safe_load((folder / f"seed={seed}" / "submitted.yaml").read_text())
        assert config["seed_everything"] == seed
        assert config["model"]["objective"]["init_args"]["k"] == 5
        assert config["trainer"]["default_root_dir"] == str(folder / f"seed={seed}")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--sweep", "objective=ReverseKL,TopKReversKL"], ["mean TopKReverseKL?", "TopKReversKL)"]),
        (["--sweep", "model.objective.kk=2,3"], ["no argument 'kk'", "(in the run", "kk=2"]),
        (["--sweep", "model.objective.k=2,1"], ["k must be at least 2; got 1"]),
        (["--sweep", "data.trian=a"], ["Did you mean data.train?"]),
        (["--nodse", "2"], ["'nodse'"]),
        (["--template", "nowhere.sbatch"], ["'nowhere.sbatch' cannot be read"]),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_submitted(
    world: Path,
    refused: Callable[..., str],
    tmp_path: Path,
    args: list,
    parts: list,
):
    message = refused(
        "submit", "--dry-run", "--config", str(world / "unread.yaml"), *args,
        "--folder", str(tmp_path / "runs"), verb=None,
    )  # fmt: skip
    for part in parts:
        assert part in message
    assert not (tmp_path / "runs").exists()


def test_without_sbatch_it_says_where_to_submit(
    world: Path,
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("PATH", str(tmp_path))
    message = refused("submit", "--config", str(world / "unread.yaml"), verb=None)
    assert "sbatch is not on the PATH" in message and "--dry-run" in message


def test_a_template_without_the_block_is_refused(tmp_path: Path):
    (tmp_path / "mine.sbatch").write_text("#!/bin/bash\n#SBATCH --nodes=1\nsrun opd fit\n")
    with pytest.raises(ConfigError, match=r"no line RUN_FOLDERS=.*configs/slurm/train\.sbatch"):
        script(Job(), Path("/r"), [Path("/r")], tmp_path / "mine.sbatch")
