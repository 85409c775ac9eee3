"""`opd study landing`: the digits of the table, closed forms of the end points, and the descent.

Slow objectives are followed with steps eight times as large over the same time, step size times
steps; one test compares the two.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opd_lightning import objectives
from opd_lightning.errors import ConfigError
from opd_lightning.study import landing as study
from opd_lightning.study.cases import ForwardTopK, cases
from opd_lightning.study.landing import START_LOGITS, TEACHER, Descent, Prefix, descend, landing
from opd_lightning.study.tables import read_csv

PAGE = Path(__file__).parents[2] / "docs" / "study.md"
# pi(S), KL(pi || q), KL(q || pi), entropy, total variation
TEACHER_ITSELF = "0.8000 0.000 0.000 1.632 0.000"
TABLE = {
    "reverse KL": TEACHER_ITSELF,
    "forward KL": TEACHER_ITSELF,
    "Jensen-Shannon": TEACHER_ITSELF,
    "skew reverse KL": TEACHER_ITSELF,
    "power": TEACHER_ITSELF,
    "entropy-aware": TEACHER_ITSELF,
    "top-3": "0.2120 1.088 0.856 2.011 0.591",
    "top-3, forward KL": "0.2120 1.088 0.856 2.011 0.591",
    "student's top-3": "0.5053 0.859 1.118 1.774 0.586",
    "both top-3": "0.5379 0.375 0.217 2.124 0.262",
    "top-p 0.9": "0.5023 0.661 0.337 2.103 0.346",
    "top-3 and sampled": "0.7992 0.0001 0.0001 1.636 0.001",
    "top-3, not renormalised": "0.2943 0.863 0.612 2.109 0.508",
    "top-3, tail bucket": "0.8000 0.086 0.063 1.698 0.072",
    "top-3, sampled tail as published": "0.5954 0.109 0.095 1.916 0.205",
    "top-3, sampled tail": TEACHER_ITSELF,
    "top-3 − 0.1 log π(S)": "0.9993 0.219 1.026 1.030 0.199",
}
QUICK = {
    "top-3", "top-3, forward KL", "student's top-3", "both top-3", "top-p 0.9",
    "top-3, not renormalised", "top-3, tail bucket",
}  # fmt: skip
CASES = {case.name: case for case in cases()}
Q = torch.tensor(TEACHER, dtype=torch.float64)
START = torch.tensor(START_LOGITS, dtype=torch.float64).softmax(0)


@cache
def end(name: str) -> Descent:
    coarse = {} if name in QUICK else {"step_size": 4.0, "steps": 7500}
    return descend(Prefix(), CASES[name].objective, **coarse)


def probabilities(name: str) -> Tensor:
    return end(name).logits.softmax(0)


def shown(measures: dict[str, float], like: str) -> str:
    wanted = like.split()
    values = [abs(value) for value in measures.values()]
    return " ".join(
        f"{v:.{len(w.partition('.')[2])}f}" for v, w in zip(values, wanted, strict=True)
    )


def test_every_objective_of_the_study_is_in_the_table():
    assert list(CASES) == list(TABLE)


def test_the_start_is_that_of_the_table():
    prefix = Prefix()
    assert shown(prefix.measures(prefix.start), "0.219 1.150 1.104 2.006 0.585") == (
        "0.219 1.150 1.104 2.006 0.585"
    )
    entropy = float(-(Q * Q.log()).sum())
    assert f"{entropy:.3f} {float(Q[:3].sum()):.2f}" == "1.632 0.80"


@pytest.mark.parametrize("name", TABLE)
def test_the_end_is_that_of_the_table(name: str):
    assert shown(Prefix().measures(end(name).logits), TABLE[name]) == TABLE[name]


@pytest.mark.parametrize("name", [n for n in TABLE if TABLE[n] != TEACHER_ITSELF])
def test_the_page_shows_the_same_digits(name: str):
    if name == "top-3, forward KL":
        name = "top-3"  # one line for both
    (line,) = [x for x in PAGE.read_text().splitlines() if f"| `{CASES[name].setting}`" in x]
    assert " ".join(line.replace("*", "").split(" | ")[1:]).removesuffix(" |") == TABLE[name]


def test_measures_are_their_definitions():
    p = START
    wanted = {
        "support_mass": p[:3].sum(),
        "reverse_kl": (p * (p / Q).log()).sum(),
        "forward_kl": (Q * (Q / p).log()).sum(),
        "entropy": -(p * p.log()).sum(),
        "total_variation": (p - Q).clamp(min=0).sum(),
    }
    found = Prefix().measures(p.log() + 7)
    assert found == pytest.approx({k: float(v) for k, v in wanted.items()}, abs=1e-14)


def test_the_head_alone_keeps_one_part_in_e_of_the_support():
    p = probabilities("top-3, not renormalised")
    torch.testing.assert_close(p[:3], Q[:3] / torch.e, rtol=0, atol=1e-9)
    assert float(p[:3].sum()) == pytest.approx(0.8 / torch.e, abs=1e-9)


def test_the_published_head_and_tail_ends_with_the_support_divided_by_e():
    p = probabilities("top-3, sampled tail as published")
    tilted = torch.cat([Q[:3] / torch.e, Q[3:]])
    torch.testing.assert_close(p, tilted / tilted.sum(), rtol=0, atol=1e-7)
    assert float(p[:3].sum()) == pytest.approx((0.8 / torch.e) / (0.8 / torch.e + 0.2), abs=1e-7)


@pytest.mark.parametrize("name", ["top-3", "top-3, forward KL", "top-p 0.9"])
def test_on_the_support_the_ratios_are_the_teachers_and_off_it_nothing_moves(name: str):
    size = 5 if name == "top-p 0.9" else 3
    p = probabilities(name)
    torch.testing.assert_close(
        p[:size] / p[:size].sum(), Q[:size] / Q[:size].sum(), rtol=0, atol=1e-8
    )
    torch.testing.assert_close(p[size:] / p[size:].sum(), START[size:] / START[size:].sum())
    assert abs(float(p[:size].sum() - START[:size].sum())) < 0.05


def test_a_tail_bucket_makes_the_support_exact_and_holds_the_mass_off_it():
    p = probabilities("top-3, tail bucket")
    torch.testing.assert_close(p[:3], Q[:3], rtol=0, atol=1e-8)
    assert float((p[3:] - Q[3:]).abs().max()) > 0.01, "the tail's shape is not seen"


def test_the_pull_on_the_mass_empties_the_tail():
    p = probabilities("top-3 − 0.1 log π(S)")
    assert float(p[3:].sum()) < 1e-3
    torch.testing.assert_close(p[:3] / p[:3].sum(), Q[:3] / 0.8, rtol=0, atol=1e-3)


def test_larger_steps_over_the_same_time_end_alike():
    name = "top-3, sampled tail as published"
    fine = descend(Prefix(), CASES[name].objective)
    assert fine.steps > 7 * end(name).steps
    torch.testing.assert_close(fine.logits, end(name).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["top-3", "student's top-3", "both top-3"])
def test_the_steps_left_out_would_not_have_mattered(name: str, monkeypatch: pytest.MonkeyPatch):
    early = end(name)
    assert early.steps < 500
    monkeypatch.setattr(study, "_REST_NATS", 0.0)
    longer = descend(Prefix(), CASES[name].objective, steps=3000)
    assert longer.steps == 3000
    torch.testing.assert_close(longer.logits, early.logits, rtol=0, atol=1e-8)


def test_the_gradient_is_the_expectation_over_the_sampled_token():
    """By hand for the support that holds it: KL of the renormalised top 3 and y, weighted."""
    prefix, z = Prefix(), torch.tensor(START_LOGITS, dtype=torch.float64)
    wanted = torch.zeros(10, dtype=torch.float64)
    for y in range(10):
        ids = sorted({0, 1, 2, y})
        p, q = START[ids] / START[ids].sum(), Q[ids] / Q[ids].sum()
        ratio = (p / q).log()
        wanted[ids] += START[y] * p * (ratio - (p * ratio).sum())
    found = prefix.expected_gradient(CASES["top-3 and sampled"].objective, z)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


def test_the_forward_kl_on_the_support_has_its_stated_gradient():
    z = torch.tensor(START_LOGITS, dtype=torch.float64)
    wanted = torch.zeros(10, dtype=torch.float64)
    wanted[:3] = START[:3] / START[:3].sum() - Q[:3] / Q[:3].sum()
    found = Prefix().expected_gradient(ForwardTopK(k=3), z)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


def test_an_unbiased_estimator_has_the_gradient_of_the_reverse_kl():
    prefix, z = Prefix(), torch.tensor(START_LOGITS, dtype=torch.float64)
    ratio = (START / Q).log()
    wanted = START * (ratio - (START * ratio).sum())
    for name in ("reverse KL", "top-3, sampled tail"):
        found = prefix.expected_gradient(CASES[name].objective, z)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


def test_the_path_begins_at_the_start_and_stops_at_the_end():
    run = end("top-3")
    steps = list(run.path)
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == run.steps
    assert run.path[0] == pytest.approx(float(START[:3].sum()))
    assert run.path[run.steps] == pytest.approx(float(run.logits.softmax(0)[:3].sum()))


@pytest.mark.parametrize("name", CASES)
def test_what_the_table_calls_a_setting_builds_the_objective(name: str):
    known = {"ForwardTopK": ForwardTopK} | {n: getattr(objectives, n) for n in objectives.__all__}
    assert repr(eval(CASES[name].setting, known)) == repr(CASES[name].objective)


def test_the_files_are_written_and_read_back(tmp_path: Path):
    paths = landing(tmp_path / "out", steps=15, num_prefixes=4)
    assert [p.name for p in paths] == [
        "landing.csv", "landing_paths.csv", "landing.png", "imbalance.csv", "imbalance.png",
    ]  # fmt: skip
    table, steps, imbalance = (read_csv(paths[i]) for i in (0, 1, 3))
    assert [row["objective"] for row in table] == ["(start)", *TABLE]
    assert {row["steps"] for row in table} == {0, 15}
    lasts = {row["objective"]: row["support_mass"] for row in steps}
    assert lasts == {row["objective"]: row["support_mass"] for row in table[1:]}
    assert [(row["tau"], row["sigma"]) for row in imbalance] == [(1, 0.5), (1, 1), (0.6, 1)]
    for picture in (paths[2], paths[4]):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert picture.stat().st_size > 20_000


@pytest.mark.parametrize("setting", ["steps", "num_prefixes"])
def test_a_run_of_nothing_is_refused(tmp_path: Path, setting: str):
    with pytest.raises(ConfigError, match=f"{setting} must be at least 1; got 0"):
        landing(tmp_path, **{"steps": 1, "num_prefixes": 1, setting: 0})
    assert list(tmp_path.iterdir()) == []
