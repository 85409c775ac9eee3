"""Small languages in which every completion can be listed, so that an expectation is a sum.

V tokens, T tokens a completion, R = V^T completions, S = V + 1 states (the previous token, or the
start), N = R T tokens. Everything is float64.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_lightning.distributions import TokenDistribution
from opd_lightning.objectives import Objective
from opd_lightning.records import Rollout


@dataclass(frozen=True)
class World:
    """A student and a teacher that look at the previous token only, and all they can say.

    Attributes:
        student: [S, V] logits.
        teacher: [S, V] logits.
        sequences: [R, T] every completion.
        reward: [R] an outcome reward of each.
    """

    student: Tensor
    teacher: Tensor
    sequences: Tensor
    reward: Tensor

    @classmethod
    def random(cls, vocab_size: int, horizon: int, seed: int) -> "World":
        """Draw logits 1.5 N(0, 1) and rewards N(0, 1)."""
        g = torch.Generator().manual_seed(seed)
        tokens = torch.arange(vocab_size)
        sequences = torch.cartesian_prod(*[tokens] * horizon).view(-1, horizon)
        logits = 1.5 * torch.randn(2, vocab_size + 1, vocab_size, generator=g, dtype=torch.float64)
        reward = torch.randn(len(sequences), generator=g, dtype=torch.float64)
        return cls(logits[0], logits[1], sequences, reward)

    def with_student(self, logits: Tensor) -> "World":
        """Return the same world with other student logits [S, V]."""
        return replace(self, student=logits)

    @property
    def states(self) -> Tensor:
        """[N] the state in which each token is drawn; V is the start."""
        start = torch.full_like(self.sequences[:, :1], self.student.shape[1])
        return torch.cat([start, self.sequences[:, :-1]], dim=1).flatten()

    def sequence_logprobs(self, logits: Tensor) -> Tensor:
        """Return the log-probability [R] of each completion under the logits [S, V]."""
        table = logits.log_softmax(-1)
        return table[self.states, self.sequences.flatten()].view(self.sequences.shape).sum(1)

    @property
    def probabilities(self) -> Tensor:
        """[R] the student's probability of each completion."""
        return self.sequence_logprobs(self.student).exp()

    @property
    def occupancy(self) -> Tensor:
        """[S] the expected number of visits of each state in one completion."""
        visits = self.probabilities.repeat_interleave(self.sequences.shape[1])
        return torch.zeros(len(self.student), dtype=visits.dtype).index_add(0, self.states, visits)

    @property
    def rollout(self) -> Rollout:
        """All completions, as if this student had just drawn each of them once."""
        ids, states = self.sequences.flatten(), self.states
        return Rollout.from_flat(
            ids,
            torch.arange(len(self.sequences)).repeat_interleave(self.sequences.shape[1]),
            sampling_logprobs=self.student.log_softmax(-1)[states, ids],
            reward=self.reward,
        )

    def sample_gradients(self, objective: Objective) -> Tensor:
        """Return the gradient [R, S, V] on the student's logits of each completion by itself.

        A completion's token losses are summed.
        """
        states = self.states
        leaf = self.student[states].requires_grad_()
        student = TokenDistribution.from_logits(leaf)
        teacher = TokenDistribution.from_logits(self.teacher[states])
        output = objective(student, teacher, self.rollout, torch.ones(len(leaf)).to(leaf))
        (on_tokens,) = torch.autograd.grad(output.loss, leaf)
        rows = torch.arange(len(self.sequences)).repeat_interleave(self.sequences.shape[1])
        gradients = torch.zeros(len(self.sequences), *self.student.shape, dtype=leaf.dtype)
        return gradients.index_put((rows, states), on_tokens, accumulate=True)
