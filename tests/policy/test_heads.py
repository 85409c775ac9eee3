"""CausalPolicy.read gives what `model(...).logits` gives: values, gradients, every kind of head."""

import logging

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from opd_lightning.policy import CausalPolicy
from opd_lightning.records import Rollout, pad_right
from tests.tiny import tiny_model

ARCHITECTURES = [
    "llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "cohere", "granite", "phi",
]  # fmt: skip


def hand_made_rollout() -> Rollout:
    """Rows of lengths 9, 4, 7, 2: two spans, a one-token completion, three spans, none."""
    rows = [
        [5, 80, 17, 33, 250, 41, 7, 12, 299],
        [90, 2, 61, 1],
        [3, 44, 18, 201, 9, 9, 150],
        [77, 6],
    ]
    columns = [[2, 3, 4, 7, 8], [3], [1, 3, 4, 6], []]
    ids, mask = pad_right(rows)
    completion = torch.zeros_like(ids, dtype=torch.bool)
    for row, chosen in enumerate(columns):
        completion[row, chosen] = True
    return Rollout(ids, mask, completion, ["t"] * 4, torch.zeros(4, dtype=torch.bool))


def logits_by_hand(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """[N, V] logits that predict each completion token, collected token by token."""
    logits = model(rollout.input_ids, attention_mask=rollout.attention_mask).logits
    picked = [
        logits[row, column - 1]
        for row in range(rollout.num_rows)
        for column in range(rollout.input_ids.shape[1])
        if rollout.completion_mask[row, column]
    ]
    return torch.stack(picked)


def loss_by_hand(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """A loss that touches the sampled token and the whole vocabulary; and the log-probs [N]."""
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    sampled = torch.stack([row[i] for row, i in zip(logprobs, ids.tolist(), strict=True)])
    factors = torch.linspace(-1.0, 2.0, len(ids), dtype=logits.dtype)
    return (factors * sampled).sum() + (factors.flip(0) * entropy).sum(), sampled


def loss_by_read(
    policy: CausalPolicy, rollout: Rollout, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The same loss from a TokenDistribution."""

    def reader(distribution):  # noqa: ANN001
        sampled, entropy = distribution.logprobs(rollout.token_ids), distribution.entropy()
        factors = torch.linspace(-1.0, 2.0, len(sampled), dtype=sampled.dtype)
        return (factors * sampled).sum() + (factors.flip(0) * entropy).sum(), sampled

    return policy.read(rollout, reader, temperature)


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of all parameters, and none left behind."""
    model.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def largest_gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error of an entry, relative to the largest entry of all gradients."""
    assert found.keys() == expected.keys()
    size = max(float(g.abs().max()) for g in expected.values())
    errors = [float((found[n].double() - expected[n].double()).abs().max()) for n in found]
    return max(errors) / size


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float64_and_float32_equal_the_models_own_logits(name: str, tied: bool):
    model = tiny_model(name, tie_word_embeddings=tied)
    rollout = hand_made_rollout()
    policy = CausalPolicy(model)
    for dtype, tolerance in [(torch.float32, 2e-5), (torch.float64, 1e-10)]:
        model.to(dtype)
        assert policy.check_head() < tolerance
        expected, expected_logprobs = loss_by_hand(
            logits_by_hand(model, rollout), rollout.token_ids
        )
        expected_gradients = gradients(model, expected)
        loss, logprobs = loss_by_read(policy, rollout)
        assert not policy._dense
        assert logprobs.dtype == dtype
        torch.testing.assert_close(logprobs, expected_logprobs, atol=tolerance, rtol=tolerance)
        error = largest_gradient_error(gradients(model, loss), expected_gradients)
        assert error < tolerance, f"{name} {dtype}: gradient off by {error}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_is_no_worse_than_the_plain_code(name: str):
    model, rollout = tiny_model(name).bfloat16(), hand_made_rollout()
    truth_model = tiny_model(name).bfloat16().double()
    truth_loss, truth = loss_by_hand(logits_by_hand(truth_model, rollout), rollout.token_ids)
    truth_gradients = gradients(truth_model, truth_loss)
    # half-precision logits, as a trainer would take them
    plain_loss, plain = loss_by_hand(logits_by_hand(model, rollout).float(), rollout.token_ids)
    plain_gradients = gradients(model, plain_loss)
    policy = CausalPolicy(model)
    policy.check_head()
    loss, logprobs = loss_by_read(policy, rollout)
    assert not policy._dense, "bf16 rounding alone must not cause the fallback"
    assert logprobs.dtype == torch.float32
    ours, theirs = (float((x.double() - truth).detach().abs().mean()) for x in (logprobs, plain))
    assert ours <= 1.2 * theirs + 1e-3, f"{name}: mean error {ours}, plain {theirs}"
    ours = largest_gradient_error(gradients(model, loss), truth_gradients)
    theirs = largest_gradient_error(plain_gradients, truth_gradients)
    assert ours <= 1.5 * theirs + 1e-2, f"{name}: gradient error {ours}, plain {theirs}"


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "cohere", "granite"])
def test_softcap_and_scale_matter_in_these_tests(name: str):
    """The premise of the tests above: without its setting the head gives other numbers."""
    setting = {"cohere": "logit_scale", "granite": "logits_scaling"}.get(
        name, "final_logit_softcapping"
    )
    model = tiny_model(name)
    plain = tiny_model(name, **{setting: 1.0 if setting.startswith("logit") else None})
    rollout = hand_made_rollout()
    difference = logits_by_hand(model, rollout) - logits_by_hand(plain, rollout)
    assert difference.abs().max() > 0.5


def test_phi_has_a_bias_on_its_head():
    assert tiny_model("phi").get_output_embeddings().bias.abs().max() > 0.1


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float):
    model, rollout = tiny_model("gemma2").double(), hand_made_rollout()
    logits = logits_by_hand(model, rollout) / temperature
    expected, _ = loss_by_hand(logits, rollout.token_ids)
    expected_gradients = gradients(model, expected)
    loss, _ = loss_by_read(CausalPolicy(model), rollout, temperature)
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-10)
    assert largest_gradient_error(gradients(model, loss), expected_gradients) < 1e-10


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_padding_on_the_right_changes_nothing(name: str):
    model, rollout = tiny_model(name), hand_made_rollout()
    policy = CausalPolicy(model)
    _, together = loss_by_read(policy, rollout)
    alone = []
    for row in range(rollout.num_rows):
        part = rollout.select_rows(torch.tensor([row]))
        assert part.attention_mask.all(), "the premise: a row alone has no padding"
        alone.append(loss_by_read(policy, part)[1])
    torch.testing.assert_close(together, torch.cat(alone), atol=5e-5, rtol=1e-5)


def test_vocab_size_cuts_the_head_and_renormalises():
    rollout = hand_made_rollout()
    rollout.input_ids[0, 8] = 4  # 299 would be cut off
    for name in ("llama", "phi"):
        model = tiny_model(name).double()
        expected, _ = loss_by_hand(logits_by_hand(model, rollout)[:, :260], rollout.token_ids)
        expected_gradients = gradients(model, expected)
        policy = CausalPolicy(model, vocab_size=260)
        assert policy.read(rollout, lambda distribution: distribution.vocab_size) == 260
        assert policy.check_head() < 1e-9
        loss, _ = loss_by_read(policy, rollout)
        torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-10)
        assert largest_gradient_error(gradients(model, loss), expected_gradients) < 1e-10


class ScaledLlama(LlamaForCausalLM):
    """A step after the head that no entry of the config names."""

    def forward(self, *args, **kwargs):  # noqa: ANN002, ANN003
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5 + 0.1 * output.logits.roll(1, -1)
        return output


@pytest.mark.parametrize("vocab_size", [300, 280])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_unnamed_step_falls_back_to_dense_logits(
    dtype: torch.dtype, vocab_size: int, caplog: pytest.LogCaptureFixture
):
    model = ScaledLlama(tiny_model("llama").config)
    model.load_state_dict(tiny_model("llama").state_dict())
    model.to(dtype)
    rollout = hand_made_rollout()
    rollout.input_ids[0, 8] = 4
    policy = CausalPolicy(model, vocab_size=vocab_size)
    with caplog.at_level(logging.WARNING, "opd_lightning"):
        difference = policy.check_head()
    assert difference > 0.2
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "ScaledLlama" in record.getMessage()
    assert f"{difference:.1e}" in record.getMessage()
    assert "Dense logits are used" in record.getMessage()
    logits = logits_by_hand(model, rollout)[:, :vocab_size]
    logits = logits if dtype == torch.float64 else logits.float()
    expected, expected_logprobs = loss_by_hand(logits / 2, rollout.token_ids)
    expected_gradients = gradients(model, expected)
    loss, logprobs = loss_by_read(policy, rollout, 2.0)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-4}[dtype]
    torch.testing.assert_close(logprobs, expected_logprobs, atol=tolerance, rtol=tolerance)
    error = largest_gradient_error(gradients(model, loss), expected_gradients)
    assert error < max(tolerance, 1e-2 * (dtype == torch.bfloat16))


def test_a_head_that_agrees_gives_no_warning_and_keeps_the_mode(caplog: pytest.LogCaptureFixture):
    for training in (True, False):
        policy = CausalPolicy(tiny_model("gemma2")).train(training)
        policy.check_head()
        assert policy.model.training is training
    assert not caplog.records


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str):
    model, rollout = tiny_model(name).double().train(), hand_made_rollout()
    policy = CausalPolicy(model)
    loss, _ = loss_by_read(policy, rollout)
    plain = gradients(model, loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    layers = model.transformer.h if name == "gpt2" else model.model.layers
    handle = layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpointed_loss, _ = loss_by_read(policy, rollout)
    checkpointed = gradients(model, checkpointed_loss)
    handle.remove()
    assert len(calls) == 2, "the premise: activations are computed again"
    torch.testing.assert_close(checkpointed_loss, loss)
    assert largest_gradient_error(checkpointed, plain) < 1e-10


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_dropout_is_off_in_training_mode(name: str):
    rollout = hand_made_rollout()
    if name == "gpt2":
        rates = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    else:  # numbers on the layers, not nn.Dropout modules; and whole layers dropped
        rates = {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.3}
    model = tiny_model(name, **rates).train()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noisy = [logits_by_hand(model, rollout) for _ in range(2)]
        assert not torch.equal(*noisy), "the premise: this model has dropout"
        policy = CausalPolicy(model).train()
        first, second = (loss_by_read(policy, rollout)[1] for _ in range(2))
        evaluated = loss_by_read(policy.eval(), rollout)[1]
    assert torch.equal(first, second)
    assert torch.equal(first, evaluated)


@pytest.mark.parametrize("dense", [False, True])
def test_no_completion_tokens_give_a_zero_gradient(dense: bool):
    """An empty micro-batch, as a rank runs it that has fewer than the others."""
    model, rollout = tiny_model("gemma2"), hand_made_rollout()
    rollout.completion_mask[:] = False
    policy = CausalPolicy(model)
    policy._dense = dense
    loss, logprobs = loss_by_read(policy, rollout)
    assert logprobs.shape == (0,)
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_bf16_autocast_reads_fp32_weights(name: str):
    model, rollout = tiny_model(name), hand_made_rollout()
    policy = CausalPolicy(model)
    _, exact = loss_by_read(policy, rollout)
    with torch.autocast("cpu", torch.bfloat16):
        loss, logprobs = loss_by_read(policy, rollout)
    assert logprobs.dtype == torch.float32
    found = gradients(model, loss)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())
    assert not torch.equal(logprobs, exact), "the premise: something ran in bf16"
    # random weights sharpened 20 times lose more than trained ones
    assert (logprobs - exact).abs().mean() < 0.3
