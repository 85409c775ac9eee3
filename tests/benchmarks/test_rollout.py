"""The rollout benchmark's other ways to decode: bounds of continuous batching, and the table."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks import common, rollout, rollout_batching
from opd_lightning import PromptBatch

SIZES = {"rows": 2, "limit": 8, "longest_prompt": 8}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config).eval()


def test_continuous_batching_gives_each_request_its_length_within_the_bounds() -> None:
    bounds = rollout_batching.bounds(SIZES)
    assert bounds["num_blocks"] * bounds["page_size"] >= 2 * (8 + 8)
    prompts = PromptBatch.from_token_ids([[5, 6, 7], [8]])
    with tiny().continuous_batching_context_manager(
        generation_config=GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(**bounds),
    ) as manager:
        rollout_batching._answer(manager, prompts, [3, 8])
    with (
        tiny().continuous_batching_context_manager(
            generation_config=GenerationConfig(do_sample=True, top_k=0, eos_token_id=[*range(50)]),
            continuous_batching_config=ContinuousBatchingConfig(**bounds),
        ) as manager,
        pytest.raises(common.BenchmarkError, match="gave 1 tokens where"),
    ):
        rollout_batching._answer(manager, prompts, [3, 8])


def test_the_table_says_that_continuous_batching_failed() -> None:
    case = {
        "lengths": "even",
        "tokens_per_second": {"engine": 20.0, "generate": 10.0},
        "ratios": {"engine": 2.0, "generate": 1.0},
        "batching_failed": "ended with code -14",
    }
    text = rollout.machinery_table({"cases": [case], "bounds": {"num_blocks": 4}})
    assert "num_blocks 4" in text
    assert "| even | engine | 20.0 | 2.00 |" in text
    assert "| even | continuous batching | ended with code -14 | - |" in text
