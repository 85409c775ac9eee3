"""Every token weight of the package: range, shape, dtype, no gradient, any form of the models."""

from typing import get_type_hints

import pytest
import torch
from jsonargparse import ArgumentParser

import opd_lightning.weighting as room
from opd_lightning.distributions import TokenDistribution
from opd_lightning.weighting import (
    AgreementSoFar,
    EntropyTopRatio,
    PositionDecay,
    PositionWindow,
    SpecialTokenMask,
    TokenWeight,
    TruncatedRowWeight,
    combined_weight,
)
from opd_lightning.weighting.base import by_row
from tests.weighting.cases import LENGTHS, D, V, dense, logits, rollout_of, served, with_gap

CONFIGURED: dict[str, tuple[type[TokenWeight], dict]] = {
    "SpecialTokenMask": (SpecialTokenMask, {"tokens": [1, 2]}),
    "EntropyTopRatio": (EntropyTopRatio, {}),
    "entropy-half-of-teacher": (EntropyTopRatio, {"ratio": 0.5, "of": "teacher"}),
    "PositionWindow": (PositionWindow, {}),
    "window-1-3": (PositionWindow, {"start": 1, "end": 3}),
    "PositionDecay": (PositionDecay, {"half_life": 2.5}),
    "AgreementSoFar": (AgreementSoFar, {}),
    "agreement-0.1": (AgreementSoFar, {"rate": 0.1}),
    "TruncatedRowWeight": (TruncatedRowWeight, {}),
    "truncated-0.3": (TruncatedRowWeight, {"weight": 0.3}),
}
OWN = [
    cls
    for cls in map(vars(room).get, room.__all__)
    if isinstance(cls, type) and issubclass(cls, TokenWeight) and cls is not TokenWeight
]


def build(name: str) -> TokenWeight:
    cls, settings = CONFIGURED[name]
    return cls(**settings)


def test_every_weight_of_the_package_is_in_the_battery():
    assert {cls for cls, _ in CONFIGURED.values()} == set(OWN)


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("name", CONFIGURED)
def test_weights_lie_within_0_and_1_and_carry_no_gradient(name: str, rows: str):
    lengths = LENGTHS[rows]
    rollout = rollout_of(lengths, truncated=[b % 2 == 0 for b in range(len(lengths))])
    n = sum(lengths)
    leaves = [logits(n, seed).requires_grad_() for seed in (0, 1)]
    weights = build(name).weight(rollout, *[TokenDistribution.from_logits(z) for z in leaves])
    assert weights.shape == (n,)
    assert not weights.requires_grad
    assert ((weights >= 0) & (weights <= 1)).all()


@pytest.mark.parametrize("name", CONFIGURED)
def test_chunked_models_give_the_weights_of_dense_ones(name: str):
    rollout = rollout_of(LENGTHS["several"], truncated=[True, False] * 3)
    n = rollout.num_tokens
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64)
    hidden = torch.randn(2, n, D, generator=g, dtype=torch.float64)
    chunked = [
        TokenDistribution.from_hidden(h.requires_grad_(), weight, chunk_size=3) for h in hidden
    ]
    plain = [TokenDistribution.from_logits(h @ weight.T) for h in hidden]
    assert n % 3
    torch.testing.assert_close(
        build(name).weight(rollout, *chunked), build(name).weight(rollout, *plain)
    )


@pytest.mark.parametrize("name", [n for n in CONFIGURED if "teacher" not in n])
def test_a_teacher_that_gives_its_top_k_is_enough(name: str):
    rollout = rollout_of(LENGTHS["several"], truncated=[True, False] * 3)
    student, t = dense(rollout.num_tokens, 0), logits(rollout.num_tokens, 1)
    whole = build(name).weight(rollout, student, TokenDistribution.from_logits(t))
    few = build(name).weight(rollout, student, served(t, rollout))
    torch.testing.assert_close(few, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONFIGURED)
def test_dtype_is_that_of_the_model_read_or_the_default(name: str, dtype: torch.dtype):
    rollout = rollout_of(LENGTHS["several"])
    models = [dense(rollout.num_tokens, seed, dtype) for seed in (0, 1)]
    reads_models = issubclass(CONFIGURED[name][0], EntropyTopRatio | AgreementSoFar)
    wanted = torch.float64 if reads_models and dtype == torch.float64 else torch.float32
    assert build(name).weight(rollout, *models).dtype == wanted


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_weight_takes_no_gradient_from_the_students_later_reads(name: str):
    rollout = rollout_of(LENGTHS["several"])
    z = logits(rollout.num_tokens, 0).requires_grad_()
    student = TokenDistribution.from_logits(z)
    build(name).weight(rollout, student, dense(rollout.num_tokens, 1))
    found = torch.autograd.grad(student.logprobs(rollout.token_ids).sum(), z)[0]
    hot = torch.nn.functional.one_hot(rollout.token_ids, V)
    torch.testing.assert_close(found, hot - z.detach().softmax(1))


def test_all_of_them_multiply():
    rollout = rollout_of(LENGTHS["several"], truncated=[True, False] * 3)
    models = [dense(rollout.num_tokens, seed) for seed in (0, 1)]
    weights = [build(name) for name in CONFIGURED if name != "EntropyTopRatio"]
    product = torch.ones(rollout.num_tokens, dtype=torch.float64)
    for weight in weights:
        product *= weight.weight(rollout, *models)
    assert product.any(), "the case is to leave something"
    torch.testing.assert_close(
        combined_weight(weights, rollout, *models), product, check_dtype=False
    )


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_configuration_file_can_name_it_and_its_settings(name: str):
    cls, settings = CONFIGURED[name]
    assert set(settings) <= set(get_type_hints(cls.__init__))
    parser = ArgumentParser()
    parser.add_argument("--weights", type=list[TokenWeight])
    path = f"opd_lightning.weighting.{cls.__name__}"
    parsed = parser.parse_object({"weights": [{"class_path": path, "init_args": settings}]})
    (made,) = parser.instantiate_classes(parsed).weights
    assert type(made) is cls and vars(made) == vars(build(name))
    again = parser.parse_string(parser.dump(parsed))
    assert vars(parser.instantiate_classes(again).weights[0]) == vars(made)


def test_by_row_lays_tokens_out_as_the_rollout_does():
    table = by_row(torch.arange(1.0, 9.0), with_gap(), fill=-5.0)
    assert table.tolist() == [[-5, 1, 2, 3, -5, 4, 5], [-5, 6, 7, 8, -5, -5, -5]]
