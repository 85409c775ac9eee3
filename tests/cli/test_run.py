"""Real processes: fit, then everything that follows from its run folder."""

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from opd_lightning.cli import main
from tests.cli.conftest import QUESTIONS, run_opd


def runs_of(world: Path) -> list[str]:
    return ["--trainer.default_root_dir", str(world / "fitted")]


@pytest.fixture(scope="module")
def fitted(world: Path) -> Path:
    """The folder of a run of four steps."""
    done = run_opd("fit", "--config", str(world / "run.yaml"), *runs_of(world))
    assert done.returncode == 0, done.stderr
    assert "reverse KL" in done.stdout and "before" in done.stdout and "student/" in done.stdout
    return world / "fitted" / "version_0"


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def held_out(folder: Path) -> dict[int, float]:
    return {
        int(r["step"]): float(r["val/kl/reverse"]) for r in rows_of(folder) if r["val/kl/reverse"]
    }


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_run_folder_holds_what_the_readme_says(fitted: Path):
    names = {path.name for path in fitted.iterdir()}
    assert {"summary.json", "metrics.csv", "learning_curve.png", "config.yaml"} <= names
    assert {"checkpoints", "student"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    summary = json.loads((fitted / "summary.json").read_text())
    assert summary["reverse_kl_before"] == pytest.approx(held_out(fitted)[0], rel=1e-6)
    assert summary["reverse_kl_after"] == pytest.approx(held_out(fitted)[4], rel=1e-6)
    assert summary["reverse_kl_after"] != summary["reverse_kl_before"]
    assert summary["tokens"] > 0 and summary["tokens_per_second"] > 0 and summary["seconds"] > 0
    assert summary["config"]["model"]["objective"]["init_args"]["k"] == 8
    resolved = yaml.safe_load((fitted / "config.yaml").read_text())
    assert resolved["model"] == summary["config"]["model"]
    steps = [int(row["step"]) for row in rows_of(fitted) if row["loss"]]
    assert steps == [1, 2, 3, 4]


def test_validate_and_test_give_the_runs_own_numbers(world: Path, fitted: Path, tmp_path: Path):
    root = ["--trainer.default_root_dir", str(tmp_path)]
    checkpoint = str(fitted / "checkpoints" / "last.ckpt")
    config = ["--config", str(world / "run.yaml"), *root]
    main(["validate", *config])
    assert run_opd("validate", *config, "--ckpt_path", checkpoint).returncode == 0
    tested = run_opd("test", *config, "--ckpt_path", checkpoint)
    assert tested.returncode == 0 and "test/kl/reverse" in tested.stdout
    before = rows_of(tmp_path / "version_0")[-1]["val/kl/reverse"]
    after = rows_of(tmp_path / "version_1")[-1]["val/kl/reverse"]
    # without test prompts of its own the stage takes the held-out ones
    of_test = rows_of(tmp_path / "version_2")[-1]["test/kl/reverse"]
    assert float(before) == pytest.approx(held_out(fitted)[0], rel=1e-5)
    assert float(after) == pytest.approx(held_out(fitted)[4], rel=1e-5)
    assert float(of_test) == pytest.approx(held_out(fitted)[4], rel=1e-5)


def test_predict_export_load(
    world: Path, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    checkpoint = str(fitted / "checkpoints" / "last.ckpt")
    done = run_opd(
        "predict", "--config", str(world / "run.yaml"), "--ckpt_path", checkpoint,
        "--trainer.default_root_dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "version_0" / "predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["index"] for r in records] == [0, 1, 2, 3]
    assert all(q in r["prompt"] for q, r in zip(QUESTIONS, records, strict=True))
    for record in records:
        n = len(record["token_ids"])
        assert n > 0
        assert n == len(record["student_logprobs"]) == len(record["teacher_logprobs"])
        assert all(x <= 0 for x in record["student_logprobs"] + record["teacher_logprobs"])

    exported = run_opd("export", "--ckpt", checkpoint, "--out", str(tmp_path / "out"))
    assert exported.returncode == 0, exported.stderr
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    at_end = AutoModelForCausalLM.from_pretrained(fitted / "student").state_dict()
    start = AutoModelForCausalLM.from_pretrained(world / "student").state_dict()
    assert weights.keys() == at_end.keys()
    assert all(torch.equal(weights[key], at_end[key]) for key in weights)
    assert not all(torch.equal(weights[key], start[key]) for key in weights)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(weights[key], saved[f"student.model.{key}"]) for key in weights)
    for folder in (tmp_path / "out", fitted / "student"):
        generation = GenerationConfig.from_pretrained(folder)
        assert generation.eos_token_id == [1, 7] and generation.top_k == 11
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(world / "student").chat_template
    with pytest.raises(SystemExit) as exit_:
        main(["export", "--ckpt", checkpoint, "--out", str(tmp_path / "out")])
    assert exit_.value.code == 2 and "holds a model already" in capsys.readouterr().err


def test_second_run_resumes_into_a_new_version_and_leaves_the_first(world: Path, fitted: Path):
    before = hashes(fitted)
    overlay = world / "overlay.yaml"
    overlay.write_text(
        yaml.safe_dump({"trainer": {"max_steps": 6}, "data": {"prompts_per_step": 4}})
    )
    done = run_opd(
        "fit", "--config", str(world / "run.yaml"), "--config", str(overlay),
        "--ckpt_path", str(fitted / "checkpoints" / "last.ckpt"), *runs_of(world),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    second = world / "fitted" / "version_1"
    assert [int(row["step"]) for row in rows_of(second) if row["loss"]] == [5, 6]
    summary = json.loads((second / "summary.json").read_text())
    assert summary["reverse_kl_before"] == pytest.approx(held_out(fitted)[0], rel=1e-6)
    assert hashes(fitted) == before


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Return f(arguments of fit) -> the resolved configuration, printed in this process."""

    def resolve(*args: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as exit_:
            main(["fit", *args, "--print_config"])
        assert exit_.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    return resolve


def test_printed_configuration_can_be_given_back(
    world: Path, fitted: Path, tmp_path: Path, printed: Callable[..., dict[str, Any]]
):
    swap = ["--model.objective", "SequenceReverseKL", "--model.objective.gamma", "0.5"]
    in_process = run_opd("fit", "--config", str(world / "run.yaml"), *swap, "--print_config")
    assert in_process.returncode == 0, in_process.stderr
    (tmp_path / "printed.yaml").write_text(in_process.stdout)
    first = yaml.safe_load(in_process.stdout)
    assert printed("--config", str(tmp_path / "printed.yaml")) == first
    objective = first["model"]["objective"]
    assert objective["class_path"].endswith("SequenceReverseKL")
    assert objective["init_args"]["gamma"] == 0.5 and "k" not in objective["init_args"]
    # the run folder's file is the whole of it, and gives the run again
    saved = yaml.safe_load((fitted / "config.yaml").read_text())
    assert saved == printed("--config", str(world / "run.yaml"), *runs_of(world))
    assert saved == printed("--config", str(fitted / "config.yaml"))


def test_later_files_win_and_the_command_line_wins_over_files(
    world: Path, tmp_path: Path, printed: Callable[..., dict[str, Any]]
):
    overlay = {"trainer": {"max_steps": 6, "log_every_n_steps": 2}, "model": {"mini_batches": 2}}
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(overlay))
    files = ["--config", str(world / "run.yaml"), "--config", str(tmp_path / "b.yaml")]
    config = printed(*files, "--trainer.max_steps", "9", "--model.objective.k", "5")
    assert config["trainer"]["max_steps"] == 9
    assert config["trainer"]["log_every_n_steps"] == 2 and config["model"]["mini_batches"] == 2
    assert config["trainer"]["val_check_interval"] == 2
    assert config["model"]["objective"]["init_args"]["k"] == 5
    assert config["seed_everything"] == config["data"].get("seed", 0) == 0
    files[1], files[3] = files[3], files[1]
    assert printed(*files)["trainer"]["max_steps"] == 4


def test_an_objective_swapped_by_name_is_the_one_that_runs(world: Path, tmp_path: Path):
    config = ["--config", str(world / "run.yaml"), "--trainer.max_steps", "1"]
    root = ["--trainer.default_root_dir", str(tmp_path), "--data.val", "null"]
    losses = []
    for swap in (
        ["--rollout.sampling.top_p", "1"],
        ["--rollout.sampling.top_p", "1", "--model.objective", "ReverseKL"],
        ["--rollout.sampling.top_p", "1", "--model.objective", "opd_lightning.ReverseKL"],
        ["--rollout.sampling.top_p", "1", "--model.objective", "JensenShannon",
         "--model.objective.beta", "0.25"],
    ):  # fmt: skip
        main(["fit", *config, *root, *swap])
        folder = tmp_path / f"version_{len(losses)}"
        losses.append(float(rows_of(folder)[0]["loss"]))
    top_k, reverse, dotted, jensen_shannon = losses
    assert reverse == dotted
    assert len({top_k, reverse, jensen_shannon}) == 3
    objective = json.loads((folder / "summary.json").read_text())["config"]["model"]["objective"]
    assert objective["init_args"] == {"beta": 0.25, "scaled": False}
    terms = '[{"class_path": "ReverseKL"}, "ForwardKL", {"class_path": "SupportMass"}]'
    mixture = ["Mixture", "--model.objective.objectives", terms]
    coefficients = ["--model.objective.coefficients", "[1.0, 1e-9, 1e-9]"]
    main(["fit", *config, *root, *swap[:2], "--model.objective", *mixture, *coefficients])
    line = rows_of(tmp_path / "version_4")[0]
    assert float(line["loss"]) == pytest.approx(reverse, rel=1e-6)
    assert {"loss/ReverseKL", "loss/ForwardKL", "loss/SupportMass"} <= set(line)


def test_help_names_verbs_and_arguments(capsys: pytest.CaptureFixture[str]):
    said = run_opd("--help")
    assert said.returncode == 0
    for verb in ("fit", "validate", "test", "predict", "prune", "export", "demo"):
        assert f"\n  {verb} " in said.stdout
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--help"])
    fit = capsys.readouterr().out
    assert exit_.value.code == 0
    for argument in ("--model.objective", "--rollout", "--data.train", "--trainer.max_steps"):
        assert argument in fit
    for sentence in ("The per-token loss.", "null trains on the dataset's own", "stepped once an"):
        assert sentence in " ".join(fit.split())
    for verb in ("prune", "export", "demo"):
        with pytest.raises(SystemExit) as exit_:
            main([verb, "--help"])
        assert exit_.value.code == 0 and f"usage: opd {verb}" in capsys.readouterr().out


def test_exit_codes(world: Path, capsys: pytest.CaptureFixture[str]):
    config = ["--config", str(world / "run.yaml")]
    wrong = run_opd("fit", *config, "--model.objective", "TopKReversKL")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("opd: objective 'TopKReversKL' is not known. Did you mean")
    assert wrong.stderr.count("\n") == 1 and wrong.stdout == ""
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *config, "--model.objective.k", "1", "--debug"])
    debug = capsys.readouterr().err
    assert exit_.value.code == 2 and "Traceback" in debug
    assert debug.rstrip().splitlines()[-1].startswith("opd: k must be at least 2; got 1")
    infinite = run_opd("fit", *config, "--model.objective", "tests.cli.infinite.Infinite")
    assert infinite.returncode == 1
    assert "the loss is inf" in infinite.stderr and "non_finite_rollout.pt" in infinite.stderr
