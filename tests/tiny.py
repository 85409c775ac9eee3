"""Tiny real parts that many tests need: a byte-level tokenizer, offline and always the same."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

_TEXT = [
    "What is two and three? The answer is five. <think>two and three make five</think>",
    "What is ten minus four? The answer is six. <think>ten less four leaves six</think>",
]
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(chat_template: bool = True) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 300 tokens: 256 bytes, two special tokens, 42 merges.

    `<|im_start|>` is 0 and `<|im_end|>`, which is EOS and padding too, is 1. It encodes any text,
    decodes it back, and adds no special tokens by itself. `<think>` is plain text, several tokens.

    Args:
        chat_template: False for a tokenizer without one.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    if chat_template:
        tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


_SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
# Caps and scales small enough to matter at the logits of a tiny model.
_ARCHITECTURES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"final_logit_softcapping": 5.0, "sliding_window": 4}),
    "gemma3": (
        "gemma3_text",
        {
            "final_logit_softcapping": 7.0,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt2": ("gpt2", {}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "granite": ("granite", {"logits_scaling": 1.7}),
    "phi": ("phi", {}),  # its head has a bias
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}
_SHARPNESS = 20.0
"""On the weights: transformers initialises so small that all distributions would be uniform."""


def tiny_model(name: str = "llama", seed: int = 0, **config_overrides: object) -> PreTrainedModel:
    """Return a 2-layer causal language model of 300 tokens, peaked random weights, fp32, eval mode.

    Args:
        name: One of llama, qwen2, qwen3, gemma2, gemma3, gpt2, cohere, granite, phi, opt.
        seed: Of the weights; the global random state is left as it was.
        **config_overrides: Entries of the config, such as `tie_word_embeddings=True`.
    """
    model_type, own = _ARCHITECTURES[name]
    config = CONFIG_MAPPING[model_type](**(_SHAPE | own | config_overrides))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(_SHARPNESS)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save_tiny(
    folder: Path, name: str = "llama", seed: int = 0, **config_overrides: object
) -> PreTrainedModel:
    """Write `tiny_model` and `tiny_tokenizer` as a Hugging Face folder, and return the model."""
    model = tiny_model(name, seed, **config_overrides)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model
