"""PolicySpec: what is refused, in which words; what is read."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch

from opd_lightning.errors import ConfigError
from opd_lightning.policy import PolicySpec, as_spec, looks_local
from opd_lightning.teachers import LocalTeacher
from tests.tiny import save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student-small"
    save_tiny(folder)
    return folder


def test_missing_folder_names_the_nearest(folder: Path):
    wrong = str(folder.parent / "student-smal")
    with pytest.raises(ConfigError) as error:
        PolicySpec(wrong).check()
    assert wrong in str(error.value)
    assert "does not exist. Did you mean student-small?" in str(error.value)
    assert "Give a Hugging Face folder" in str(error.value)


@pytest.mark.parametrize("read", ["check", "load_config", "load_tokenizer", "load", "build"])
def test_every_way_in_checks_the_folder(read: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"has no config\.json\. Give a folder written by"):
        getattr(PolicySpec(str(tmp_path)), read)()


def test_folder_without_weights(folder: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"has no weights .*interrupted\? Write the folder again"):
        PolicySpec(str(tmp_path)).load()


def test_a_model_is_built_from_its_config_alone(folder: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    spec = PolicySpec(str(tmp_path), "bfloat16", freeze=["embed"], gradient_checkpointing=True)
    with torch.device("meta"):
        model = spec.build()
    whole = PolicySpec(str(folder)).load()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.dtype == torch.bfloat16 and model.is_gradient_checkpointing
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (model, whole)]
    assert shapes[0] == shapes[1]
    assert not model.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize("kind", [PolicySpec, LocalTeacher])
def test_pickled_weights_are_read_only_where_that_is_asked_for(
    folder: Path, tmp_path: Path, kind: type
):
    model = PolicySpec(str(folder)).load()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no safetensors, but pytorch_model\.bin: a pickle"):
        kind(str(tmp_path)).check()
    with pytest.raises(ConfigError, match=r"set allow_pickle: true"):
        PolicySpec(str(tmp_path)).load()
    kind(str(tmp_path), allow_pickle=True).check()
    read = PolicySpec(str(tmp_path), allow_pickle=True).load().state_dict()
    assert all(torch.equal(read[name], value) for name, value in model.state_dict().items())


def test_half_a_weight_file(folder: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ConfigError, match=f"cannot load the model '{tmp_path}': .+"):
        PolicySpec(str(tmp_path)).load()


@pytest.mark.parametrize("config", ["{", json.dumps({"model_type": "no-such-model"})])
def test_config_that_transformers_cannot_read(folder: Path, tmp_path: Path, config: str):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=f"cannot load the model '{tmp_path}': .+"):
        PolicySpec(str(tmp_path)).load_config()


def test_folder_without_a_tokenizer(folder: Path, tmp_path: Path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    PolicySpec(str(tmp_path)).load()
    with pytest.raises(ConfigError, match=f"cannot load the model '{tmp_path}': .+"):
        PolicySpec(str(tmp_path)).load_tokenizer()


def test_hub_names_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for hub in ("gpt2", "Qwen/Qwen2.5-0.5B"):
        assert not looks_local(hub)
        PolicySpec(hub).check()  # no network: nothing can be said yet
    for local in ("./gpt2", "../m", "/models/m", "~/m", "runs/m", "a/b/c"):
        assert looks_local(local)
        with pytest.raises(ConfigError, match="does not exist"):
            PolicySpec(local).check()


def test_unknown_hub_name_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    with pytest.raises(
        ConfigError, match=r"cannot load the model 'studnt': .*Did you mean student\?"
    ):
        PolicySpec("studnt").load_config()
    with pytest.raises(ConfigError, match=r"cannot load the model 'no-owner/no-model': .+"):
        PolicySpec("no-owner/no-model").load()


def test_load_gives_the_saved_weights_in_training_mode(folder: Path, tmp_path: Path):
    saved = save_tiny(tmp_path, "qwen2", seed=3)
    spec = PolicySpec(str(tmp_path), dtype="bfloat16", gradient_checkpointing=True)
    model = spec.load()
    assert model.training
    assert model.is_gradient_checkpointing
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        torch.testing.assert_close(parameter, saved.get_parameter(name).bfloat16())
    assert PolicySpec(str(tmp_path), dtype="float64").load().dtype == torch.float64
    assert spec.load_config().get_text_config().vocab_size == 300


def test_pad_is_the_eos_where_the_tokenizer_names_none(folder: Path, tmp_path: Path):
    PolicySpec(str(folder)).check()
    save_tiny(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer.pad_token_id is None
    assert PolicySpec(str(tmp_path)).load_tokenizer().pad_token_id == 1


def test_as_spec(tmp_path: Path):
    assert as_spec("owner/name") == PolicySpec("owner/name")
    assert as_spec(tmp_path) == PolicySpec(str(tmp_path))
    spec = PolicySpec("x", dtype="bfloat16")
    assert as_spec(spec) is spec
