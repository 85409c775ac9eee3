"""Before the sharding: a model without weights, and whether its files can be read in parts."""

import logging
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file, save_file

from opd_lightning import checks
from opd_lightning.errors import ConfigError
from opd_lightning.policy import PolicySpec
from opd_lightning.sharding import _reader, _stored, _without_weights, decoder_layers
from opd_lightning.strategy import FSDP2Strategy
from tests.tiny import _ARCHITECTURES, save_tiny, tiny_model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", _ARCHITECTURES)
def test_a_model_without_weights_is_the_loaded_one_but_for_them(
    tmp_path: Path, name: str, tied: bool
):
    save_tiny(tmp_path, name, tie_word_embeddings=tied)
    spec = PolicySpec(str(tmp_path), freeze=["embed" if name != "gpt2" else "wte"])
    empty, loaded = _without_weights(spec), spec.load()
    assert all(p.is_meta for p in empty.parameters())
    shapes = [
        {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()}
        for model in (empty, loaded)
    ]
    assert shapes[0] == shapes[1], "tied weights are one parameter in both, or in neither"
    buffers, expected = dict(empty.named_buffers()), dict(loaded.named_buffers())
    assert buffers.keys() == expected.keys()
    for buffer, value in expected.items():
        assert torch.equal(buffers[buffer], value), buffer
    assert empty.training and empty.generation_config == loaded.generation_config
    assert _reader(spec, empty) is not None, "its files can be read in parts"
    assert _stored(empty).keys() == load_file(tmp_path / "model.safetensors").keys()
    assert len(decoder_layers(empty)) == 2


@pytest.mark.parametrize("change", ["renamed", "shape", "doubled"])
def test_files_that_have_to_be_converted_are_not_read_in_parts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
):
    save_tiny(tmp_path, tie_word_embeddings=True)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "renamed":
        weights["model.layers.1.mlp.w3.weight"] = weights.pop(name)
    elif change == "shape":
        weights[name] = weights[name].T.contiguous()
    else:
        name = "lm_head.weight"
        weights[name] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    spec = PolicySpec(str(tmp_path))
    with caplog.at_level(logging.INFO, "opd_lightning"):
        assert _reader(spec, _without_weights(spec)) is None
    assert f"otherwise than the model ({name})" in caplog.text


def test_a_model_without_named_layers_is_refused():
    model = tiny_model()
    model._no_split_modules = None
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM .* Take trainer.strategy ddp"):
        decoder_layers(model)


def test_other_strategies_are_refused():
    with pytest.raises(ConfigError, match=r"ModelParallelStrategy is not .*FSDP2Strategy"):
        checks.check_strategy(ModelParallelStrategy())
    with pytest.raises(ConfigError, match="replicas must be at least 1; got 0"):
        FSDP2Strategy(replicas=0)
