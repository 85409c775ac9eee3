"""One completion as a page of HTML, each token coloured by its advantage."""

import html
from typing import Any

from opd_lightning.metrics.tokens import COLUMNS, TokenTable
from opd_lightning.records import Rollout

_STRONGEST = 10.0  # nats from which on the colour is full
_STYLE = (
    "body{font:15px/1.9 ui-monospace,monospace;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "color:#222;background:#fff}span{border-radius:3px;padding:1px 0;white-space:pre-wrap}"
    "p{font:14px/1.5 system-ui,sans-serif;color:#555}"
)


def heat_map(rollout: Rollout, table: TokenTable, tokenizer: Any) -> str:
    """Return a page of the completion with most of sum |A|; pointing at a token shows its numbers.

    Args:
        rollout: A micro-batch.
        table: Of all its tokens, in order.
        tokenizer: Of the student.
    """
    student = table.tokens[:, COLUMNS.index("student_logprob")]
    teacher = table.tokens[:, COLUMNS.index("teacher_logprob")]
    counts = table.tokens[:, COLUMNS.index("counts")] > 0
    advantage = teacher - student
    rows = rollout.row.cpu()
    sums = advantage.abs().new_zeros(rollout.num_rows).index_add(0, rows, advantage.abs())
    row = int(sums.argmax())
    inside = rows == row
    ids = rollout.token_ids.cpu()[inside].tolist()
    prompt = rollout.input_ids[row].cpu()[: int(rollout.completion_mask[row].int().argmax())]
    spans = [
        _span(tokenizer.decode([token]), *numbers)
        for token, *numbers in zip(
            ids,
            advantage[inside].tolist(),
            student[inside].tolist(),
            teacher[inside].tolist(),
            counts[inside].tolist(),
            strict=True,
        )
    ]
    asked = html.escape(tokenizer.decode(prompt))
    return (
        f"<!doctype html><meta charset='utf-8'><title>Advantage by token</title>"
        f"<style>{_STYLE}</style><h3>Advantage log q(y) − log π(y) by token</h3>"
        f"<p>Red: the teacher finds the token less likely than the student does; blue: likelier; "
        f"full colour from {_STRONGEST:.0f} nats on. Struck out: masked.</p>"
        f"<div style='color:#888;white-space:pre-wrap'>{asked}</div>"
        f"<div>{''.join(spans)}</div>"
    )


def _span(text: str, advantage: float, student: float, teacher: float, counts: bool) -> str:
    strength = min(1.0, abs(advantage) / _STRONGEST)
    colour = "213,94,0" if advantage < 0 else "0,114,178"
    note = f"A {advantage:.2f} = teacher {teacher:.2f} − student {student:.2f} nats"
    struck = "" if counts else "text-decoration:line-through;"
    shown = html.escape(text).replace("\n", "⏎\n")
    return (
        f"<span title='{html.escape(note)}' style='{struck}background:rgba({colour},"
        f"{0.05 + 0.85 * strength:.2f})'>{shown}</span>"
    )
