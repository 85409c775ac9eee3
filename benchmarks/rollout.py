"""Tokens a second of `TransformersEngine` beside transformers' own `generate`, interleaved.

    python benchmarks/rollout.py [--small] [--threads 2] [--machinery]    # on a GPU if there is one

One model, the same prompts, temperature, top-p and completion lengths on both sides. Even lengths:
no end token, all rows run to the limit. Uneven lengths: every n-th id is an end token, so that the
random model ends a completion at each token with probability 1/n; the median is about a quarter of
the limit. The engine's lengths are then forced on `generate` by a stopping criterion, which costs
it next to nothing. Before anything is timed, both must give the same greedy tokens.

`--machinery` times what else could decode: the engine without packed weights, `generate` with a
static cache, and continuous batching (rollout_batching.py).
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks import common
from opd_lightning import PromptBatch, SamplingConfig, TransformersEngine
from opd_lightning.policy import CausalPolicy
from opd_lightning.records import Rollout

VOCAB_SIZE = 32_000
SIZES = {
    False: {"rows": 32, "limit": 128, "longest_prompt": 128, "rounds": 5},
    True: {"rows": 16, "limit": 40, "longest_prompt": 40, "rounds": 3},
}
# On the output head: with it the random model is about as sure of its next token as a trained one
# (about 3 nats), so that the nucleus is not most of the vocabulary.
SHARPNESS = 9.0


@dataclass
class Case:
    """One row of the table."""

    lengths: str
    num_generations: int
    top_p: float = 1.0


CASES = [
    Case("even", 1),
    Case("even", 4),
    Case("even", 1, 0.9),
    Case("uneven", 1),
    Case("uneven", 4),
]
MACHINERY_CASES = [Case("even", 1), Case("uneven", 1)]


class EndAt(StoppingCriteria):
    """Ends row i of `generate` after `lengths[i]` tokens."""

    # generate pads rows that have ended only where a criterion has this attribute
    eos_token_id = None

    def __init__(self, prompt_width: int, lengths: Tensor) -> None:
        self._ends = prompt_width + lengths

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return [rows] bool, which rows have ended."""
        return input_ids.shape[1] >= self._ends


def build(sharpness: float) -> LlamaForCausalLM:
    """Return a random Llama of 58 M parameters, 42 M without the embedding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).eval().to(common.device())
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model


def prompts_of(number: int, longest: int) -> PromptBatch:
    """Return prompts of an eighth of `longest` to `longest` tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(longest // 8, longest, number).long()
    lengths = lengths[torch.randperm(number, generator=generator)].tolist()
    rows = [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]
    return PromptBatch.from_token_ids(rows).to(common.device())


def by_generate(
    model: LlamaForCausalLM,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    lengths: Tensor,
    **settings: Any,
) -> Tensor:
    """Run transformers' `generate`, ending each row at its length; return the tokens [rows, L]."""
    rows, width = prompts.unpadded(), prompts.input_ids.shape[1]
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=model.device)
    greedy = sampling.top_k == 1
    drawing = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p}
    return model.generate(
        ids,
        attention_mask=mask,
        do_sample=not greedy,
        **drawing,
        **({} if greedy else {"top_k": 0}),
        max_new_tokens=sampling.max_completion_length,
        num_return_sequences=sampling.num_generations,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([EndAt(width, lengths)]),
        **settings,
    )[:, width:]


def check(policy: CausalPolicy, prompts: PromptBatch) -> None:
    """Both sides give the same greedy tokens.

    Raises:
        BenchmarkError: If not.
    """
    policy.model.generation_config.eos_token_id = None
    sampling = SamplingConfig(top_k=1, max_completion_length=8)
    ours = TransformersEngine().generate(policy, prompts, sampling, seed=0)
    lengths = torch.full((prompts.num_prompts,), 8, device=policy.device)
    theirs = by_generate(policy.model, prompts, sampling, lengths)
    if ours.token_ids.tolist() != theirs.flatten().tolist():
        raise common.BenchmarkError("the engine and generate differ in greedy tokens")


