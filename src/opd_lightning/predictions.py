"""Completions as records, for `opd predict` and for the samples shown after a run."""

from typing import Any

from torch import Tensor

from opd_lightning.policy import Tokenizer
from opd_lightning.records import PromptBatch
from opd_lightning.rollout.callback import completion_records


def prediction_records(
    batch: PromptBatch, tokenizer: Tokenizer, student_logprobs: Tensor, teacher_logprobs: Tensor
) -> list[dict[str, Any]]:
    """Return one JSON-ready record a row of the batch's rollout.

    Keys: those of `completion_records`, `token_ids`, `tokens`, `student_logprobs` and
    `teacher_logprobs` (nats, full softmax at the run's temperature).

    Args:
        batch: With its rollout, N completion tokens.
        tokenizer: The student's.
        student_logprobs: [N].
        teacher_logprobs: [N].
    """
    lengths = batch.rollout.completion_lengths.tolist()
    flat = [batch.rollout.token_ids, student_logprobs, teacher_logprobs]
    per_row = zip(*(values.cpu().split(lengths) for values in flat), strict=True)
    return [
        record
        | {
            "token_ids": ids.tolist(),
            "tokens": [tokenizer.decode([i]) for i in ids.tolist()],
            "student_logprobs": [round(x, 6) for x in student.tolist()],
            "teacher_logprobs": [round(x, 6) for x in teacher.tolist()],
        }
        for record, (ids, student, teacher) in zip(
            completion_records(batch, tokenizer), per_row, strict=True
        )
    ]
