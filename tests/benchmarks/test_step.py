"""The step benchmark's forced lengths, and its table."""

from statistics import median

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import common, step, step_shared
from opd_lightning import CausalPolicy, PromptBatch, SamplingConfig, TransformersEngine

Forced = tuple[LlamaForCausalLM, list[int]]
ROWS, LONGEST, VOCAB_SIZE = 8, 16, 200


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        pad_token_id=step_shared.PAD,
        bos_token_id=step_shared.BOS,
        eos_token_id=step_shared.EOS,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def forced() -> Forced:
    lengths = step_shared.completion_lengths("uneven", ROWS, LONGEST)
    model = tiny()
    step_shared.ForcedLengths(lengths, VOCAB_SIZE).attach(model)
    return model, lengths


def test_uneven_lengths_have_the_stated_median_and_maximum() -> None:
    for rows, longest in ((8, 64), (16, 128), (64, 512)):
        lengths = step_shared.completion_lengths("uneven", rows, longest)
        assert max(lengths) == longest
        assert median(lengths) == pytest.approx(longest / 4, rel=0.1)
        assert lengths != sorted(lengths)
    assert step_shared.completion_lengths("equal", 3, 5) == [5, 5, 5]


def test_our_engine_makes_completions_of_these_lengths(forced: Forced) -> None:
    model, lengths = forced
    prompts = PromptBatch.from_token_ids(step_shared.prompts(ROWS, VOCAB_SIZE, rounds=1))
    sampling = SamplingConfig(max_completion_length=LONGEST)
    rollout = TransformersEngine().generate(CausalPolicy(model), prompts, sampling, seed=0)
    assert rollout.completion_lengths.tolist() == lengths
    assert not rollout.truncated.any()


def test_generate_makes_completions_of_the_same_lengths(forced: Forced) -> None:
    model, lengths = forced
    prompts = step_shared.prompts(ROWS, VOCAB_SIZE, rounds=1)
    width = max(map(len, prompts))
    padded = torch.tensor([[step_shared.PAD] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.arange(width) >= width - torch.tensor([len(ids) for ids in prompts])[:, None]
    out = model.generate(
        padded, attention_mask=mask.long(), max_new_tokens=LONGEST, do_sample=True, top_k=0
    )
    ends = [row.tolist().index(step_shared.EOS) + 1 for row in out[:, width:]]
    assert ends == lengths


def test_forward_passes_without_a_cache_are_left_alone(forced: Forced) -> None:
    model, _ = forced
    ids = torch.tensor(step_shared.prompts(ROWS, VOCAB_SIZE, rounds=1)[:1])
    plain = tiny()
    with torch.no_grad():
        model.generate(ids, max_new_tokens=2, do_sample=True)
        assert torch.equal(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)


def check(difference: float) -> dict[str, float]:
    found = {}
    for name in ("loss", "grad_norm"):
        found |= {f"{name}_ours": 1.0, f"{name}_trl": 1.0}
        found[f"{name}_relative_difference"] = difference if name == "loss" else 0.0
    return found


def test_losses_that_differ_stop_the_benchmark() -> None:
    step._check_equal(check(0.9e-5), "equal")
    for difference in (1.1e-5, float("nan")):
        with pytest.raises(common.BenchmarkError, match="loss on the same rollout"):
            step._check_equal(check(difference), "equal")


def steps(seconds: list[float], highest: int) -> list[dict]:
    parts = {"rollout": 0.5, "other": 0.1}
    return [
        {"seconds": s, "parts": parts, "lengths": [1, 4, 16], "highest_bytes": highest}
        for s in seconds
    ]


def test_the_summary_compares_pairs_of_steps_and_peaks_above_the_libraries() -> None:
    found = {step.TRL: steps([10.0, 40.0, 30.0], 500), "ReverseKL": steps([1.0, 20.0, 10.0], 250)}
    cases = step._summary(found, {step.TRL: 100, "ReverseKL": 50})
    assert cases["ReverseKL"]["time_ratio"] == 3.0
    assert cases["ReverseKL"]["memory_ratio"] == 2.0
    assert cases["ReverseKL"]["parts"] == {
        "rollout": 0.5, "teacher": 0.0, "student and loss": 0.0, "optimiser": 0.0, "other": 0.1
    }  # fmt: skip


def test_the_table_shows_ratio_target_and_check() -> None:
    found = {step.TRL: steps([4.0], 500), "ReverseKL": steps([2.0], 250)}
    text = step.table(
        {
            "sizes": step.SMALL,
            "targets": step.TARGETS,
            "parameters": {"student": 1, "teacher": 1},
            "check": {"uneven": check(1e-6)},
            "cases": {"uneven": step._summary(found, {step.TRL: 100, "ReverseKL": 50})},
        }
    )
    assert "| ReverseKL | 2.00 | 2.00× (target 1.8×) | 0.500 |" in text
    assert "1 to 16 tokens, median 4" in text
    assert "relative difference 1e-06" in text
