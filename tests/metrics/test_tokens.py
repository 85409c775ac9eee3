"""The table of token measures, against definitions written out token by token."""

import pytest
import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution, TopKDistribution
from opd_lightning.metrics.tokens import (
    COLUMNS,
    TokenRecords,
    TokenTable,
    longest_loops,
    repeated_ngrams,
    token_table,
)
from opd_lightning.records import Rollout

V, K = 11, 3


def case(seed: int = 0) -> tuple[Tensor, Tensor, Rollout]:
    g = torch.Generator().manual_seed(seed)
    row = torch.tensor([0] * 5 + [1] * 2 + [3] * 4)
    student, teacher = (2 * torch.randn(len(row), V, generator=g).double() for _ in range(2))
    ids = torch.randint(V, (len(row),), generator=g)
    sampling = student.log_softmax(-1).gather(1, ids[:, None])[:, 0] + 0.25
    return student, teacher, Rollout.from_flat(ids, row, sampling_logprobs=sampling)


def column(table: TokenTable, name: str) -> Tensor:
    return table.tokens[:, COLUMNS.index(name)].double()


def test_every_column_is_its_definition():
    student, teacher, rollout = case()
    keep = torch.arange(rollout.num_tokens) % 3 > 0
    forms = (TokenDistribution.from_logits(student), TokenDistribution.from_logits(teacher))
    table = token_table(*forms, rollout, keep, K)
    for n in range(rollout.num_tokens):
        p, q, y = student[n].softmax(-1), teacher[n].softmax(-1), int(rollout.token_ids[n])
        best_q = set(q.argsort(descending=True)[:K].tolist())
        both = best_q & set(p.argsort(descending=True)[:K].tolist())
        wanted = {
            "token_id": y,
            "position": int(rollout.position[n]),
            "counts": float(keep[n]),
            "student_logprob": p[y].log(),
            "teacher_logprob": q[y].log(),
            "sampling_logprob": p[y].log() + 0.25,
            "student_entropy": -(p * p.log()).sum(),
            "teacher_entropy": -(q * q.log()).sum(),
            "overlap": len(both) / K,
            "overlap_student_mass": sum(p[v] for v in both),
            "overlap_teacher_mass": sum(q[v] for v in both),
            "student_support_mass": sum(p[v] for v in best_q),
            "teacher_support_mass": sum(q[v] for v in best_q),
            "in_support": float(y in best_q),
        }
        for name, value in wanted.items():
            assert float(column(table, name)[n]) == pytest.approx(float(value), abs=1e-5), name
    assert len(table["token_id"]) == int(keep.sum())
    assert table.masked_fraction == pytest.approx(1 - float(keep.double().mean()))
    assert table.row("length").tolist() == [5, 2, 0, 4]


def test_a_teacher_of_its_top_k_gives_all_but_its_entropy():
    student, teacher, rollout = case(1)
    keep = torch.ones(rollout.num_tokens, dtype=torch.bool)
    p, q = TokenDistribution.from_logits(student), TokenDistribution.from_logits(teacher)
    served = TopKDistribution(*q.topk(K), q.logprobs(rollout.token_ids))
    whole, partial = (token_table(p, t, rollout, keep, K) for t in (q, served))
    for name in COLUMNS:
        if name == "teacher_entropy":
            assert column(partial, name).isnan().all()
        else:
            torch.testing.assert_close(column(partial, name), column(whole, name))


def test_chunked_and_dense_forms_give_one_table():
    g = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 4, generator=g).double() for n in (11, V))
    _, teacher, rollout = case()
    keep = torch.ones(11, dtype=torch.bool)
    q = TokenDistribution.from_logits(teacher)
    forms = [
        TokenDistribution.from_hidden(hidden.requires_grad_(), weight, chunk_size=4),
        TokenDistribution.from_logits(hidden @ weight.T),
    ]
    first, second = (token_table(form, q, rollout, keep, K).tokens for form in forms)
    torch.testing.assert_close(first, second)
    assert not first.requires_grad


def test_parts_of_a_rollout_are_collected_in_order_with_empty_ones():
    student, teacher, rollout = case()
    keep = torch.ones(rollout.num_tokens, dtype=torch.bool)
    p, q = (TokenDistribution.from_logits(logits) for logits in (student, teacher))
    records = TokenRecords()
    records.update(token_table(p, q, rollout, keep, K))
    nothing = Rollout.from_flat(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    empty = TokenDistribution.from_logits(student[:0])
    records.update(token_table(empty, empty, nothing, keep[:0], K))
    records.update(token_table(p, q, rollout, keep, K))
    table = records.compute()
    assert len(table["token_id"]) == 2 * rollout.num_tokens
    assert table["token_id"].tolist() == 2 * rollout.token_ids.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_repetition_is_that_of_a_loop_over_tokens(seed: int):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, (60,), generator=g)
    row = torch.randint(4, (60,), generator=g).sort().values
    wanted_repeated, wanted_loops = [], [0] * 4
    for n in range(60):
        start = int((row < row[n]).sum())
        text = ids[start : n + 1].tolist()
        grams = [tuple(text[i : i + 4]) for i in range(len(text) - 3)]
        wanted_repeated.append(len(grams) > 0 and grams[-1] in grams[:-1])
        for period in range(1, 33):
            length = period
            while length < len(text) and text[-1 - length + period] == text[-1 - length]:
                length += 1
            if length >= 2 * period:
                wanted_loops[row[n]] = max(wanted_loops[row[n]], length)
    assert repeated_ngrams(ids, row).tolist() == wanted_repeated
    assert longest_loops(ids, row, 4).tolist() == wanted_loops
