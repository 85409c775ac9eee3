"""on_policy_measures against the definitions, in float64."""

import pytest
import torch

from opd_lightning.distributions import TokenDistribution, TopKDistribution
from opd_lightning.metrics import on_policy_measures
from opd_lightning.records import Rollout

N, V, D = 7, 11, 3


def pair() -> tuple[torch.Tensor, torch.Tensor, Rollout]:
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, N, V, generator=g, dtype=torch.float64).mul(2).unbind()
    ids = torch.randint(V, (N,), generator=g)
    return student, teacher, Rollout.from_flat(ids, torch.zeros(N, dtype=torch.long))


def expected(z: torch.Tensor, t: torch.Tensor) -> dict[str, list[float]]:
    p, q = z.softmax(1), t.softmax(1)
    return {
        "kl/reverse": [float((p[n] * (p[n] / q[n]).log()).sum()) for n in range(N)],
        "entropy": [float(-(p[n] * p[n].log()).sum()) for n in range(N)],
        "teacher/entropy": [float(-(q[n] * q[n].log()).sum()) for n in range(N)],
    }


def test_of_two_whole_distributions():
    z, t, rollout = pair()
    student = TokenDistribution.from_logits(z.clone().requires_grad_())
    measures = on_policy_measures(student, TokenDistribution.from_logits(t), rollout)
    assert not any(value.requires_grad for value in measures.values())
    shown = {key: value.tolist() for key, value in measures.items()}
    assert list(shown) == ["kl/reverse", "entropy", "teacher/entropy"]
    for key, values in expected(z, t).items():
        assert shown[key] == pytest.approx(values, rel=1e-10), key


@pytest.mark.parametrize("chunk_size", [1, 3, N, 100])
def test_of_heads_read_in_chunks(chunk_size: int):
    g = torch.Generator().manual_seed(1)
    hidden, heads = [torch.randn(2, n, D, generator=g, dtype=torch.float64) for n in (N, V)]
    ours, theirs = [
        TokenDistribution.from_hidden(h, w, chunk_size=chunk_size)
        for h, w in zip(hidden, heads, strict=True)
    ]
    measures = on_policy_measures(ours, theirs, pair()[2])
    logits = [h @ w.T for h, w in zip(hidden, heads, strict=True)]
    for key, values in expected(*logits).items():
        assert measures[key].tolist() == pytest.approx(values, rel=1e-10), key


def test_of_a_teacher_that_gives_some_logprobs():
    z, t, rollout = pair()
    logprobs = t.log_softmax(1)
    values, ids = logprobs.topk(4)
    here = torch.arange(N), rollout.token_ids
    teacher = TopKDistribution(ids, values, logprobs[here])
    measures = on_policy_measures(TokenDistribution.from_logits(z), teacher, rollout)
    assert sorted(measures) == ["entropy", "kl/reverse_k1"]
    estimate = (z.log_softmax(1) - logprobs)[here]
    assert measures["kl/reverse_k1"].tolist() == pytest.approx(estimate.tolist(), rel=1e-10)
    assert measures["entropy"].tolist() == pytest.approx(expected(z, t)["entropy"], rel=1e-10)


def test_of_no_tokens():
    nothing = Rollout.from_flat(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    empty = TokenDistribution.from_hidden(torch.zeros(0, D), torch.zeros(V, D))
    measures = on_policy_measures(empty, empty, nothing)
    assert {key: tuple(value.shape) for key, value in measures.items()} == {
        "kl/reverse": (0,),
        "entropy": (0,),
        "teacher/entropy": (0,),
    }
