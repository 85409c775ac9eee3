"""The inputs of the battery: a rollout with an empty row, students and teachers in every form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution, TopKDistribution
from opd_lightning.objectives import Objective, ObjectiveOutput
from opd_lightning.records import Rollout
from tests.objectives.reference import CONFIGURED, Case

V, D = 12, 5
ROW = torch.tensor([0, 0, 0, 1, 3, 3, 3, 3, 4, 4])  # row 2 is empty
N = len(ROW)


@dataclass
class Inputs:
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher_logits: Tensor
    rollout: Rollout

    @property
    def student_logits(self) -> Tensor:
        return self.hidden @ self.weight.T + self.bias

    @property
    def teacher(self) -> TokenDistribution:
        return TokenDistribution.from_logits(self.teacher_logits)


def inputs(row: Tensor = ROW, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    n = len(row)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight, bias, t = normal(n, D), 0.6 * normal(V, D), normal(V), 1.5 * normal(n, V)
    ids = torch.randint(V, (n,), generator=g)
    now = (hidden @ weight.T + bias).log_softmax(1)[torch.arange(n), ids]
    rollout = Rollout.from_flat(
        ids,
        row,
        old_logprobs=(now + 0.5 * normal(n)).to(dtype),
        sampling_logprobs=(now + 0.5 * normal(n)).to(dtype),
        reward=normal(int(row[-1]) + 1 if n else 0).to(dtype),
    )
    return Inputs(*[x.to(dtype) for x in (hidden, weight, bias, t)], rollout)


def served(teacher_logits: Tensor, rollout: Rollout, k: int) -> TopKDistribution:
    """What a served teacher returns for these logits, made here by sorting."""
    logprobs = teacher_logits - teacher_logits.exp().sum(1, keepdim=True).log()
    values, ids = logprobs.sort(dim=1, descending=True)
    sampled = logprobs[torch.arange(len(logprobs)), rollout.token_ids]
    return TopKDistribution(ids[:, :k], values[:, :k], sampled)


def gradient_on_logits(
    objective: Objective, z: Tensor, teacher: object, rollout: Rollout, weights: Tensor
) -> tuple[ObjectiveOutput, Tensor]:
    """Return the output and d loss / d z for the dense student of logits z."""
    leaf = z.detach().clone().requires_grad_()
    output = objective(TokenDistribution.from_logits(leaf), teacher, rollout, weights)
    if not output.loss.requires_grad:
        return output, torch.zeros_like(leaf)
    return output, torch.autograd.grad(output.loss, leaf)[0]


def expected(name: str, z: Tensor, t: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Return losses [N] and gradients on the logits [N, V] by the closed forms, token by token."""
    reference = CONFIGURED[name][2]
    p, q = z.exp() / z.exp().sum(1, keepdim=True), t.exp() / t.exp().sum(1, keepdim=True)
    ids, row = rollout.token_ids.tolist(), rollout.row.tolist()
    old = None if rollout.old_logprobs is None else rollout.flat_old_logprobs.tolist()
    clipped = CONFIGURED[name][1].get("clip_ratio") is not None

    def cost(n: int) -> float:
        base = old[n] if clipped and old is not None else float(p[n, ids[n]].log())
        return base - float(q[n, ids[n]].log())

    losses, gradients = [], []
    for n in range(len(ids)):
        later = [cost(m) for m in range(n + 1, len(ids)) if row[m] == row[n]]
        case = Case(p[n], q[n], ids[n], None if old is None else old[n], later)
        case.length = row.count(row[n])
        if rollout.sampling_logprobs is not None:
            case.sampling = float(rollout.flat_sampling_logprobs[n])
        if rollout.reward is not None:
            case.reward = float(rollout.reward[row[n]])
        loss, gradient = reference(case)
        losses.append(loss)
        gradients.append(gradient)
    return torch.stack(losses), torch.stack(gradients)


WEIGHTS = {
    "ones": torch.ones(N, dtype=torch.float64),
    "zeros": torch.zeros(N, dtype=torch.float64),
    "some_zero": torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1, 0], dtype=torch.float64),
    "any": torch.tensor([0.1, 0.5, 0, 1, 2, 0.3, 0.7, 0, 0.25, 3], dtype=torch.float64),
}
