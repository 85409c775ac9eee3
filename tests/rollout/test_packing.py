"""Packed linear layers: the same results, the newest weights, and nothing left behind."""

import pytest
import torch
from torch import nn

from opd_lightning.records import PromptBatch
from opd_lightning.rollout import SamplingConfig, TransformersEngine
from opd_lightning.rollout.packing import packed_linears
from tests.rollout.test_engine import MANY_ENDS, PROMPTS, completions, generate, policy_of
from tests.tiny import tiny_model


def is_packed(module: nn.Module) -> bool:
    return "forward" in vars(module)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_results_are_those_of_the_layer(bias: bool, rows: int):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(70, 301, bias=bias)
    hidden = torch.randn(rows, 3, 70, generator=generator)
    expected = layer(hidden)
    with torch.no_grad(), packed_linears(layer):
        assert is_packed(layer)
        torch.testing.assert_close(layer(hidden), expected, atol=1e-5, rtol=1e-5)
        strided = layer(hidden.transpose(0, 1))
        torch.testing.assert_close(strided, expected.transpose(0, 1), atol=1e-5, rtol=1e-5)
    assert not is_packed(layer)
    assert torch.equal(layer(hidden), expected)


def test_whole_models_agree_and_hooks_still_run():
    for name in ("llama", "phi"):
        model = tiny_model(name)
        ids = torch.tensor([PROMPTS[0]])
        calls = []
        handle = model.lm_head.register_forward_hook(lambda *args, calls=calls: calls.append(args))
        with torch.no_grad():
            expected = model(ids).logits
            with packed_linears(model):
                assert sum(map(is_packed, model.modules())) > 8
                found = model(ids).logits
        handle.remove()
        assert len(calls) == 2
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert not any(map(is_packed, model.modules()))


def test_other_layers_are_left_alone():
    class Own(nn.Linear):
        pass

    wrapped = nn.Linear(4, 4)
    wrapped.forward = lambda hidden: hidden + 1
    model = nn.ModuleList(
        [Own(4, 4), nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4).double(), wrapped]
    )
    with torch.no_grad(), packed_linears(model):
        assert [is_packed(module) for module in model] == [False, False, False, True]
        assert torch.equal(wrapped(torch.zeros(1, 4)), torch.ones(1, 4))
    assert is_packed(wrapped), "someone else's replacement stays"


def test_autocast_keeps_its_dtype():
    layer = nn.Linear(8, 8)
    with torch.no_grad(), packed_linears(layer), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(1, 8)).dtype == torch.bfloat16


def test_layers_are_restored_after_a_failure():
    layer = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="stop"), packed_linears(layer):
        raise RuntimeError("stop")
    assert not is_packed(layer)


@pytest.mark.parametrize("pack_weights", [True, False])
def test_a_rollout_packs_the_newest_weights_if_asked(pack_weights: bool):
    """The weights move in place between rollouts, as an optimiser moves them."""
    policy = policy_of("llama", MANY_ENDS)
    head, seen = policy.model.get_output_embeddings(), []
    head.register_forward_hook(lambda module, *args: seen.append(is_packed(module)))
    engine = TransformersEngine(pack_weights=pack_weights)
    batch = PromptBatch.from_token_ids(PROMPTS)
    sampling = SamplingConfig(max_completion_length=16)
    first = completions(engine.generate(policy, batch, sampling, seed=0))
    assert set(seen) == {pack_weights}
    with torch.no_grad():
        head.weight.neg_()
    second = completions(engine.generate(policy, batch, sampling, seed=0))
    assert first != second
    moved = policy_of("llama", MANY_ENDS)
    moved.load_state_dict(policy.state_dict())
    assert second == completions(generate(moved))
    assert not is_packed(head)
