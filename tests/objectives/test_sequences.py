"""Sequence-level theory on a bigram model (3 tokens), all 3^T sequences enumerated."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from opd_lightning.objectives import Objective, ReverseKL, SampledTokenReverseKL, SequenceReverseKL
from opd_lightning.records import Rollout

GAMMAS = [0.0, 0.25, 0.5, 0.75, 1.0]
# worked out for this model: relative bias and total variance by gamma
TABLE = {
    1: (0.586, ["0"] * 5, ["0.686"] * 5),
    2: (
        0.754,
        ["0.145", "0.109", "0.0725", "0.0362", "0"],
        ["0.874", "0.860", "0.875", "0.920", "0.994"],
    ),
    4: (
        1.252,
        ["0.174", "0.129", "0.0851", "0.0420", "0"],
        ["1.49", "1.60", "1.90", "2.58", "4.05"],
    ),
}


@cache
def model() -> tuple[Tensor, Tensor]:
    """Student and teacher logits [4, 3]; state 3 is the start."""
    rng = np.random.default_rng(0)
    theta = rng.standard_normal((4, 3))
    return torch.from_numpy(theta), torch.from_numpy(rng.standard_normal((4, 3)))


@cache
def sequences(length: int) -> tuple[Tensor, Tensor]:
    """Return all tokens [3^T, T] and the states [3^T, T] in which they were chosen."""
    tokens = torch.cartesian_prod(*[torch.arange(3)] * length).reshape(-1, length)
    start = torch.full((len(tokens), 1), 3)
    return tokens, torch.cat([start, tokens[:, :-1]], dim=1)


def log_probabilities(logits: Tensor, length: int) -> Tensor:
    tokens, states = sequences(length)
    return logits.log_softmax(1)[states, tokens]


def sequence_kl(theta: Tensor, length: int) -> Tensor:
    """KL of whole completions: sum over all sequences of pi(y) log(pi(y) / q(y))."""
    ours = log_probabilities(theta, length).sum(1)
    theirs = log_probabilities(model()[1], length).sum(1)
    return (ours.exp() * (ours - theirs)).sum()


def exact_gradient(length: int) -> Tensor:
    theta = model()[0].clone().requires_grad_()
    return torch.autograd.grad(sequence_kl(theta, length), theta)[0]


def sample_gradients(objective: Objective, length: int) -> tuple[Tensor, Tensor]:
    """Return pi(y) [S] and the gradient on theta [S, 4, 3] of each sequence's summed loss."""
    theta, teacher_logits = model()
    tokens, states = sequences(length)
    leaf = theta[states.flatten()].requires_grad_()
    row = torch.arange(len(tokens)).repeat_interleave(length)
    rollout = Rollout.from_flat(tokens.flatten(), row)
    teacher = TokenDistribution.from_logits(teacher_logits[states.flatten()])
    weights = torch.ones(tokens.numel(), dtype=torch.float64)
    loss = objective(TokenDistribution.from_logits(leaf), teacher, rollout, weights).loss
    on_logits = torch.autograd.grad(loss, leaf)[0].reshape(*tokens.shape, 3)
    gradients = torch.zeros(len(tokens), 4, 3, dtype=torch.float64)
    for state in range(4):
        gradients[:, state] = (on_logits * (states == state)[..., None]).sum(1)
    return log_probabilities(theta, length).sum(1).exp(), gradients


def mean_gradient(objective: Objective, length: int) -> Tensor:
    p, gradients = sample_gradients(objective, length)
    return torch.einsum("s,sav->av", p, gradients)


def shown(value: float, like: str) -> str:
    """`value` rounded to as many decimals as the table prints."""
    return f"{value:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("length", TABLE)
def test_25_the_model_has_the_sequence_kl_of_the_table(length: int):
    assert round(float(sequence_kl(model()[0], length)), 3) == TABLE[length][0]


@pytest.mark.parametrize("place", range(len(GAMMAS)))
@pytest.mark.parametrize("length", TABLE)
def test_26_relative_bias_and_variance_of_the_table(length: int, place: int):
    p, gradients = sample_gradients(SequenceReverseKL(gamma=GAMMAS[place]), length)
    mean, exact = torch.einsum("s,sav->av", p, gradients), exact_gradient(length)
    bias, printed = float((mean - exact).norm() / exact.norm()), TABLE[length][1][place]
    assert bias < 1e-12 if printed == "0" else shown(bias, printed) == printed
    variance = float((p[:, None, None] * (gradients - mean) ** 2).sum())
    assert shown(variance, TABLE[length][2][place]) == TABLE[length][2][place]


def test_24_with_one_token_all_gammas_give_the_same_estimator():
    samples = [sample_gradients(SequenceReverseKL(gamma=g), 1)[1] for g in GAMMAS]
    token_level = sample_gradients(SampledTokenReverseKL(), 1)[1]
    for one in samples:
        assert torch.equal(one, token_level)


