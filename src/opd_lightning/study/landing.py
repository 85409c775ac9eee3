"""`opd study landing`: where each objective ends if it is followed to the end at one prefix.

Ten tokens of which the teacher's three likeliest, S, hold 0.80; a student that is wrong on and off
S; plain gradient descent on its free logits along each objective's exact expected gradient. A fully
specified version of what arXiv 2603.25562's Table A3 compares by training; docs/mathematics.md,
sections 3 to 5. With it the one-token imbalance of `imbalance.py`.

V vocabulary, y the sampled token, pi the student's and q the teacher's distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from opd_lightning.objectives import Objective
from opd_lightning.objectives.base import check_at_least
from opd_lightning.records import Rollout
from opd_lightning.study.cases import Case, cases
from opd_lightning.study.imbalance import imbalance_rows
from opd_lightning.study.landing_figure import draw_imbalance, draw_landing
from opd_lightning.study.tables import Row, write_csv

K = 3
TEACHER = (0.40, 0.25, 0.15, 0.08, 0.05, 0.03, 0.02, 0.01, 0.006, 0.004)
START_LOGITS = (0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0)
STEP_SIZE, STEPS = 0.5, 60_000
# how far the steps left out by an early stop may move a logit, all together; 4 digits are printed
_REST_NATS = 1e-5
_LOOK_EVERY = 16  # steps between two looks at whether to stop
_PATH_POINTS_A_DECADE = 24


class Prefix:
    """The one prefix: its teacher, and what a student of given logits is worth there.

    All y are enumerated: one row for each, weighted by pi(y).
    """

    def __init__(self) -> None:
        size = len(TEACHER)
        q = torch.tensor(TEACHER, dtype=torch.float64)
        self.start = torch.tensor(START_LOGITS, dtype=torch.float64)
        self.support = q.topk(K).indices
        self._q = q
        self._teacher = TokenDistribution.from_logits(q.log().expand(size, size).contiguous())
        self._every_token = Rollout.from_flat(torch.arange(size), torch.arange(size))

    def expected_gradient(self, objective: Objective, logits: Tensor) -> Tensor:
        """Return sum_y pi(y) grad loss_y on the logits, [V]; pi(y) itself is not differentiated."""
        leaf = logits.detach().requires_grad_()
        student = TokenDistribution.from_logits(leaf.expand(len(leaf), -1))
        losses = objective.token_loss(student, self._teacher, self._every_token).loss
        return torch.autograd.grad(leaf.detach().softmax(0) @ losses, leaf)[0]

    def support_mass(self, logits: Tensor) -> float:
        """Return pi(S), S the teacher's top K."""
        return float(logits.softmax(0)[self.support].sum())

    def measures(self, logits: Tensor) -> dict[str, float]:
        """Return pi(S), KLs and entropy in nats, and the total variation to the teacher."""
        student = TokenDistribution.from_logits(logits[None])
        teacher = TokenDistribution.from_logits(self._q.log()[None])
        return {
            "support_mass": self.support_mass(logits),
            "reverse_kl": float(student.reverse_kl(teacher)),
            "forward_kl": float(student.forward_kl(teacher)),
            "entropy": float(student.entropy()),
            "total_variation": float((logits.softmax(0) - self._q).abs().sum() / 2),
        }


@dataclass
class Descent:
    """One run of gradient descent.

    Attributes:
        logits: [V] where it ended.
        steps: Steps that were taken.
        path: Step -> pi(S), at steps evenly spaced on a logarithmic axis, and at the last.
    """

    logits: Tensor
    steps: int = 0
    path: dict[int, float] = field(default_factory=dict)


def descend(
    prefix: Prefix, objective: Objective, step_size: float = STEP_SIZE, steps: int = STEPS
) -> Descent:
    """Follow the objective's expected gradient from the start logits.

    Stops early when the steps left, each as large as the last one, could together move no logit by
    more than 1e-5 nats: descent on a fixed slope takes ever smaller steps, so no digit that is
    printed would change.
    """
    run = Descent(prefix.start.clone())
    marks = {round(10 ** (i / _PATH_POINTS_A_DECADE)) for i in range(8 * _PATH_POINTS_A_DECADE)}
    run.path[0] = prefix.support_mass(run.logits)
    while run.steps < steps:
        update = step_size * prefix.expected_gradient(objective, run.logits)
        run.logits = run.logits - update
        run.steps += 1
        if run.steps in marks:
            run.path[run.steps] = prefix.support_mass(run.logits)
        look = run.steps % _LOOK_EVERY == 0
        if look and float(update.abs().max()) * (steps - run.steps) < _REST_NATS:
            break
    run.path[run.steps] = prefix.support_mass(run.logits)
    return run


def landing_rows(
    which: Sequence[Case] | None = None, step_size: float = STEP_SIZE, steps: int = STEPS
) -> tuple[list[Row], list[Row]]:
    """Return the table of end points, the start first, and the paths of pi(S) towards them.

    Args:
        which: The cases; default all.
        step_size: Of the descent, on the logits.
        steps: At most so many, at least 1.

    Raises:
        ConfigError: If `steps` < 1.
    """
    check_at_least("steps", steps, 1, "Without a step every objective is at the start.")
    prefix = Prefix()
    table: list[Row] = [
        {"objective": "(start)", "setting": "", **prefix.measures(prefix.start), "steps": 0}
    ]
    paths: list[Row] = []
    for case in cases() if which is None else which:
        run = descend(prefix, case.objective, step_size, steps)
        table.append({
            "objective": case.name,
            "setting": case.setting,
            **prefix.measures(run.logits),
            "steps": run.steps,
        })  # fmt: skip
        paths += [
            {"objective": case.name, "step": step, "support_mass": mass}
            for step, mass in run.path.items()
        ]
    return table, paths


def landing(out: Path, steps: int = STEPS, num_prefixes: int = 200, seed: int = 0) -> list[Path]:
    """Write the end points, the paths to them and the one-token imbalance, as CSV and PNG.

    Args:
        out: Folder; made if missing.
        steps: Of gradient descent, at most.
        num_prefixes: Of the imbalance.
        seed: Of the imbalance's prefixes and samples; the descent draws nothing.

    Returns:
        `landing.csv`, `landing_paths.csv`, `landing.png`, `imbalance.csv`, `imbalance.png`.

    Raises:
        ConfigError: If `steps` or `num_prefixes` is below 1.
    """
    check_at_least("num_prefixes", num_prefixes, 1, "The columns are means over them.")
    table, paths = landing_rows(steps=steps)
    imbalance = imbalance_rows(num_prefixes, seed=seed)
    return [
        write_csv(table, out / "landing.csv"),
        write_csv(paths, out / "landing_paths.csv"),
        draw_landing(table, paths, sum(sorted(TEACHER)[-K:]), out / "landing.png"),
        write_csv(imbalance, out / "imbalance.csv"),
        draw_imbalance(imbalance, out / "imbalance.png"),
    ]
