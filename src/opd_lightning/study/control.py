"""`opd study control`: what the discount gamma costs a policy that moves along a line.

A student for two tasks (from +2 to -3, from -2 to +3, in 20 steps) is distilled on-policy from an
exact teacher by G_t = r_t + gamma G_{t+1}. The toy study of arXiv 2603.25562 (Figures 1, A1 to A3),
whose settings are not all published: here all are chosen and stated. All seeds and gammas train
side by side, `control_policy.py`.

M runs, ordered seed by seed and within a seed by gamma.
"""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from opd_lightning.objectives.base import check_at_least
from opd_lightning.study.control_figure import draw_summary, draw_variances, draw_visits
from opd_lightning.study.control_policy import (
    GOALS,
    MICRO_BATCHES,
    STEPS,
    TASKS,
    Noise,
    Policies,
    Trajectories,
    backward,
    micro_batch_variance,
    roll_out,
    visits,
)
from opd_lightning.study.tables import Row, write_csv

GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEEDS = (42, 43, 2026)
FIXED_BATCHES = 16
EVALUATED = 512
_EVALUATION_SEED = 0


@dataclass(frozen=True)
class Setting:
    """How the student is trained.

    Attributes:
        name: `standard` or `stress`.
        trajectories: Of one task an iteration, in eight micro-batches.
        learning_rate: Of Adam; no clipping.
        iterations: Odd ones left, even ones right.
        measure_every: Iterations between two measurements of a task's variance.

    Raises:
        ConfigError: If the trajectories do not make eight micro-batches, or nothing is measured
            in the last quarter of the iterations.
    """

    name: str = "standard"
    trajectories: int = 64
    learning_rate: float = 1e-3
    iterations: int = 2000
    measure_every: int = 20

    def __post_init__(self) -> None:
        check_at_least("trajectories", self.trajectories, MICRO_BATCHES, "A micro-batch has one.")
        needed = 4 * self.measure_every
        check_at_least("iterations", self.iterations, needed, "The last quarter is measured.")

    @property
    def late(self) -> float:
        """The iteration after which the variance is called late."""
        return 0.75 * self.iterations


STANDARD = Setting()
STRESS = Setting("stress", 8, 3e-2, 500, 10)


@dataclass
class Training:
    """What M runs of a setting came to.

    Attributes:
        policies: Where they ended.
        curves: Task -> iteration -> variance over micro-batches, [M].
    """

    policies: Policies
    curves: tuple[dict[int, Tensor], ...] = field(default_factory=lambda: ({}, {}))

    def late_variance(self, task: int, after: float) -> Tensor:
        """Return the median variance of iterations above `after`, [M]; NaN if one of them is."""
        late = [v for iteration, v in self.curves[task].items() if iteration > after]
        # the mean of the two in the middle, as numpy's median
        return torch.stack(late).quantile(0.5, dim=0)


