"""What an objective reads, counted while it runs: rows of the student's head, teacher's numbers."""

from typing import Any

import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from opd_lightning.objectives import Objective
from opd_lightning.tools.audit.names import SMALL_K
from opd_lightning.tools.audit.world import World


class _Counted(TokenDistribution):
    """A dense distribution that counts what is read of each position.

    Attributes:
        single: Gathered ids.
        whole: Passes over the vocabulary.
    """

    def __init__(self, logits: Tensor) -> None:
        self._dense = TokenDistribution.from_logits(logits)
        self._normalised = False
        self.single = self.whole = 0

    @property
    def num_tokens(self) -> int:
        return self._dense.num_tokens

    @property
    def vocab_size(self) -> int:
        return self._dense.vocab_size

    def logits_at(self, ids: Tensor) -> Tensor:
        self.single += ids.shape[1]
        return self._dense.logits_at(ids)

    def logsumexp(self) -> Tensor:
        self.whole += not self._normalised
        self._normalised = True
        return self._dense.logsumexp()

    def dense_rows(self, rows: slice) -> Tensor:
        self.whole += 1
        return self._dense.dense_rows(rows)

    def topk_ids(self, k: int) -> Tensor:
        self.whole += 1
        return self._dense.topk_ids(k)

    def read(self, *args: Any) -> Tensor:
        self.whole += 1
        return self._dense.read(*args)

    def weighted_sum(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.whole += 1
        return self._dense.weighted_sum(*args)

    def finite_where_ignored(self, ignored: Tensor) -> "_Counted":
        return self


class _CountedTeacher(_Counted):
    """Counts what it hands over, not what it computes for that."""

    def logprobs(self, ids: Tensor) -> Tensor:
        self.single += 1 if ids.dim() == 1 else ids.shape[1]
        return self._dense.logprobs(ids)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        ids, logprobs = self._dense.topk(k)
        self.single += 2 * ids.shape[1]
        return ids, logprobs


def head_rows_and_teacher_numbers(objective: Objective) -> dict[str, str]:
    """Return `head_rows` and `teacher_numbers`, what is read at each token, such as "K + 1"."""
    world = World.random(8, 1, seed=0)
    student = _Counted(world.student[world.states].requires_grad_())
    teacher = _CountedTeacher(world.teacher[world.states])
    objective(student, teacher, world.rollout, torch.ones(8, dtype=torch.float64))
    k = getattr(objective, "k", None) or getattr(objective, "baseline_k", None)
    return {"head_rows": _in_words(student, k), "teacher_numbers": _in_words(teacher, k)}


def _in_words(counted: _Counted, k: int | None) -> str:
    """Return the counts as a sum of multiples of K, V and 1."""
    times_k, single = divmod(counted.single, SMALL_K) if k == SMALL_K else (0, counted.single)
    parts = [(times_k, "K"), (counted.whole, "V")]
    words = [name if n == 1 else f"{n}{name}" for n, name in parts if n]
    return " + ".join(words + ([str(single)] if single else [])) or "0"
