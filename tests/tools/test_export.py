"""Checkpoints that are none, and the weights and the config that come out of one that is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_lightning.errors import ConfigError
from opd_lightning.tools.export import check_checkpoint, export, load_checkpoint
from tests.tiny import save_tiny, tiny_tokenizer


def write_checkpoint(folder: Path, name: str = "llama", **config: object) -> tuple[Path, Any]:
    """Write `folder`/student and a checkpoint of another model of its shape; return both."""
    save_tiny(folder / "student", name, seed=1, **config)
    trained = save_tiny(folder / "trained", name, seed=2, **config)
    path = folder / "last.ckpt"
    weights = {f"student.model.{key}": value for key, value in trained.state_dict().items()}
    told = {
        "student_path": str(folder / "student"),
        "student_config": trained.config.to_json_string(use_diff=False),
    }
    torch.save({"state_dict": weights, "opd_lightning": told}, path)
    return path, trained


@pytest.mark.parametrize(
    ("name", "config"),
    [("llama", {"tie_word_embeddings": True}), ("gemma3", {}), ("gpt2", {"num_hidden_layers": 3})],
)
def test_the_folder_is_the_checkpoints_student(name: str, config: dict, tmp_path: Path):
    path, trained = write_checkpoint(tmp_path, name, **config)
    out = export(str(path), str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.tensor([[5, 17, 200, 41]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained(ids).logits)
    ours, theirs = (
        json.loads((f / "config.json").read_text()) for f in (out, tmp_path / "trained")
    )
    assert ours == theirs


def test_the_dtype_of_the_weights_is_kept(tmp_path: Path):
    path, _ = write_checkpoint(tmp_path)
    saved = torch.load(path, weights_only=True)
    saved["state_dict"] = {k: v.bfloat16() for k, v in saved["state_dict"].items()}
    torch.save(saved, path)
    out = export(str(path), str(tmp_path / "out"))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_tokenizer_may_come_from_elsewhere(tmp_path: Path):
    path, _ = write_checkpoint(tmp_path)
    save_tiny(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'mine' }}"
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "student").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"model folder '.*student' does not exist"):
        export(str(path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    out = export(str(path), str(tmp_path / "out"), model=str(tmp_path / "other"))
    assert (out / "chat_template.jinja").read_text() == "{{ 'mine' }}"


def test_what_holds_a_model_is_left_alone(tmp_path: Path):
    path, _ = write_checkpoint(tmp_path)
    before = (tmp_path / "student" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"student' holds a model already\. Name another folder"):
        export(str(path), str(tmp_path / "student"))
    assert (tmp_path / "student" / "model.safetensors").read_bytes() == before


def test_a_checkpoint_of_something_else_shows_its_first_keys(tmp_path: Path):
    torch.save({f"key{i}": i for i in range(9)}, tmp_path / "other.ckpt")
    with pytest.raises(
        ConfigError, match=r"not written by opd fit \(it holds key0, key1, key2, key3, key4, \.\.\."
    ):
        load_checkpoint(str(tmp_path / "other.ckpt"))


def test_a_folder_passes_unless_it_holds_checkpoints(tmp_path: Path):
    sharded = tmp_path / "sharded.ckpt"
    sharded.mkdir()
    (sharded / "meta.pt").write_bytes(b"")
    check_checkpoint(str(sharded))
    with pytest.raises(ConfigError, match=r"is a folder\. Name one of it: sharded\.ckpt"):
        check_checkpoint(str(tmp_path))
