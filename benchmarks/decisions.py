"""What docs/objectives.md advises, measured: which K, how noisy one sample is, which reduction.

Run `make models` first; then `python benchmarks/decisions.py` (about a minute on two cores). The
tables are printed as Markdown.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from opd_lightning import (
    Objective,
    PromptBatch,
    ReverseKL,
    Rollout,
    SamplingConfig,
    SequenceReverseKL,
    TokenDistribution,
    TopKReverseKL,
    TransformersEngine,
)
from opd_lightning.policy import CausalPolicy, PolicySpec
from opd_lightning.tools.audit.world import World
from opd_lightning.weighting import Reduction, ReductionName, UpdateSize

PROMPTS = Path(__file__).parents[1] / "examples" / "prompts" / "everyday.jsonl"


def logits_of_completions(models: Path, num_prompts: int) -> tuple[Rollout, Tensor, Tensor]:
    """Return the demo student's completions and both models' logits [N, V] at their tokens."""
    policies = {}
    for name in ("student", "teacher"):
        spec = PolicySpec(str(models / name))
        policies[name] = CausalPolicy(spec.load(), spec.load_tokenizer())
    tokenizer = policies["student"].tokenizer
    lines = PROMPTS.read_text().splitlines()[:num_prompts]
    chats = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]
    encoded = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in chats
    ]
    prompts = PromptBatch.from_token_ids(encoded)
    sampling = SamplingConfig(top_p=0.9, max_completion_length=24)
    with torch.no_grad():
        rollout = TransformersEngine().generate(policies["student"], prompts, sampling, seed=0)
        whole = slice(0, rollout.num_tokens)
        logits = [policies[name].read(rollout, lambda d: d.dense_rows(whole)) for name in policies]
    return rollout, *logits


def gradient(objective: Objective, rollout: Rollout, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the gradient [N, V] of the summed token losses on the student's logits."""
    leaf = student.clone().requires_grad_()
    output = objective(
        TokenDistribution.from_logits(leaf),
        TokenDistribution.from_logits(teacher),
        rollout,
        torch.ones(len(leaf)),
    )
    return torch.autograd.grad(output.loss, leaf)[0]


def which_k(rollout: Rollout, student: Tensor, teacher: Tensor) -> None:
    """Print how close K tokens come to the whole vocabulary."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    full = gradient(ReverseKL(), rollout, student, teacher)
    print(
        "| K | teacher's mass on S | student's mass on S | cosine to the gradient of the full "
        "reverse KL: tail dropped | one bucket | size of the gradient: dropped | bucket |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for k in (2, 4, 8, 16, 32, 64, 128, 512):
        ids = teacher.topk(k).indices
        row = [q.gather(1, ids).sum(1).mean(), p.gather(1, ids).sum(1).mean()]
        found = [
            gradient(TopKReverseKL(k, tail=t), rollout, student, teacher)
            for t in ("drop", "bucket")
        ]
        row += [
            torch.nn.functional.cosine_similarity(g.flatten(), full.flatten(), dim=0) for g in found
        ]
        row += [g.norm() / full.norm() for g in found]
        print(f"| {k} | " + " | ".join(f"{float(x):.3f}" for x in row) + " |")


def one_sample(student: Tensor, teacher: Tensor) -> None:
    """Print the noise of one sampled token at a given prefix, in closed form."""
    log_p, log_q = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    p, advantage = log_p.exp(), log_q - log_p
    kl = -(p * advantage).sum(1, keepdim=True)
    mean = (p * (-advantage - kl)).square().sum(1)
    square_of_score = 1 - 2 * p + p.square().sum(1, keepdim=True)  # |onehot(y) - pi|^2
    for name, baseline in (("no baseline", torch.zeros_like(kl)), ("baseline kl", kl)):
        second = (p * (advantage + baseline).square() * square_of_score).sum(1)
        noise = float((second - mean).sum() / mean.sum())
        print(f"sampled token, {name}: variance of one sample = {noise:.1f} x squared gradient")
    print(f"negative advantages: {float((p * (advantage < 0)).sum(1).mean()):.3f} of the samples")


def which_reduction() -> None:
    """Print how far each reduction's expected direction is from the divergence's gradient.

    Completions of up to 4 tokens that end early (token 0 ends them), one completion an update,
    enumerated.
    """
    names = ReductionName.__args__
    print(f"| objective, against | {' | '.join(names)} |")
    print("| --- | " + " | ".join(["---"] * len(names)) + " |")
    for objective, against in (
        (SequenceReverseKL(1.0), "the sequence's reverse KL"),
        (ReverseKL(), "the sum of the prefixes' reverse KL"),
    ):
        angles = []
        for name in names:
            cosines = [
                _cosine(objective, Reduction(name, horizon), seed)
                for seed in range(5)
                for horizon in [4 if name.endswith("norm") else None]
            ]
            angles.append(sum(cosines) / len(cosines))
        print(
            f"| {type(objective).__name__}, {against} | "
            + " | ".join(f"{x:.3f}" for x in angles)
            + " |"
        )


def _cosine(objective: Objective, reduction: Reduction, seed: int) -> float:
    world = World.random(4, 4, seed)
    sums = {"reduced": torch.zeros_like(world.student), "exact": torch.zeros_like(world.student)}
    for ids in _ending_sequences(world.sequences):
        states = torch.tensor([4, *ids[:-1].tolist()])
        probability = world.student.log_softmax(-1)[states, ids].sum().exp()
        rollout = Rollout.from_flat(ids, torch.zeros_like(ids))
        size = UpdateSize(num_tokens=len(ids), num_rows=1, longest=len(ids))
        for name, weights in (
            ("reduced", reduction.scale(rollout, size)),
            ("exact", torch.ones(len(ids), dtype=torch.float64)),
        ):
            leaf = world.student[states].requires_grad_()
            teacher = TokenDistribution.from_logits(world.teacher[states])
            output = objective(TokenDistribution.from_logits(leaf), teacher, rollout, weights)
            (on_tokens,) = torch.autograd.grad(output.loss, leaf)
            sums[name].index_add_(0, states, probability * on_tokens)
    flat = [value.flatten() for value in sums.values()]
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0))


def _ending_sequences(sequences: Tensor) -> list[Tensor]:
    """Cut each sequence after its first 0, and keep each result once."""
    cut = {}
    for row in sequences.tolist():
        ids = row[: row.index(0) + 1] if 0 in row else row
        cut[tuple(ids)] = torch.tensor(ids)
    return list(cut.values())


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--prompts", type=int, default=16)
    given = parser.parse_args()
    torch.manual_seed(0)
    rollout, student, teacher = logits_of_completions(given.models, given.prompts)
    print(f"{rollout.num_tokens} tokens of {given.prompts} completions, V = {student.shape[1]}\n")
    which_k(rollout, student, teacher)
    print()
    one_sample(student, teacher)
    print()
    which_reduction()


if __name__ == "__main__":
    main()
