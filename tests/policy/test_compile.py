"""`compile: true`: the compiled decoder reads the same, is used, and stays out of rollouts."""

from pathlib import Path

import pytest
import torch

from opd_lightning.policy import CausalPolicy, PolicySpec
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.rollout import SamplingConfig, TransformersEngine
from tests.tiny import save_tiny

PROMPTS = PromptBatch.from_token_ids([[5, 6, 7], [9, 10, 11, 12]])


@pytest.fixture
def models(tmp_path: Path):
    """The same weights plain and compiled, and dynamo's counters from 0."""
    save_tiny(tmp_path, "llama", num_hidden_layers=1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (
        CausalPolicy(PolicySpec(str(tmp_path), compile=flag).load()) for flag in (False, True)
    )
    yield plain, compiled, torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def read(policy: CausalPolicy, rollout: Rollout) -> torch.Tensor:
    return policy.read(rollout, lambda d: d.logprobs(rollout.token_ids))


def test_one_read_through_inductor(models: tuple):
    """No gradient: each kernel costs seconds of g++. One thread: no pool of processes."""
    plain, compiled, _ = models
    rollout = Rollout.from_completions(PROMPTS, [[20, 21, 22], [30]], [False, True])
    with torch.no_grad(), torch._inductor.config.patch(compile_threads=1):
        torch.testing.assert_close(
            read(compiled, rollout), read(plain, rollout), atol=1e-4, rtol=1e-5
        )


def test_gradients_and_other_shapes_of_the_captured_graph(models: tuple):
    """The capture, its backward pass and its dynamic shapes, without the g++ of inductor."""
    plain, compiled, stats = models
    compiled.model.base_model.compile(dynamic=True, backend="aot_eager")
    graphs = []
    for completions in ([[20, 21, 22], [30]], [[20], [30, 31, 32, 33, 34]]):
        rollout = Rollout.from_completions(PROMPTS, completions, [False, True])
        gradients = []
        for policy in (plain, compiled):
            policy.zero_grad()
            read(policy, rollout).sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
        size = gradients[0].abs().max()
        torch.testing.assert_close(gradients[1] / size, gradients[0] / size, atol=1e-5, rtol=0)
        graphs.append(stats["unique_graphs"])
    assert graphs[0] > 0, "the read runs compiled code"
    assert graphs[1] == graphs[0], "another length is no new graph"


def test_head_check_and_rollouts_do_not_compile(models: tuple):
    plain, compiled, stats = models
    compiled.check_head()
    sampling = SamplingConfig(max_completion_length=5)
    drawn, expected = (
        TransformersEngine().generate(policy, PROMPTS, sampling, seed=0).token_ids.tolist()
        for policy in (compiled, plain)
    )
    assert drawn == expected
    assert stats["unique_graphs"] == 0
