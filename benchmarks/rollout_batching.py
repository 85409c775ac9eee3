"""transformers' continuous batching beside its `generate`, in a process of bounded memory and time.

`generate_batch` is this manager with one length for all requests; here each request has its own, so
that ended rows make room as they do in the engine. Its pages and tokens a step are bounded by what
the requests need, since left alone it sizes its cache by the free memory of the machine.
"""

import math
import resource
import signal
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks import common, rollout
from opd_lightning import PromptBatch, SamplingConfig

PAGE_TOKENS = 32
MOST_BATCH_TOKENS = 1024
LIMIT_BYTES = 8 * 2**30
LIMIT_SECONDS = 120


def against_generate(sizes: dict[str, int], lengths: list[int]) -> dict[str, Any]:
    """Return tokens a second of continuous batching, and its speed over that of `generate`.

    Both are warmed up before; the manager is kept, so that building it is not counted. Ends the
    process after `LIMIT_SECONDS`.

    Args:
        sizes: As in rollout.py, one completion a prompt.
        lengths: Tokens of each completion.

    Raises:
        BenchmarkError: If a completion is missing or has another length.
    """
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    signal.alarm(LIMIT_SECONDS)
    torch.set_num_threads(sizes["threads"])
    prompts = rollout.prompts_of(sizes["rows"], sizes["longest_prompt"])
    sampling = SamplingConfig(max_completion_length=sizes["limit"])
    # two models: continuous batching gives its own another attention
    plain, batched = rollout.build(1.0), rollout.build(1.0)
    plain.generation_config.eos_token_id = None
    with batched.continuous_batching_context_manager(
        generation_config=GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(**bounds(sizes)),
    ) as manager:

        def by_generate() -> dict[str, float]:
            ends = torch.tensor(lengths, device=plain.device)
            return common.measure(lambda: rollout.by_generate(plain, prompts, sampling, ends))

        def by_manager() -> dict[str, float]:
            return common.measure(lambda: _answer(manager, prompts, lengths))

        sides = {"batching": by_manager, "generate": by_generate}
        common.interleave(sides, 1)
        results = common.interleave(sides, sizes["rounds"])
    seconds = {name: [run["seconds"] for run in runs] for name, runs in results.items()}
    return {
        "tokens_per_second": sum(lengths) / sorted(seconds["batching"])[sizes["rounds"] // 2],
        "ratio": common.ratio(seconds["generate"], seconds["batching"]),
    }


def bounds(sizes: dict[str, int]) -> dict[str, int]:
    """Return the settings that bound its memory: room for all rows at their longest."""
    pages = math.ceil((sizes["longest_prompt"] + sizes["limit"]) / PAGE_TOKENS)
    return {
        "page_size": PAGE_TOKENS,
        "num_blocks": sizes["rows"] * (pages + 1),
        "max_batch_tokens": MOST_BATCH_TOKENS,
        "max_requests_per_batch": sizes["rows"],
    }


def _answer(manager: Any, prompts: PromptBatch, lengths: list[int]) -> None:
    expected = {}
    for ids, length in zip(prompts.unpadded(), lengths, strict=True):
        expected[manager.add_request(ids, max_new_tokens=length)] = length
    while expected:
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            raise common.BenchmarkError("continuous batching ended without its results")
        if result is not None and result.is_finished():
            length = expected.pop(result.request_id)
            if len(result.generated_tokens) != length:
                raise common.BenchmarkError(
                    f"continuous batching gave {len(result.generated_tokens)} tokens where "
                    f"{length} were asked for: {result.error}"
                )
