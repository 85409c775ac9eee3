"""`compile: true`: the compiled decoder reads the same, is used, and stays out of rollouts."""

from pathlib import Path

import torch

from opd_lightning.policy import CausalPolicy, PolicySpec
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.rollout import SamplingConfig, TransformersEngine
from tests.tiny import save_tiny


def test_compiled_read_equals_the_plain_one(tmp_path: Path):
    save_tiny(tmp_path, "gpt2", num_hidden_layers=1)
    plain = CausalPolicy(PolicySpec(str(tmp_path)).load())
    prompts = PromptBatch.from_token_ids([[5, 6, 7], [9, 10, 11, 12]])
    rollout = Rollout.from_completions(prompts, [[20, 21, 22], [30]], [False, True])
    model = PolicySpec(str(tmp_path), compile=True).load()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    policy = CausalPolicy(model)
    policy.check_head()
    sampling = SamplingConfig(max_completion_length=5)
    drawn = TransformersEngine().generate(policy, prompts, sampling, seed=0)
    assert counters["stats"]["unique_graphs"] == 0, "neither the check nor the rollout compiles"
    expected = TransformersEngine().generate(plain, prompts, sampling, seed=0)
    assert drawn.token_ids.tolist() == expected.token_ids.tolist()

    losses, gradients = [], []
    for each in (plain, policy):
        loss = each.read(rollout, lambda d: d.logprobs(rollout.token_ids)).sum()
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in each.model.parameters()]))
    assert counters["stats"]["unique_graphs"] > 0, "the read runs compiled code"
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-5)
    size = gradients[0].abs().max()
    torch.testing.assert_close(gradients[1] / size, gradients[0] / size, atol=1e-4, rtol=0)
