"""Bad input: one message with what, the value seen and what to do; before any model is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opd_lightning.cli import layer_numbers, main
from opd_lightning.errors import ConfigError
from tests.cli.conftest import run_opd
from tests.tiny import save_tiny

Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--model.objective", "TopKReversKL"], ["mean TopKReverseKL?", "Known: EntropyAware"]),
        (
            ["--model.objective", "nowhere.at.Mine"],
            ["'nowhere.at.Mine'", "No module named 'nowhere'", "Your own", "dotted path"],
        ),
        (["--model.objective", "torch.optim.Sgd"], ["'torch.optim.Sgd'", "no attribute 'Sgd'"]),
        (["--model.objective", "torch.nn.Linear"], ["not a subclass of Objective", "Known: Ent"]),
        (
            [
                "--model.objective", "Mixture",
                "--model.objective.objectives", '[{"class_path": "SuportMass"}]',
            ],
            ["objectives 'SuportMass' is not known. Did you mean SupportMass?", "OutcomeReward"],
        ),
        (["--model.objective.kk", "3"], ["no argument 'kk'", "Did you mean k?", "support"]),
        (["--rollout.sampling.top_pp", "1"], ["SamplingConfig", "'top_pp'", "Did you mean top_p?"]),
        (["--model.objective.k", "1"], ["k must be at least 2; got 1"]),
        (["--model.objective.k", "many"], ["model.objective.k must be of type int; got 'many'"]),
        (["--model.reduction", "token-men"], ["'token-men'", "mean token-mean?", "seq-mean"]),
        (
            ["--model.reduction.horizon", "5"],
            ["is 'token-mean'", "'horizon'", "--model.reduction Reduction"],
        ),
        (["--model.optimizer", "AdamWW"], ["'AdamWW'", "Did you mean AdamW?"]),
        (["--model.optimizer.lrr", "1"], ["AdamW has no argument 'lrr'", "mean lr?", "betas"]),
        (["--model.lr_scheduler", "PolyLR"], ["'PolyLR'", "Did you mean PolynomialLR?"]),
        (
            ["--model.lr_scheduler", "PolynomialLR", "--model.lr_scheduler.total_iter", "3"],
            ["PolynomialLR has no argument 'total_iter'", "Did you mean total_iters?"],
        ),
        (["--model.weights", "SpecialTokenMask"], ["takes a list", "[SpecialTokenMask]"]),
        (["--model.weights", "[SpecialTokenMsk]"], ["'SpecialTokenMsk'", "mean SpecialTokenMask?"]),
        (["--model.teacher.dtype", "bfloat16"], ["no argument 'dtype'", "teacher LocalTeacher"]),
        (["--model.teacher", "LocalTeacher"], ["LocalTeacher needs path", "--model.teacher.path"]),
        (["--model.student.dtype", "bfloat16"], ["needs path", "--model.student.path"]),
        (
            ["--model.student.path", "x", "--model.student.dtype", "bfloat17"],
            ["model.student.dtype 'bfloat17'", "Did you mean bfloat16?", "float64"],
        ),
        (["--rollout.engine", "VLLMEngine"], ["rollout.engine 'VLLMEngine'", "TransformersEngine"]),
        (["--rollout.samplin.top_p", "1"], ["RolloutCallback has no", "Did you mean sampling?"]),
        (["--data.trian", "x"], ["'data.trian'", "Did you mean data.train?"]),
        (["--data.overlong", "dorp"], ["data.overlong 'dorp'", "Did you mean drop?", "truncate"]),
        (["--data.prompts_per_step", "2.5"], ["data.prompts_per_step", "type int", "'2.5'"]),
        (["--data.train", "a.jsonl", "b.jsonl"], ["'b.jsonl' belongs to no argument", "[a,b]"]),
        (["--trainer.max_stepz", "3"], ["'trainer.max_stepz'", "trainer.max_steps"]),
        (["--trainer.precision", "bf17"], ["'bf17'", "Did you mean bf16?", "32-true"]),
        (["--trainer.accelerator", "gpuu"], ["accelerator='gpuu'", "Available", "cpu"]),
        (["--trainer.callbacks", "ModelCheckpont"], ["'ModelCheckpont'", "mean ModelCheckpoint?"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
        (["--data.train", "nowhere.jsonl"], ["nowhere.jsonl", "not found"]),
        (["--model.mini_batches", "3"], ["mini_batches=3", "4 completions"]),
        (["--rollout", "null"], ["no completions", "RolloutCallback"]),
        (["--rollout.sampling.max_completion_length", "99999"], ["99999", "context", "Lower"]),
        (["--rollout.sampling.top_p", "0"], ["top_p", "(0, 1]", "0.0"]),
        (["--trainer.gradient_clip_val", "1"], ["model.max_grad_norm"]),
        (["--trainer.accumulate_grad_batches", "2"], ["model.micro_batch_tokens"]),
        (["--ckpt_path", "nowhere.ckpt"], ["'nowhere.ckpt'", "does not exist"]),
        (["--ckpt_path", "last"], ["'last'", "does not exist", "version_<n>/checkpoints"]),
    ],
    ids=lambda value: " ".join(value[:2]) if value[0].startswith("--") else "",
)  # fmt: skip
def test_refused(refused: Refused, args: list[str], parts: list[str]):
    message = refused(*args)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model:\n  student: [a\n", ["mine.yaml:3", "not valid YAML"]),
        ("just text\n", ["mine.yaml", "'just text'"]),
        ("modle: {student: a}\n", ["'modle.student'", "Did you mean model.student?"]),
        ("trainer: {max_step: 3}\n", ["'trainer.max_step'", "Did you mean trainer.max_steps?"]),
        ("rollout: {samplng: {top_p: 1}}\n", ["'samplng'", "Did you mean sampling?"]),
        ("rollout: {engine: {class_path: VLLM}}\n", ["rollout.engine 'VLLM'"]),
        (
            "model: {optimizer: {class_path: AdamW, init_args: {lrate: 3}}}\n",
            ["AdamW has no argument 'lrate'", "lr, betas"],
        ),
    ],
    ids=["broken", "text", "section", "key", "nested key", "class", "argument of a class"],
)
def test_a_wrong_file(refused: Refused, tmp_path: Path, text: str, parts: list[str]):
    (tmp_path / "mine.yaml").write_text(text)
    message = refused("--config", str(tmp_path / "mine.yaml"))
    for part in parts:
        assert part in message


def test_a_missing_file_names_its_neighbour(refused: Refused, tmp_path: Path):
    (tmp_path / "quick.yaml").write_text("")
    message = refused("--config", str(tmp_path / "quik.yaml"))
    assert "quik.yaml' does not exist. Did you mean quick.yaml?" in message


def test_nothing_given(refused: Refused):
    message = refused("fit", verb=None)
    assert "fit needs model.student, model.teacher, model.objective." in message
    assert "--config run.yaml" in message


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize("word", ["last", "best", "nowhere.ckpt"])
def test_nothing_is_measured_without_the_checkpoint_asked_for(
    refused: Refused, verb: str, word: str
):
    assert f"checkpoint '{word}' does not exist" in refused("--ckpt_path", word, verb=verb)


@pytest.mark.parametrize("command", ["fit", "validate", "export"])
def test_what_is_no_checkpoint(refused: Refused, tmp_path: Path, command: str):
    whole = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(500)}}, whole)
    size = whole.stat().st_size

    def said(path: Path) -> str:
        if command == "export":
            out = str(tmp_path / "out")
            return refused("export", "--ckpt", str(path), "--out", out, verb=None)
        return refused("--ckpt_path", str(path), verb=command)

    if command != "export":
        assert "is a folder. Name one of it: last.ckpt" in said(tmp_path)
    whole.write_bytes(whole.read_bytes()[: size // 2])
    assert f"({size // 2} bytes) is a file of another kind, or was cut off" in said(whole)
    (tmp_path / "notes.txt").write_text("no checkpoint")
    assert "(13 bytes)" in said(tmp_path / "notes.txt")
    assert "Did you mean last.ckpt?" in said(tmp_path / "lats.ckpt")
    assert not (tmp_path / "out").exists()


def test_unknown_verb_and_tools(refused: Refused, tmp_path: Path, world: Path):
    assert "Did you mean fit?" in refused("fitt", verb=None)
    out = str(tmp_path / "out")
    assert "does not exist" in refused("export", "--ckpt", "no.ckpt", "--out", out, verb=None)
    assert "required: --ckpt. See opd export --help" in refused("export", "--out", out, verb=None)
    assert "required: --model" in refused("prune", "--out", out, verb=None)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    other = str(tmp_path / "other.ckpt")
    assert "was not written by opd fit" in refused(
        "export", "--ckpt", other, "--out", out, verb=None
    )
    student = str(world / "student")
    prune = ["prune", "--model", student, "--out", out, "--drop-layers"]
    assert "[7]" in refused(*prune, "7", verb=None)
    assert "'a'" in refused(*prune, "a", verb=None)
    prune[prune.index(out)] = student
    assert "holds a model already" in refused(*prune, "0", verb=None)


def test_models(refused: Refused, world: Path, tmp_path: Path):
    message = refused("--model.teacher", str(world / "teachr"))
    assert "teachr" in message and "Did you mean teacher?" in message
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no config.json" in refused("--model.student", str(empty))
    shutil.copy(world / "student" / "config.json", empty)
    assert "no weights" in refused("--model.student", str(empty))


def test_tokenizer_mismatch_is_found_before_weights_are_read(
    refused: Refused, world: Path, tmp_path: Path
):
    other = tmp_path / "other"
    shutil.copytree(world / "teacher", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (other / "model.safetensors").write_bytes(b"not read")
    message = refused("--model.teacher", str(other))
    assert "different vocabularies" in message and str(other) in message
    assert repr(first) in message and repr(second) in message


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ("", ["empty"]),
        ('{"question": "a"}\n', ["prompt", "question"]),
        ('{"prompt": "a"}\n{"prompt": " "}\n', ["2", "empty"]),
        ('{"prompt": "a"}\n{"prompt": \n', ["2", "JSON"]),
        (json.dumps({"prompt": "long " * 3000}) + "\n", ["context"]),
    ],
    ids=["empty", "no column", "empty prompt", "broken line", "longer than the context"],
)
def test_data(refused: Refused, tmp_path: Path, lines: str, parts: list[str]):
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    message = refused("--data.train", str(path), "--data.max_prompt_tokens", "100000")
    assert "bad.jsonl" in message
    for part in parts:
        assert part in message


def test_warnings_do_not_stop_a_run(world: Path, tmp_path: Path):
    done = run_opd(
        "fit", "--config", str(world / "run.yaml"), "--trainer.max_steps", "1",
        "--trainer.default_root_dir", str(tmp_path), "--model.objective", "HeadTailReverseKL",
        "--model.objective.k", "9999",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "k=9999 is above the vocabulary" in done.stderr
    assert "top_p=0.9" in done.stderr and "is biased" in done.stderr


def test_a_head_with_fewer_rows_than_the_teachers_is_cut(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_tiny(tmp_path / "padded", seed=2, vocab_size=320)
    main(
        ["fit", "--config", str(world / "run.yaml"), "--trainer.max_steps", "1",
         "--trainer.default_root_dir", str(tmp_path), "--model.teacher", str(tmp_path / "padded")]
    )  # fmt: skip
    assert capsys.readouterr().err.count("the 300 shared rows are compared") == 1


def test_layer_numbers():
    assert layer_numbers("13,14") == [13, 14]
    assert layer_numbers("10-12,20") == [10, 11, 12, 20]
    with pytest.raises(ConfigError, match=r"13,14 or 10-15,20; got '1;2'"):
        layer_numbers("1;2")


def test_a_checkpoint_of_another_student(refused: Refused, world: Path, tmp_path: Path):
    config = ["--config", str(world / "run.yaml"), "--trainer.default_root_dir", str(tmp_path)]
    main(["fit", *config, "--trainer.max_steps", "2"])
    checkpoint = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    other = ["--ckpt_path", str(checkpoint), "--model.student", str(world / "teacher")]
    message = refused("validate", *config, *other, verb=None)
    assert "is not one of model.student" in message and "layers.2" in message
    assert len(message) < 500
