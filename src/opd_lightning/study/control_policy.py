"""The policies, trajectories and gradients of `opd study control`, many runs at once.

M runs (a seed and a gamma each), B trajectories of T steps, N = T B, H hidden units. A run's
numbers never meet another's: each parameter has a leading dimension M, and losses are summed over
it, so that a gradient is the one the run would have alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TASKS = ("left", "right")
STARTS, GOALS = (2.0, -2.0), (-3.0, 3.0)
STEPS = 20
HIDDEN = 64
TEACHER_STD = 0.3
MICRO_BATCHES = 8
BINS, FARTHEST = 64, 8.0


class Policies:
    """M Gaussian policies of 4546 parameters each: 3 inputs, twice 64 hidden units, 2 outputs.

    The inputs are the task as -1 or 1, the position / 5 and the step / 20. The outputs o give the
    mean o_0 and the log standard deviation -0.75 + 1.25 tanh(o_1) of the next move.

    Args:
        seeds: Of the initial weights, which are those of torch's own linear layers after
            `torch.manual_seed(seed)`; the global generator is left as it was.
        copies: Runs of each seed, side by side; M = seeds x copies.
        dtype: Of the parameters; they are drawn in float32.

    Attributes:
        parameters: Weights [M, in, out] and biases [M, 1, out] of the layers in turn.
    """

    def __init__(
        self, seeds: Sequence[int], copies: int, dtype: torch.dtype = torch.float32
    ) -> None:
        drawn = [_initial(seed) for seed in seeds for _ in range(copies)]
        self.parameters = [
            torch.stack(alike).to(dtype).requires_grad_() for alike in zip(*drawn, strict=True)
        ]

    def hidden(self, inputs: Tensor) -> Tensor:
        """Return the activations before the output layer, [M, N, H], of inputs [M, N, 3]."""
        w1, b1, w2, b2 = self.parameters[:4]
        return torch.baddbmm(b2, torch.baddbmm(b1, inputs, w1).tanh(), w2).tanh()

    def outputs(self, hidden: Tensor) -> Tensor:
        """Return the two outputs, [M, N, 2], of hidden activations [M, N, H]."""
        w3, b3 = self.parameters[4:]
        return torch.baddbmm(b3, hidden, w3)


def _initial(seed: int) -> list[Tensor]:
    """Return weights [in, out] and biases [1, out] of three linear layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(3, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 2)]
    return [p.detach() for layer in layers for p in (layer.weight.T, layer.bias[None])]


