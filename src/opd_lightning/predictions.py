"""Completions as records, for `opd predict` and for the samples shown after a run."""

from typing import Any

from torch import Tensor

from opd_lightning.policy import Tokenizer
from opd_lightning.records import PromptBatch


def prediction_records(
    batch: PromptBatch, tokenizer: Tokenizer, student_logprobs: Tensor, teacher_logprobs: Tensor
) -> list[dict[str, Any]]:
    """Return one JSON-ready record a row of the batch's rollout.

    Keys: `index` (line of the prompt, 0-based), `generation` (number among its siblings), `task`,
    `prompt`, `completion`, `truncated`, `token_ids`, `tokens`, `student_logprobs` and
    `teacher_logprobs` (nats, full softmax at the run's temperature).

    Args:
        batch: With its rollout, N completion tokens.
        tokenizer: The student's.
        student_logprobs: [N].
        teacher_logprobs: [N].
    """
    rollout = batch.rollout
    group = rollout.num_rows // batch.num_prompts
    lengths = rollout.completion_lengths.tolist()
    flat = [rollout.token_ids, student_logprobs, teacher_logprobs]
    per_row = [values.cpu().split(lengths) for values in flat]
    records = []
    for row, (ids, student, teacher) in enumerate(zip(*per_row, strict=True)):
        prompt_ids = batch.input_ids[row // group][batch.attention_mask[row // group].bool()]
        records.append(
            {
                "index": int(batch.index[row // group]),
                "generation": row % group,
                "task": rollout.task[row],
                "prompt": tokenizer.decode(prompt_ids.tolist()),
                "completion": tokenizer.decode(ids.tolist(), skip_special_tokens=True),
                "truncated": bool(rollout.truncated[row]),
                "token_ids": ids.tolist(),
                "tokens": [tokenizer.decode([i]) for i in ids.tolist()],
                "student_logprobs": [round(x, 6) for x in student.tolist()],
                "teacher_logprobs": [round(x, 6) for x in teacher.tolist()],
            }
        )
    return records