def test_24_gamma_zero_is_the_sum_of_exact_state_gradients_under_the_occupancy():
    length = 8
    theta, teacher_logits = model()
    p, q = theta.softmax(1), teacher_logits.softmax(1)
    ratio = (p / q).log()
    state_gradients = p * (ratio - (p * ratio).sum(1, keepdim=True))
    occupancy = torch.zeros(4, dtype=torch.float64)
    at = torch.tensor([0, 0, 0, 1.0], dtype=torch.float64)
    for _ in range(length):
        occupancy += at
        at = torch.cat([at @ p, torch.zeros(1, dtype=torch.float64)])
    wanted = occupancy[:, None] * state_gradients
    for objective in (SequenceReverseKL(gamma=0.0), SampledTokenReverseKL(), ReverseKL()):
        torch.testing.assert_close(mean_gradient(objective, length), wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("length", [2, 4, 6])
def test_25_gamma_one_is_unbiased_for_the_sequence_kl(length: int):
    found = mean_gradient(SequenceReverseKL(gamma=1.0), length)
    torch.testing.assert_close(found, exact_gradient(length), rtol=0, atol=1e-13)


def test_25_expected_sum_of_costs_is_the_sequence_kl():
    tokens, states = sequences(4)
    rollout = Rollout.from_flat(tokens.flatten(), torch.arange(len(tokens)).repeat_interleave(4))
    student, teacher = [TokenDistribution.from_logits(m[states.flatten()]) for m in model()]
    costs = SequenceReverseKL().token_loss(student, teacher, rollout).metrics["kl/reverse_k1"]
    p = log_probabilities(model()[0], 4).sum(1).exp()
    expected_sum = (p * costs.reshape(tokens.shape).sum(1)).sum()
    torch.testing.assert_close(expected_sum, sequence_kl(model()[0], 4), rtol=0, atol=1e-13)


@pytest.mark.parametrize("length", [2, 4])
def test_26_bias_is_the_score_times_the_expected_later_costs(length: int):
    theta, teacher_logits = model()
    p, ratio = theta.softmax(1), theta.log_softmax(1) - teacher_logits.log_softmax(1)
    tokens, states = sequences(length)
    weight = log_probabilities(theta, length).sum(1).exp()
    # later[s][k]: expected cost of k further tokens from state s
    later = [torch.zeros(4, dtype=torch.float64)]
    for _ in range(length):
        later.append((p * (ratio + later[-1][:3])).sum(1))
    bias = torch.zeros(4, 3, dtype=torch.float64)
    for t in range(length):
        future = later[length - 1 - t][tokens[:, t]]
        for state in range(4):
            here = (weight * future * (states[:, t] == state))[:, None]
            score = torch.nn.functional.one_hot(tokens[:, t], 3) - p[state]
            bias[state] += (here * score).sum(0)
    missing = exact_gradient(length) - mean_gradient(SequenceReverseKL(gamma=0.0), length)
    assert missing.abs().max() > 0.01
    torch.testing.assert_close(missing, bias, rtol=0, atol=1e-13)


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), float("inf")])
@pytest.mark.parametrize("kind", ["whole position", "sampled id", "an id beside it"])
def test_a_silenced_token_hands_on_its_cost_exactly_where_that_is_finite(kind: str, value: float):
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    rollout = Rollout.from_flat(torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.long))
    place = {"whole position": slice(None), "sampled id": 1, "an id beside it": 4}[kind]
    t[1, place] = value
    costs = (z.log_softmax(1) - t.log_softmax(1))[torch.arange(3), torch.arange(3)]
    middle = costs[1] if costs[1].isfinite() else torch.zeros((), dtype=torch.float64)
    assert (kind == "an id beside it" and value == -float("inf")) == bool(costs[1].isfinite())
    credit = torch.stack([costs[0] + middle + costs[2], middle, costs[2]])
    weights = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    hot = torch.eye(3, 5, dtype=torch.float64)
    wanted = (weights * credit)[:, None] * (hot - z.softmax(1))
    leaf = z.clone().requires_grad_()
    student, teacher = TokenDistribution.from_logits(leaf), TokenDistribution.from_logits(t)
    SequenceReverseKL()(student, teacher, rollout, weights).loss.backward()
    torch.testing.assert_close(leaf.grad, wanted, rtol=1e-12, atol=1e-14)


def multi_turn() -> Rollout:
    """Two rows of turns: the student's tokens stand at 1 2, 4 5 7 and at 1, 3 4."""
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    ids = torch.arange(16).view(2, 8)
    attention = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    return Rollout(ids, attention, mask)


def test_spans_are_the_unbroken_runs_of_a_row():
    assert multi_turn().span.tolist() == [0, 0, 1, 1, 2, 3, 4, 4]
    touching = torch.tensor([[False, True], [True, True]])  # a row ends where the next begins
    assert Rollout(torch.zeros(2, 2).long(), touching.long(), touching).span.tolist() == [0, 1, 1]


@pytest.mark.parametrize("across", ["skip", "reset"])
@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_returns_across_turns(across: str, gamma: float):
    rollout = multi_turn()
    chains = [0, 0, 0, 0, 0, 1, 1, 1] if across == "skip" else [0, 0, 1, 1, 2, 3, 4, 4]
    g = torch.Generator().manual_seed(0)
    costs = torch.randn(8, generator=g, dtype=torch.float64)
    objective = SequenceReverseKL(gamma, across_masked=across)
    wanted = [
        sum(
            gamma**d * float(costs[m])
            for d, m in enumerate(m for m in range(n, 8) if chains[m] == chains[n])
        )
        for n in range(8)
    ]
    torch.testing.assert_close(objective.credit(costs, rollout).tolist(), wanted)
    per_token = SequenceReverseKL(gamma, across_masked=across, normalize="length")
    lengths = [5, 5, 5, 5, 5, 3, 3, 3]
    torch.testing.assert_close(
        per_token.credit(costs, rollout).tolist(),
        [w / n for w, n in zip(wanted, lengths, strict=True)],
    )