def mean_and_log_std(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log standard deviation of the next move, each [...], of [..., 2]."""
    return outputs[..., 0], -0.75 + 1.25 * torch.tanh(outputs[..., 1])


def log_density(moves: Tensor, mean: Tensor, log_std: Tensor | float) -> Tensor:
    """Return the log density of a normal distribution, in nats."""
    std = log_std.exp() if isinstance(log_std, Tensor) else math.exp(log_std)
    return -0.5 * ((moves - mean) / std).square() - log_std - 0.5 * math.log(2 * math.pi)


def teacher_mean(positions: Tensor, task: int) -> Tensor:
    """Return the teacher's mean move: 0.3 of the way to the goal, at most 1."""
    return (0.3 * (GOALS[task] - positions)).clamp(-1, 1)


class Noise:
    """Standard normal numbers: one stream a seed, the same for all copies of it.

    Args:
        seeds: One generator each.
        copies: As in `Policies`.
    """

    def __init__(self, seeds: Sequence[int], copies: int) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._copies = copies

    def draw(self, count: int) -> Tensor:
        """Return the next [M, count] float32 numbers."""
        drawn = torch.stack([torch.randn(count, generator=g) for g in self._generators])
        return drawn.repeat_interleave(self._copies, 0)


@dataclass(frozen=True)
class Trajectories:
    """What M policies did in one task.

    Attributes:
        inputs: [M, T, B, 3] of the policies.
        moves: [M, T, B].
        costs: [M, T, B], log pi(move) - log q(move) in nats.
        positions: [M, T + 1, B], the start first.
    """

    inputs: Tensor
    moves: Tensor
    costs: Tensor
    positions: Tensor


@torch.no_grad()
def roll_out(policies: Policies, task: int, count: int, noise: Noise) -> Trajectories:
    """Follow each policy for 20 steps from the task's start, `count` times.

    Args:
        policies: M of them.
        task: 0 left, 1 right.
        count: Trajectories of each, B.
        noise: Drawn once a step, [M, B].
    """
    like = policies.parameters[0]
    position = like.new_full((len(like), count), STARTS[task])
    inputs, moves, costs, positions = [], [], [], [position]
    for t in range(STEPS):
        side, time = torch.full_like(position, 2 * task - 1), torch.full_like(position, t / STEPS)
        seen = torch.stack([side, position / 5, time], dim=-1)
        mean, log_std = mean_and_log_std(policies.outputs(policies.hidden(seen)))
        move = mean + log_std.exp() * noise.draw(count).to(position)
        teacher = log_density(move, teacher_mean(position, task), math.log(TEACHER_STD))
        costs.append(log_density(move, mean, log_std) - teacher)
        position = position + move
        inputs.append(seen)
        moves.append(move)
        positions.append(position)
    stacked = [torch.stack(parts, dim=1) for parts in (inputs, moves, costs, positions)]
    return Trajectories(*stacked)


def returns(costs: Tensor, gammas: Tensor) -> Tensor:
    """Return G_t = cost_t + gamma G_{t+1}, [M, T, B], each run with its own gamma of [M]."""
    later = torch.zeros_like(costs[:, 0])
    backwards = []
    for cost in costs.flip(1).unbind(1):
        later = cost + gammas[:, None] * later
        backwards.append(later)
    return torch.stack(backwards[::-1], dim=1)


def backward(policies: Policies, seen: Trajectories, gammas: Tensor) -> tuple[Tensor, Tensor]:
    """Put each run's gradient into its parameters.

    A run's loss is the mean over its trajectories of sum_t G_t log pi(move_t), G_t detached.

    Returns:
        Its gradient on the two outputs, [M, N, 2], and the hidden activations they are made of,
        [M, N, H]: what `micro_batch_variance` takes.
    """
    hidden = policies.hidden(seen.inputs.flatten(1, 2))
    outputs = policies.outputs(hidden)
    outputs.retain_grad()
    moves, weights = seen.moves.flatten(1), returns(seen.costs, gammas).flatten(1)
    log_pi = log_density(moves, *mean_and_log_std(outputs))
    for parameter in policies.parameters:
        parameter.grad = None
    ((weights * log_pi).sum() / seen.moves.shape[2]).backward()
    return outputs.grad, hidden.detach()


def micro_batch_variance(on_outputs: Tensor, hidden: Tensor) -> Tensor:
    """Return how each run's gradient on the output layer varies over eighths of its trajectories.

    Args:
        on_outputs: As `backward` returns it, [M, N, 2].
        hidden: The same, [M, N, H].

    Returns:
        (1/8) sum_m |g_m - mean g|^2, [M] float64, with g_m the gradient of the loss on the m-th
        eighth.
    """
    # the gradient on a layer's parameters is that on its outputs times its inputs, and 1
    inputs = torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=-1)
    on_outputs, inputs = [
        x.double().view(len(hidden), STEPS, MICRO_BATCHES, -1, x.shape[-1])
        for x in (on_outputs, inputs)
    ]
    products = torch.einsum("mtkbo,mtkbh->mkoh", on_outputs, inputs)
    each = MICRO_BATCHES * products.flatten(2)
    return (each - each.mean(1, keepdim=True)).square().sum(2).mean(1)


def visits(positions: Tensor) -> Tensor:
    """Count positions [M, T + 1, B] in 64 bins of [-8, 8] at each step, [M, T + 1, 64].

    What lies outside, or is not a number, is in no bin.
    """
    at = ((positions + FARTHEST) * (BINS / (2 * FARTHEST))).floor()
    inside = (at >= 0) & (at < BINS)
    counts = torch.zeros(*positions.shape[:2], BINS, dtype=torch.long)
    return counts.scatter_add_(2, torch.where(inside, at, 0).long(), inside.long())