def fixed_variance(
    seeds: Sequence[int],
    gammas: Sequence[float] = GAMMAS,
    trajectories: int = STANDARD.trajectories,
    batches: int = FIXED_BATCHES,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the variance at initialisation, mean over `batches` a task, [2, M].

    All gammas of a seed see the same trajectories.
    """
    policies, noise = Policies(seeds, len(gammas), dtype), Noise(seeds, len(gammas))
    discounts = _discounts(seeds, gammas, dtype)
    total = torch.zeros(len(TASKS), len(discounts), dtype=torch.float64)
    for _ in range(batches):
        for task in range(len(TASKS)):
            seen = roll_out(policies, task, trajectories, noise)
            total[task] += micro_batch_variance(*backward(policies, seen, discounts))
    return total / batches


def train(
    seeds: Sequence[int],
    gammas: Sequence[float] = GAMMAS,
    setting: Setting = STANDARD,
    dtype: torch.dtype = torch.float32,
) -> Training:
    """Train a student for each seed and gamma, all at once.

    A seed fixes the initial weights and the noise, which all its gammas share. A run whose numbers
    overflow goes on with NaN and leaves the others alone.
    """
    done = Training(Policies(seeds, len(gammas), dtype))
    noise, discounts = Noise(seeds, len(gammas)), _discounts(seeds, gammas, dtype)
    optimizer = torch.optim.Adam(done.policies.parameters, lr=setting.learning_rate)
    for iteration in range(1, setting.iterations + 1):
        task = (iteration - 1) % len(TASKS)
        seen = roll_out(done.policies, task, setting.trajectories, noise)
        gradients = backward(done.policies, seen, discounts)
        if (iteration - 1) % setting.measure_every < len(TASKS):
            done.curves[task][iteration] = micro_batch_variance(*gradients)
        optimizer.step()
    return done


def _discounts(seeds: Sequence[int], gammas: Sequence[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(gammas, dtype=dtype).repeat(len(seeds))


def evaluate(policies: Policies, count: int = EVALUATED) -> list[Trajectories]:
    """Return `count` trajectories of each policy in each task; all policies see one noise."""
    noise = Noise([_EVALUATION_SEED], len(policies.parameters[0]))
    return [roll_out(policies, task, count, noise) for task in range(len(TASKS))]


@dataclass(frozen=True)
class Findings:
    """The study's tables.

    Attributes:
        rows: A row for each seed, gamma and task.
        curves: Variance by iteration.
        visits: Filled bins of the heat maps.
    """

    rows: list[Row]
    curves: list[Row]
    visits: list[Row]


def findings(
    seeds: Sequence[int], gammas: Sequence[float] = GAMMAS, setting: Setting = STANDARD
) -> Findings:
    """Measure at initialisation, train, evaluate; return all as rows."""
    fixed = fixed_variance(seeds, gammas, setting.trajectories)
    done = train(seeds, gammas, setting)
    evaluated = evaluate(done.policies)
    rows, curves, seen = [], [], []
    counts = [visits(trajectories.positions) for trajectories in evaluated]
    runs = [(seed, gamma) for seed in seeds for gamma in gammas]
    for i, (seed, gamma) in enumerate(runs):
        for task, name in enumerate(TASKS):
            key: Row = {"seed": seed, "gamma": gamma, "task": name}
            late = done.late_variance(task, setting.late)
            reference = i - i % len(gammas)
            rows.append({
                **key,
                "fixed_variance": float(fixed[task, i]),
                "late_variance": float(late[i]),
                "late_ratio": float(late[i] / late[reference]),
                **_reached(evaluated[task], i, task),
                "outside": 1 - int(counts[task][i].sum()) / EVALUATED / (STEPS + 1),
            })  # fmt: skip
            curves += [
                {**key, "iteration": iteration, "variance": float(values[i])}
                for iteration, values in done.curves[task].items()
            ]
            seen += [
                {**key, "step": step, "bin": place, "count": int(counts[task][i, step, place])}
                for step, place in counts[task][i].nonzero().tolist()
            ]
    return Findings(rows, curves, seen)


def _reached(seen: Trajectories, run: int, task: int) -> Row:
    last = seen.positions[run, -1].double()
    return {
        "distance": float((last - GOALS[task]).abs().mean()),
        "sequence_kl": float(seen.costs[run].double().sum(0).mean()),
        "last_mean": float(last.mean()),
        "last_std": float(last.std()),
    }


def fixed_ratios(rows: Sequence[Row]) -> dict[int, dict[float, float]]:
    """Return seed -> gamma -> variance at initialisation, both tasks, over that of gamma 0."""
    sums: dict[int, dict[float, float]] = {}
    for row in rows:
        of_seed = sums.setdefault(int(row["seed"]), {})
        gamma = float(row["gamma"])
        of_seed[gamma] = of_seed.get(gamma, 0.0) + float(row["fixed_variance"])
    return {seed: {g: v / by[min(by)] for g, v in by.items()} for seed, by in sums.items()}


def claims(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Return the seeds for which each claim of the paper holds.

    Rising means: from each gamma to the next, in both tasks. `gamma_0_reaches_both_goals` is a mean
    distance below 0.6; the teacher's own spread leaves 0.35.
    """
    ratios = fixed_ratios(rows)
    held: dict[str, list[int]] = {}
    for seed in ratios:
        of_task = [[r for r in rows if (r["seed"], r["task"]) == (seed, task)] for task in TASKS]
        first, last = [r[0] for r in of_task], [r[-1] for r in of_task]
        found = {
            "fixed_variance_rises_with_gamma": _rises(ratios[seed].values()),
            "fixed_variance_ratio_above_10": list(ratios[seed].values())[-1] > 10,
            "late_variance_rises_with_gamma": all(
                _rises(float(row["late_variance"]) for row in r) for r in of_task
            ),
            "late_variance_ratio_above_10": all(float(row["late_ratio"]) > 10 for row in last),
            "gamma_0_reaches_both_goals": all(float(row["distance"]) < 0.6 for row in first),
            "gamma_1_ends_farther_from_both_goals": all(
                # not a number, if gamma 1 overflowed, is farther too
                not float(b["distance"]) <= float(a["distance"])
                for a, b in zip(first, last, strict=True)
            ),
            "gamma_1_has_the_larger_sequence_kl": all(
                not float(b["sequence_kl"]) <= float(a["sequence_kl"])
                for a, b in zip(first, last, strict=True)
            ),
        }
        for name, holds in found.items():
            held.setdefault(name, []).extend([seed] if holds else [])
    return held


def _rises(values: Iterable[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def first_seeds(count: int) -> list[int]:
    """Return the paper's 42, 43 and 2026, then 2027 and on.

    Raises:
        ConfigError: If `count` < 1.
    """
    check_at_least("seeds", count, 1, "The first is 42, then 43 and 2026.")
    return [*SEEDS, *range(SEEDS[-1] + 1, SEEDS[-1] + 1 + count)][:count]


def control(
    out: Path, stress: bool = False, seeds: int = len(SEEDS), setting: Setting | None = None
) -> list[Path]:
    """Write tables, figures and a summary of the study into `out`.

    Args:
        out: Folder; made if missing.
        stress: Batches of 8, learning rate 3e-2, 500 iterations, where the standard version has 64,
            1e-3, 2000; its files have `stress` in their names.
        seeds: How many, at least 1.
        setting: Instead of both.

    Returns:
        `control.csv`, `control_curves.csv`, `control_visits.csv`, `control.png`, two further PNGs a
        seed, and `summary.json`.

    Raises:
        ConfigError: If `seeds` < 1.
    """
    setting = setting or (STRESS if stress else STANDARD)
    numbers, begun = first_seeds(seeds), time.perf_counter()
    found = findings(numbers, setting=setting)
    seconds = time.perf_counter() - begun
    name, suffix = ("control_stress", "_stress") if stress else ("control", "")
    paths = [
        write_csv(found.rows, out / f"{name}.csv"),
        write_csv(found.curves, out / f"{name}_curves.csv"),
        write_csv(found.visits, out / f"{name}_visits.csv"),
        draw_summary(found.rows, fixed_ratios(found.rows), setting.name, out / f"{name}.png"),
    ]
    for seed in numbers:
        curves = [row for row in found.curves if row["seed"] == seed]
        title = f"Variance over micro-batches while training, {setting.name}, seed {seed}"
        paths.append(draw_variances(curves, title, out / f"{name}_variance_{seed}.png"))
        rows, seen = [[r for r in t if r["seed"] == seed] for t in (found.rows, found.visits)]
        title = f"Where the trained student is, {setting.name}, seed {seed}"
        paths.append(draw_visits(rows, seen, title, out / f"{name}_visits_{seed}.png"))
    summary = {
        "setting": asdict(setting),
        "seeds": numbers,
        "gammas": GAMMAS,
        "seconds": round(seconds, 1),
        "fixed_ratio": fixed_ratios(found.rows),
        "claims_hold_for_seeds": claims(found.rows),
        "rows": found.rows,
    }
    path = out / f"summary{suffix}.json"
    # JSON has no word for what overflowed
    path.write_text(json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n")
    return [*paths, path]


def _finite(value: object) -> object:
    """Return the value with null for each number in it that is not finite."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
