"""LocalTeacher: frozen, any dtype, its own prompt, a head padded to more rows."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opd_lightning.errors import ConfigError
from opd_lightning.policy import CausalPolicy
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.teachers import LocalTeacher, shared_vocabulary
from tests.tiny import save_tiny, tiny_model

CPU = torch.device("cpu")


def rollout_with(teacher_prompts: list[list[int]] | None = None) -> Rollout:
    prompts = PromptBatch.from_token_ids([[5, 6, 7], [40, 41, 42, 43, 44]])
    if teacher_prompts is not None:
        other = PromptBatch.from_token_ids(teacher_prompts)
        prompts.teacher_input_ids = other.input_ids
        prompts.teacher_attention_mask = other.attention_mask
    return Rollout.from_completions(prompts, [[20, 21, 22, 1], [30, 31]], [False, True])


def logprobs_by_hand(model: torch.nn.Module, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """Score each (prompt, completion) alone, without padding."""
    found = []
    with torch.no_grad():
        for prompt, completion in rows:
            logprobs = model(torch.tensor([prompt + completion])).logits[0].float().log_softmax(-1)
            found += [logprobs[len(prompt) + i - 1, t] for i, t in enumerate(completion)]
    return torch.stack(found)


def load(folder: Path, vocab_size: int = 300, **kwargs: object) -> LocalTeacher:
    teacher = LocalTeacher(str(folder), **kwargs)
    teacher.load(CPU, vocab_size)
    return teacher


def test_frozen_and_no_gradient_reaches_it(tmp_path: Path):
    save_tiny(tmp_path, "qwen3", seed=1)
    teacher, student, rollout = load(tmp_path), CausalPolicy(tiny_model("qwen3")), rollout_with()
    assert not any(p.requires_grad for p in teacher.policy.parameters())

    def with_teacher(teacher_side):  # noqa: ANN001
        assert not teacher_side.logprobs(rollout.token_ids).requires_grad
        assert not teacher_side.entropy().requires_grad
        return student.read(rollout, lambda student: student.reverse_kl(teacher_side).sum())

    loss = teacher.read(rollout, with_teacher)
    loss.backward()
    assert all(p.grad is None for p in teacher.policy.parameters())
    assert student.model.get_output_embeddings().weight.grad.abs().max() > 0


def test_logprobs_are_those_of_its_model(tmp_path: Path):
    model = save_tiny(tmp_path, "gemma3", seed=1)
    rollout = rollout_with()
    found = load(tmp_path).read(rollout, lambda d: d.logprobs(rollout.token_ids))
    rows = [([5, 6, 7], [20, 21, 22, 1]), ([40, 41, 42, 43, 44], [30, 31])]
    torch.testing.assert_close(found, logprobs_by_hand(model, rows), atol=5e-5, rtol=1e-5)
    halved = load(tmp_path).read(rollout, lambda d: d.logsumexp(), temperature=2.0)
    assert not torch.allclose(halved, load(tmp_path).read(rollout, lambda d: d.logsumexp()))


def test_bfloat16_teacher(tmp_path: Path):
    model = save_tiny(tmp_path, "llama", seed=1)
    teacher, rollout = load(tmp_path, dtype="bfloat16"), rollout_with()
    assert teacher.policy.model.dtype == torch.bfloat16
    found = teacher.read(rollout, lambda d: d.logprobs(rollout.token_ids))
    assert found.dtype == torch.float32
    rows = [([5, 6, 7], [20, 21, 22, 1]), ([40, 41, 42, 43, 44], [30, 31])]
    expected = logprobs_by_hand(model.bfloat16(), rows)
    assert (found - expected).abs().max() < 0.1  # bf16 logits of size 10 are rounded by 0.03


@pytest.mark.parametrize(
    "teacher_prompts",
    [
        [[50, 51, 52, 53, 54, 55, 56, 57], [60]],  # longer in one row, shorter in the other
        [[8], [9, 9]],
    ],
)
def test_another_prompt_equals_scoring_that_sequence(
    tmp_path: Path, teacher_prompts: list[list[int]]
):
    model = save_tiny(tmp_path, "llama", seed=1)
    rollout = rollout_with(teacher_prompts)
    found = load(tmp_path).read(rollout, lambda d: d.logprobs(rollout.token_ids))
    rows = [(teacher_prompts[0], [20, 21, 22, 1]), (teacher_prompts[1], [30, 31])]
    torch.testing.assert_close(found, logprobs_by_hand(model, rows), atol=5e-5, rtol=1e-5)
    plain = rollout_with()
    same_prompt = load(tmp_path).read(plain, lambda d: d.logprobs(plain.token_ids))
    assert (found - same_prompt).abs().max() > 0.1, "the premise: the prompt matters"


def test_head_padded_to_more_rows_than_the_students(tmp_path: Path):
    model = save_tiny(tmp_path, "llama", seed=1, vocab_size=352)
    teacher = LocalTeacher(str(tmp_path))
    tokenizer = teacher.load_tokenizer()
    shared = shared_vocabulary(tokenizer, tokenizer, 300, teacher.vocab_size())
    assert (teacher.vocab_size(), shared) == (352, 300)
    teacher.load(CPU, shared)
    student, rollout = CausalPolicy(tiny_model(), vocab_size=shared), rollout_with()

    def both(teacher_side):  # noqa: ANN001
        return student.read(rollout, lambda d: (d.reverse_kl(teacher_side), teacher_side.topk(4)))

    kl, (ids, logprobs) = teacher.read(rollout, both)
    ours, theirs = (
        torch.stack(
            [
                m(torch.tensor([p + c])).logits[0, len(p) + i - 1, :300].detach().log_softmax(-1)
                for p, c in [([5, 6, 7], [20, 21, 22, 1]), ([40, 41, 42, 43, 44], [30, 31])]
                for i in range(len(c))
            ]
        )
        for m in (student.model, model)
    )
    expected = (ours.exp() * (ours - theirs)).sum(-1)
    torch.testing.assert_close(kl.detach(), expected, atol=1e-4, rtol=1e-4)
    assert int(ids.max()) < 300
    torch.testing.assert_close(logprobs, theirs.topk(4).values, atol=1e-4, rtol=1e-4)


def test_a_second_load_only_moves(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save_tiny(tmp_path)
    teacher = load(tmp_path)
    policy = teacher.policy
    with caplog.at_level(logging.DEBUG, "opd_lightning"):
        teacher.load(CPU, 300)
    assert teacher.policy is policy
    assert not caplog.records


def test_missing_folder_is_refused_before_loading(tmp_path: Path):
    teacher = LocalTeacher(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="does not exist"):
        teacher.check()
