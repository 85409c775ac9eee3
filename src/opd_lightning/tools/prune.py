"""`opd prune`: a smaller student from a model, by removing decoder layers."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from opd_lightning.errors import ConfigError
from opd_lightning.policy import CausalPolicy, PolicySpec, export_policy


def prune(model: str, drop_layers: list[int], out: str) -> Path:
    """Write `model` without the decoder layers `drop_layers` as a Hugging Face folder.

    Middle layers harm least; the first and the last two or so should stay.

    Args:
        model: A Hugging Face folder, or a hub name.
        drop_layers: 0-based layers to remove.
        out: Folder to write, with the tokenizer; must not hold a model already.

    Raises:
        ConfigError: If a layer does not exist or is named twice, none would be left, or `out` holds
            a model.
    """
    folder = Path(out)
    if (folder / "config.json").exists():
        raise ConfigError(f"{out!r} holds a model already. Name another folder, or remove it.")
    spec = PolicySpec(model)
    loaded = spec.load()
    drop_decoder_layers(loaded, drop_layers)
    export_policy(CausalPolicy(loaded), spec.load_tokenizer(), folder)
    return folder


def drop_decoder_layers(model: PreTrainedModel, drop_layers: list[int]) -> None:
    """Remove decoder layers in place: modules, their cache places, and what the config says.

    Raises:
        ConfigError: As `prune`.
    """
    config = model.config.get_text_config()
    layers_name, layers = _decoder_layers(model, config.num_hidden_layers)
    unknown = [i for i in drop_layers if not 0 <= i < len(layers)]
    if unknown or len(set(drop_layers)) != len(drop_layers) or len(drop_layers) >= len(layers):
        raise ConfigError(
            f"cannot drop layers {drop_layers} of a model with {len(layers)} layers (0 to "
            f"{len(layers) - 1}). Name each once, and leave at least one."
        )
    kept = [i for i in range(len(layers)) if i not in drop_layers]
    remaining = nn.ModuleList([layers[i] for i in kept])
    for new_index, layer in enumerate(remaining):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = new_index
    setattr(model.base_model, layers_name, remaining)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]


def _decoder_layers(model: PreTrainedModel, number: int) -> tuple[str, nn.ModuleList]:
    for name, child in model.base_model.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == number:
            return name, child
    raise ConfigError(
        f"{type(model).__name__} has no list of {number} decoder layers to prune. Supported are "
        "decoder-only models of transformers, such as Llama, Qwen, Gemma or GPT-2."
    )
