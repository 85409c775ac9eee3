"""Bad input: one message with what, the value seen and what to do; before any model is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opd_lightning.cli import layer_numbers
from opd_lightning.errors import ConfigError
from tests.cli.conftest import run_opd
from tests.tiny import save_tiny

Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--model.objective", "TopKReversKL"], ["mean TopKReverseKL?", "Known: ForwardKL"]),
        (["--model.objective.kk", "3"], ["no argument 'kk'", "Did you mean k?", "support"]),
        (["--rollout.sampling.top_pp", "1"], ["SamplingConfig", "'top_pp'", "Did you mean top_p?"]),
        (["--model.objective.k", "1"], ["k must be at least 2; got 1"]),
        (["--model.objective.k", "many"], ["model.objective", "many"]),
        (["--model.reduction", "token-men"], ["'token-men'", "mean token-mean?", "seq-mean"]),
        (["--model.optimizer", "AdamWW"], ["'AdamWW'", "Did you mean AdamW?"]),
        (["--data.trian", "x"], ["'data.trian'", "Did you mean data.train?"]),
        (["--trainer.max_stepz", "3"], ["'trainer.max_stepz'", "trainer.max_steps"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--data.train", "nowhere.jsonl"], ["nowhere.jsonl", "not found"]),
        (["--model.mini_batches", "3"], ["mini_batches=3", "4 completions"]),
        (["--rollout", "null"], ["no completions", "RolloutCallback"]),
        (["--rollout.sampling.max_completion_length", "99999"], ["99999", "context", "Lower"]),
        (["--rollout.sampling.top_p", "0"], ["top_p", "(0, 1]", "0.0"]),
        (["--trainer.gradient_clip_val", "1"], ["model.max_grad_norm"]),
        (["--ckpt_path", "nowhere.ckpt"], ["'nowhere.ckpt'", "does not exist"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)  # fmt: skip
def test_refused(refused: Refused, args: list[str], parts: list[str]):
    message = refused(*args)
    for part in parts:
        assert part in message


def test_unknown_verb_and_tools(refused: Refused, tmp_path: Path, world: Path):
    assert "Did you mean fit?" in refused("fitt", verb=None)
    out = str(tmp_path / "out")
    assert "is not a file" in refused("export", "--ckpt", "no.ckpt", "--out", out, verb=None)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    other = str(tmp_path / "other.ckpt")
    assert "was not written by opd fit" in refused(
        "export", "--ckpt", other, "--out", out, verb=None
    )
    student = str(world / "student")
    prune = ["prune", "--model", student, "--out", out, "--drop-layers"]
    assert "[7]" in refused(*prune, "7", verb=None)
    assert "'a'" in refused(*prune, "a", verb=None)


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


def test_a_head_with_fewer_rows_than_the_teachers_is_cut(world: Path, tmp_path: Path):
    save_tiny(tmp_path / "padded", seed=2, vocab_size=320)
    done = run_opd(
        "fit", "--config", str(world / "run.yaml"), "--trainer.max_steps", "1",
        "--trainer.default_root_dir", str(tmp_path), "--model.teacher", str(tmp_path / "padded"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the 300 shared rows are compared") == 1


def test_layer_numbers():
    assert layer_numbers("13,14") == [13, 14]
    assert layer_numbers("10-12,20") == [10, 11, 12, 20]
    with pytest.raises(ConfigError, match=r"13,14 or 10-15,20; got '1;2'"):
        layer_numbers("1;2")
