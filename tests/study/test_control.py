"""`opd study control`: all runs at once against a plain loop over them, and what it finds."""

import json
import math
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from opd_lightning.errors import ConfigError
from opd_lightning.objectives.sampled_token import discounted_returns
from opd_lightning.study import control_policy
from opd_lightning.study.control import (
    GAMMAS,
    SEEDS,
    STRESS,
    Setting,
    Training,
    claims,
    control,
    evaluate,
    first_seeds,
    fixed_ratios,
    fixed_variance,
    train,
)
from opd_lightning.study.control_policy import Noise, Policies, returns, roll_out, visits
from opd_lightning.study.tables import Row, read_csv

FIXED_RATIOS = {
    42: [1, 1.24, 1.84, 4.20, 33.6],
    43: [1, 1.16, 1.54, 2.89, 18.6],
    2026: [1, 1.19, 1.69, 3.81, 34.1],
}
DOUBLE = torch.float64


class PlainRun:
    """One seed and one gamma, from the definitions: a module, one trajectory's step at a time."""

    def __init__(self, seed: int, gamma: float) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = [nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)]
        self.net = nn.Sequential(*layers).double()
        self.gamma = gamma
        self.noise = torch.Generator().manual_seed(seed)
        self.variances: dict[int, float] = {}

    def student(self, seen: Tensor) -> torch.distributions.Normal:
        mean, raw = self.net(seen).unbind(-1)
        return torch.distributions.Normal(mean, torch.exp(-0.75 + 1.25 * torch.tanh(raw)))

    def roll_out(
        self, task: int, count: int, noise: torch.Generator
    ) -> tuple[list[tuple[Tensor, ...]], Tensor]:
        goal = [-3.0, 3.0][task]
        position = torch.full((count,), [2.0, -2.0][task], dtype=DOUBLE)
        steps, positions = [], [position]
        for t in range(20):
            side = torch.full_like(position, [-1.0, 1.0][task])
            seen = torch.stack([side, position / 5, torch.full_like(position, t / 20)], dim=1)
            with torch.no_grad():
                student = self.student(seen)
                move = student.mean + student.stddev * torch.randn(count, generator=noise).double()
                towards = torch.clamp(0.3 * (goal - position), -1, 1)
                teacher = torch.distributions.Normal(towards, 0.3)
                cost = student.log_prob(move) - teacher.log_prob(move)
            steps.append((seen, move, cost))
            position = position + move
            positions.append(position)
        return steps, torch.stack(positions)

    def loss(self, steps: list[tuple[Tensor, ...]], part: slice) -> Tensor:
        seen, moves, costs = [torch.stack(found)[:, part] for found in zip(*steps, strict=True)]
        later = [sum(self.gamma**i * cost for i, cost in enumerate(costs[t:])) for t in range(20)]
        return (torch.stack(later) * self.student(seen).log_prob(moves)).sum(0).mean()

    def train(self, setting: Setting) -> None:
        optimizer = torch.optim.Adam(self.net.parameters(), lr=setting.learning_rate)
        for iteration in range(1, setting.iterations + 1):
            steps, _ = self.roll_out((iteration + 1) % 2, setting.trajectories, self.noise)
            if iteration % setting.measure_every in (1, 2):
                self.variances[iteration] = self.variance(steps, setting.trajectories // 8)
            optimizer.zero_grad()
            self.loss(steps, slice(None)).backward()
            optimizer.step()

    def variance(self, steps: list[tuple[Tensor, ...]], size: int) -> float:
        last = list(self.net[4].parameters())
        each = []
        for i in range(8):
            found = torch.autograd.grad(self.loss(steps, slice(i * size, (i + 1) * size)), last)
            each.append(torch.cat([g.flatten() for g in found]))
        return float(sum((g - sum(each) / 8).square().sum() for g in each) / 8)


SHORT = [Setting("short", 16, 1e-3, 12, 3), Setting("short stress", 8, 3e-2, 12, 3)]


@pytest.mark.parametrize("setting", SHORT, ids=lambda setting: setting.name)
def test_all_runs_at_once_are_the_runs_of_a_plain_loop(setting: Setting):
    seeds, gammas = (42, 2026), (0.5, 1.0)
    done = train(seeds, gammas, setting, DOUBLE)
    evaluated = evaluate(done.policies, 8)
    weights = done.policies.parameters
    assert sum(p[0].numel() for p in weights) == 4546
    for i, (seed, gamma) in enumerate((s, g) for s in seeds for g in gammas):
        plain = PlainRun(seed, gamma)
        plain.train(setting)
        found = {n: float(v[i]) for curve in done.curves for n, v in curve.items()}
        assert len(plain.variances) > 4
        assert found == pytest.approx(plain.variances, rel=1e-8)
        for mine, wanted in zip(weights, plain.net.parameters(), strict=True):
            shown = mine[i].T if wanted.dim() == 2 else mine[i, 0]
            torch.testing.assert_close(shown, wanted, rtol=1e-8, atol=1e-10)
        noise = torch.Generator().manual_seed(0)
        for task, trajectories in enumerate(evaluated):
            steps, positions = plain.roll_out(task, 8, noise)
            torch.testing.assert_close(trajectories.positions[i], positions, rtol=0, atol=1e-7)
            costs = torch.stack([cost for *_, cost in steps])
            torch.testing.assert_close(trajectories.costs[i], costs, rtol=1e-7, atol=1e-7)


def test_returns_are_those_of_the_package():
    costs = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    gammas = torch.tensor([0.0, 0.6, 1.0], dtype=DOUBLE)
    found = returns(costs, gammas)
    for i, gamma in enumerate(gammas.tolist()):
        row = torch.arange(2).repeat_interleave(7)
        wanted = discounted_returns(costs[i].T.flatten(), row, gamma).view(2, 7).T
        torch.testing.assert_close(found[i], wanted, rtol=0, atol=1e-14)


def test_the_teacher_in_the_students_place_costs_nothing(monkeypatch: pytest.MonkeyPatch):
    policies = Policies([1], 1, DOUBLE)

    def teach(outputs: Tensor) -> tuple[Tensor, Tensor]:
        position = outputs[..., 0]
        teacher = control_policy.teacher_mean(position, task=0)
        return teacher, torch.full_like(position, math.log(0.3))

    # a network that hands its second input on: the position / 5
    monkeypatch.setattr(policies, "hidden", lambda seen: 5 * seen[..., 1:2])
    monkeypatch.setattr(policies, "outputs", lambda hidden: hidden.expand(-1, -1, 2))
    monkeypatch.setattr(control_policy, "mean_and_log_std", teach)
    seen = roll_out(policies, 0, 512, Noise([0], 1))
    assert float(seen.costs.abs().max()) < 1e-12
    # what the docs call the teacher's own spread
    assert float((seen.positions[0, -1] + 3).abs().mean()) == pytest.approx(0.35, abs=0.03)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    Policies([42], 2)
    assert torch.equal(torch.rand(1), wanted)


def test_positions_are_counted_in_their_bins():
    positions = torch.tensor([-8.0, -7.76, -7.74, 0.0, 7.99, 8.0, -8.01, math.nan, math.inf])
    counts = visits(positions.view(1, 1, -1))[0, 0]
    assert {place: int(counts[place]) for place in counts.nonzero().flatten().tolist()} == {
        0: 2, 1: 1, 32: 1, 63: 1
    }  # fmt: skip


def test_a_run_that_overflows_leaves_the_others_alone():
    policies, alone = Policies([42], 2, DOUBLE), Policies([42], 1, DOUBLE)
    with torch.no_grad():
        policies.parameters[4][0] = math.nan
    gammas = torch.tensor([0.5, 0.5], dtype=DOUBLE)
    seen = roll_out(policies, 0, 8, Noise([3], 2))
    variance = control_policy.micro_batch_variance(*control_policy.backward(policies, seen, gammas))
    control_policy.backward(alone, roll_out(alone, 0, 8, Noise([3], 1)), gammas[1:])
    assert math.isnan(variance[0])
    assert math.isfinite(variance[1])
    for mine, wanted in zip(policies.parameters, alone.parameters, strict=True):
        torch.testing.assert_close(mine.grad[1], wanted.grad[0], rtol=1e-9, atol=1e-12)


@cache
def at_start() -> dict[int, list[float]]:
    by_seed = fixed_variance(SEEDS).view(2, len(SEEDS), -1).sum(0)
    return {seed: (v / v[0]).tolist() for seed, v in zip(SEEDS, by_seed, strict=True)}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_variance_of_a_fixed_student_rises_with_gamma(seed: int):
    ratios = at_start()[seed]
    assert all(a < b for a, b in pairwise(ratios))
    assert ratios[-1] > 10
    assert ratios == pytest.approx(FIXED_RATIOS[seed], rel=0.005)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_page_shows_the_same_ratios(seed: int):
    cells = [f"{ratio:.3g}" if ratio > 10 else f"{ratio:.2f}" for ratio in at_start()[seed][1:]]
    line = f"| {' | '.join([str(seed), *cells])} |"
    assert line in (Path(__file__).parents[2] / "docs" / "study.md").read_text().splitlines()


def test_the_variance_of_a_trained_student_rises_with_gamma():
    setting = Setting(iterations=200, measure_every=4)
    done = train([43], setting=setting)
    for task in range(2):
        late = done.late_variance(task, setting.late).tolist()
        assert all(a < b for a, b in pairwise(late))
        assert late[-1] > 2 * late[0]


def test_stress_separates_gamma_one_from_gamma_zero():
    gammas = (0.0, 1.0)
    done = train(SEEDS, gammas, STRESS)
    late = torch.stack([done.late_variance(task, STRESS.late) for task in range(2)])
    ratios = late.view(2, len(SEEDS), 2)
    assert bool((ratios[..., 1] > 10 * ratios[..., 0]).all())
    far = [
        (seen.positions[:, -1] - goal).abs().mean(1).view(len(SEEDS), 2)
        for seen, goal in zip(evaluate(done.policies), (-3, 3), strict=True)
    ]
    farther = sum(far)[:, 1] > sum(far)[:, 0]
    assert int(farther.sum()) >= 2


def rows_of(late: list[float], distance: list[float]) -> list[Row]:
    each = zip((0.0, 0.5, 1.0), (1.0, 2.0, 30.0), late, distance, strict=True)
    return [
        {
            "seed": 1, "gamma": gamma, "task": task, "fixed_variance": fixed, "late_variance": v,
            "late_ratio": v / late[0], "distance": d, "sequence_kl": d,
        }
        for gamma, fixed, v, d in each
        for task in ("left", "right")
    ]  # fmt: skip


def test_claims_name_the_seeds_for_which_they_hold():
    yes = claims(rows_of([1.0, 2.0, 11.0], [0.3, 0.3, 2.0]))
    assert all(seeds == [1] for seeds in yes.values())
    no = claims(rows_of([1.0, 0.5, 9.0], [0.7, 0.3, 0.6]))
    assert {name for name, seeds in no.items() if seeds} == {
        "fixed_variance_rises_with_gamma",
        "fixed_variance_ratio_above_10",
    }
    overflowed = claims(rows_of([1.0, 2.0, math.nan], [0.3, 0.3, math.nan]))
    assert overflowed["gamma_1_ends_farther_from_both_goals"] == [1]
    assert overflowed["late_variance_rises_with_gamma"] == []


def test_the_files_are_written_and_read_back(tmp_path: Path):
    setting = Setting("tiny", 8, 1e-3, 16, 4)
    paths = control(tmp_path / "out", seeds=1, setting=setting)
    assert [p.name for p in paths] == [
        "control.csv", "control_curves.csv", "control_visits.csv", "control.png",
        "control_variance_42.png", "control_visits_42.png", "summary.json",
    ]  # fmt: skip
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
            assert path.stat().st_size > 20_000
    rows, curves, seen = [read_csv(path) for path in paths[:3]]
    assert [(r["gamma"], r["task"]) for r in rows] == [
        (gamma, task) for gamma in GAMMAS for task in ("left", "right")
    ]
    assert {r["iteration"] for r in curves} == {1, 2, 5, 6, 9, 10, 13, 14}
    # every trajectory is somewhere at every step
    inside = 2 * len(GAMMAS) * 21 * 512 - sum(round(r["outside"] * 21 * 512) for r in rows)
    assert sum(r["count"] for r in seen) == inside
    summary = json.loads(paths[-1].read_text())
    assert summary["rows"] == rows
    expect_plain(rows, setting, gamma=0.5)
    assert summary["setting"]["trajectories"] == 8
    assert summary["fixed_ratio"]["42"]["1.0"] == fixed_ratios(rows)[42][1.0] > 10


def expect_plain(rows: list[Row], setting: Setting, gamma: float) -> None:
    """Compare the rows of seed 42 and a gamma with a plain run of it."""
    plain, noise = PlainRun(42, gamma), torch.Generator().manual_seed(0)
    plain.train(setting)
    for task, name in enumerate(("left", "right")):
        first, row = [r for r in rows if r["task"] == name and r["gamma"] in (0, gamma)]
        steps, positions = plain.roll_out(task, 512, noise)
        # measured at 1, 2, 5, 6, 9, 10, 13 and 14, of which only the last two are late
        late = plain.variances[13 + task]
        wanted = {
            "late_variance": late,
            "late_ratio": late / first["late_variance"],
            "distance": float((positions[-1] - (-3, 3)[task]).abs().mean()),
            "sequence_kl": float(sum(cost for *_, cost in steps).mean()),
            "last_mean": float(positions[-1].mean()),
            "last_std": float(positions[-1].std()),
            "outside": float((positions.abs() > 8).double().mean()),
        }
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_the_late_variance_is_the_median_of_the_late_ones():
    values = {1: 9.0, 13: 8.0, 17: 1.0, 21: 2.0, 25: 4.0, 29: 100.0}
    curve = {n: torch.tensor([v, 2 * v], dtype=DOUBLE) for n, v in values.items()}
    done = Training(Policies([1], 2), ({}, curve))
    assert done.late_variance(1, after=13).tolist() == [3.0, 6.0]


def test_more_seeds_follow_the_papers():
    assert first_seeds(2) == [42, 43]
    assert first_seeds(5) == [42, 43, 2026, 2027, 2028]
    with pytest.raises(ConfigError, match=r"seeds must be at least 1; got 0\. The first is 42"):
        first_seeds(0)


def test_a_setting_that_measures_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"trajectories must be at least 8; got 4\. A micro"):
        Setting(trajectories=4)
    with pytest.raises(ConfigError, match=r"iterations must be at least 80; got 79\. The last"):
        Setting(iterations=79)