def measure(case: Case, sizes: dict[str, int], machinery: bool = False) -> dict[str, Any]:
    """Time one case on both sides; return settings, lengths, tokens a second and the ratios.

    Args:
        case: The row of the table.
        sizes: Rows, limit, longest prompt and rounds.
        machinery: Time the other ways to decode as well.
    """
    model = build(1.0 if case.top_p == 1 else SHARPNESS)
    policy, limit = CausalPolicy(model), sizes["limit"]
    prompts = prompts_of(sizes["rows"] // case.num_generations, sizes["longest_prompt"])
    check(policy, prompts)
    # the n for which half of the completions are longer than a quarter of the limit
    every = round(1 / (1 - 0.5 ** (4 / limit)))
    ends = list(range(0, VOCAB_SIZE, every)) if case.lengths == "uneven" else None
    model.generation_config.eos_token_id = ends
    sampling = SamplingConfig(
        top_p=case.top_p, max_completion_length=limit, num_generations=case.num_generations
    )
    engine, seed, lengths = TransformersEngine(), 0, None
    unpacked = TransformersEngine(pack_weights=False)

    def ours(engine: TransformersEngine = engine) -> Rollout:
        return engine.generate(policy, prompts, sampling, seed)

    # the warm-up, until the lengths are spread as the case says
    for seed in range(8):  # noqa: B007
        lengths = ours().completion_lengths
        if ends is None or 0.2 <= float(lengths.median()) / limit <= 0.3:
            break
    model.generation_config.eos_token_id = None  # `generate` ends where it is told

    def theirs(**settings: Any) -> Tensor:
        return by_generate(model, prompts, sampling, lengths, **settings)

    def timed(work: Callable[[], Any], eos: list[int] | None) -> dict[str, float]:
        model.generation_config.eos_token_id = eos
        return common.measure(work)

    sides = {"engine": lambda: timed(ours, ends), "generate": lambda: timed(theirs, None)}
    if machinery:
        static = partial(theirs, cache_implementation="static")
        static()  # its warm-up
        sides["engine, not packed"] = lambda: timed(partial(ours, unpacked), ends)
        sides["generate, static cache"] = lambda: timed(static, None)
    results = common.interleave(sides, sizes["rounds"])
    seconds = {name: [r["seconds"] for r in runs] for name, runs in results.items()}
    tokens = int(lengths.sum())
    return {
        **vars(case),
        "tokens": tokens,
        "median_length": float(median(lengths.tolist())),
        "longest": int(lengths.max()),
        "tokens_per_second": {name: tokens / median(runs) for name, runs in seconds.items()},
        "ratio": common.ratio(seconds["generate"], seconds["engine"]),
        "ratios": {name: common.ratio(seconds["generate"], seconds[name]) for name in seconds},
        "completion_lengths": lengths.tolist(),
    }


def run(small: bool, threads: int = 2) -> dict[str, Any]:
    """Time all cases; return settings and results."""
    torch.set_num_threads(threads)
    sizes = SIZES[small]
    return common.settings(
        {"small": small, "sizes": sizes, "cases": [measure(case, sizes) for case in CASES]}
    )


def run_machinery(small: bool, threads: int = 2) -> dict[str, Any]:
    """Time other ways to decode, over `generate`; return settings and results."""
    from benchmarks import rollout_batching

    torch.set_num_threads(threads)
    sizes = SIZES[small] | {"threads": threads}
    cases = [measure(case, sizes, machinery=True) for case in MACHINERY_CASES]
    for case in cases:
        try:
            batching = common.run_case(
                rollout_batching.against_generate,
                exact_memory=False,
                sizes=sizes,
                lengths=case["completion_lengths"],
            )
        except common.BenchmarkError as error:
            case["batching_failed"] = str(error).splitlines()[-1]
        else:
            case["ratios"]["continuous batching"] = batching["ratio"]
            case["tokens_per_second"]["continuous batching"] = batching["tokens_per_second"]
    bounds = rollout_batching.bounds(sizes)
    return common.settings({"small": small, "sizes": sizes, "cases": cases, "bounds": bounds})


def machinery_table(result: dict[str, Any]) -> str:
    """Return tokens a second of each way to decode, and its speed over that of `generate`."""
    rows = [
        [case["lengths"], name, speed, case["ratios"][name]]
        for case in result["cases"]
        for name, speed in case["tokens_per_second"].items()
    ]
    for case in result["cases"]:
        if "batching_failed" in case:
            rows.append([case["lengths"], "continuous batching", case["batching_failed"], "-"])
    settings = ", ".join(f"{name} {value}" for name, value in result["bounds"].items())
    table = common.markdown(["lengths", "by", "tokens/s", "×"], rows)
    return f"Continuous batching with {settings}.\n\n{table}"


def table(result: dict[str, Any]) -> str:
    """Return the results as a Markdown table; speeds are medians, ratios medians of pairs."""
    header = [
        "lengths",
        "siblings",
        "top-p",
        "median / longest",
        "engine tokens/s",
        "generate",
        "×",
    ]
    rows = [
        [
            case["lengths"],
            case["num_generations"],
            case["top_p"],
            f"{case['median_length']:.0f} / {case['longest']}",
            case["tokens_per_second"]["engine"],
            case["tokens_per_second"]["generate"],
            case["ratio"],
        ]
        for case in result["cases"]
    ]
    sizes = result["sizes"]
    about = (
        f"{sizes['rows']} rows, prompts of {sizes['longest_prompt'] // 8} to "
        f"{sizes['longest_prompt']} tokens, at most {sizes['limit']} new ones; × is the engine's "
        f"speed over that of `generate`, median of {sizes['rounds']} interleaved pairs."
    )
    return f"{about}\n\n{common.markdown(header, rows)}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="half the rows and tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--machinery", action="store_true", help="other ways to decode instead")
    given = parser.parse_args()
    if given.machinery:
        print(machinery_table(run_machinery(given.small, given.threads)))
        return
    print(table(run(given.small, given.threads)))


if __name__ == "__main__":
    main()
