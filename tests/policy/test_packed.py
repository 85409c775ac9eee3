"""Rows packed behind one another read as rows padded: values, gradients; who cannot is refused."""

import logging
from pathlib import Path

import pytest
import torch

from opd_lightning.errors import ConfigError
from opd_lightning.policy import CausalPolicy, PolicySpec
from opd_lightning.records import Rollout
from opd_lightning.teachers import LocalTeacher
from tests.policy.test_heads import (
    ARCHITECTURES,
    gradients,
    hand_made_rollout,
    largest_gradient_error,
    loss_by_read,
)
from tests.tiny import save_tiny, tiny_model


def positions_computed(policy: CausalPolicy, rollout: Rollout) -> int:
    """Positions that the decoder was called on."""
    seen = []
    handle = policy.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.shape[:-1].numel())
    )
    policy.read(rollout, lambda distribution: None)
    handle.remove()
    return sum(seen)


# eager attention takes its softmax in fp32 whatever the dtype, so float64 is tested with sdpa; and
# these norms are in fp32, so that the gradient of a sum over tokens is rounded in another order
FP32_NORMS = ("gemma2", "gemma3", "cohere")


@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    [
        ("sdpa", torch.float32, 1e-5),
        ("sdpa", torch.float64, 1e-10),
        ("eager", torch.float32, 1e-5),
    ],
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_padded(name: str, attention: str, dtype: torch.dtype, tolerance: float):
    model, rollout = tiny_model(name).to(dtype), hand_made_rollout()
    model.set_attn_implementation(attention)
    padded, packed = CausalPolicy(model), CausalPolicy(model, packed=True)
    packed.check_packed()
    assert positions_computed(padded, rollout) == rollout.input_ids.numel() == 36
    assert positions_computed(packed, rollout) == int(rollout.attention_mask.sum()) == 22
    loss, logprobs = loss_by_read(padded, rollout)
    expected = gradients(model, loss)
    packed_loss, packed_logprobs = loss_by_read(packed, rollout)
    torch.testing.assert_close(packed_logprobs, logprobs, atol=tolerance, rtol=tolerance)
    tolerance = 1e-6 if dtype == torch.float64 and name in FP32_NORMS else tolerance
    assert largest_gradient_error(gradients(model, packed_loss), expected) < tolerance


def test_the_sliding_window_is_shorter_than_a_row():
    """A premise of the test above."""
    longest = hand_made_rollout().attention_mask.sum(1).max()
    assert tiny_model("gemma3").config.sliding_window < longest


def test_packed_dense_logits():
    model, rollout = tiny_model("llama").double(), hand_made_rollout()
    padded, packed = CausalPolicy(model), CausalPolicy(model, packed=True)
    packed._dense = True
    torch.testing.assert_close(loss_by_read(packed, rollout)[1], loss_by_read(padded, rollout)[1])


def test_a_model_that_counts_positions_by_the_mask_is_refused(caplog: pytest.LogCaptureFixture):
    policy = CausalPolicy(tiny_model("opt"), packed=True).train()
    with pytest.raises(ConfigError) as error:
        policy.check_packed()
    for part in ("packed=True: OPTForCausalLM", "'sdpa'", "differ by", "packed to false"):
        assert part in str(error.value)
    assert policy.model.training
    # chosen by the attention and not by the user: padded instead
    policy = CausalPolicy(tiny_model("opt"))
    policy.packed = True
    with caplog.at_level(logging.WARNING, "opd_lightning"):
        policy.check_packed()
    assert not policy.packed
    assert "Rows are padded instead" in caplog.text


def test_a_model_without_position_ids_is_refused(monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("llama")
    forward = model.model.forward

    def strict(input_ids, attention_mask=None, use_cache=None):  # noqa: ANN001
        return forward(input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(model.model, "forward", strict)
    with pytest.raises(ConfigError, match=r"fail \(.*position_ids.*Set packed to false"):
        CausalPolicy(model, packed=True).check_packed()


@pytest.mark.parametrize(
    ("attention", "chosen", "packed"),
    [
        ("sdpa", None, False),
        ("eager", None, False),
        ("sdpa", True, True),
        ("flash_attention_2", None, True),
        ("kernels-community/flash-attn2", None, True),
        ("flash_attention_2", False, False),
    ],
)
def test_flash_attention_packs_unless_told(attention: str, chosen: bool | None, packed: bool):
    model = tiny_model()
    model.config._attn_implementation_internal = attention  # its kernels need a GPU
    policy = CausalPolicy(model, packed=chosen)
    assert policy.packed is packed
    assert policy.uses_flash_attention is ("flash" in attention)


@pytest.mark.parametrize("packed", [False, True])
def test_no_rows_and_no_completions_read_as_nothing(packed: bool):
    policy = CausalPolicy(tiny_model(), packed=packed)
    nothing = torch.zeros(0, 0, dtype=torch.long)
    no_rows = Rollout(nothing, nothing, nothing.bool())
    no_tokens = hand_made_rollout()
    no_tokens.completion_mask[:] = False
    for rollout in (no_rows, no_tokens):
        loss, logprobs = loss_by_read(policy, rollout)
        assert logprobs.shape == (0,)
        found = gradients(policy.model, loss)
        assert found, "the backward runs, as other ranks may wait for it"
        assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("packed", [None, True])
def test_the_option_reaches_a_teacher(tmp_path: Path, packed: bool | None):
    save_tiny(tmp_path)
    teacher = LocalTeacher(str(tmp_path), packed=packed)
    teacher.load(torch.device("cpu"), 300)
    rollout = hand_made_rollout()
    assert teacher.policy.packed is bool(packed)
    assert positions_computed(teacher.policy, rollout) == (22 if packed else 36)


def test_a_spec_says_so():
    assert PolicySpec("folder").packed is None
    assert PolicySpec("folder", packed=True).packed is True
