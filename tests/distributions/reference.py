"""What a distribution should say, from the definitions on plain logits [N, V] in float64."""

import torch
from torch import Tensor


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    z = torch.einsum("nd,vd->nv", hidden, weight)
    z = z if bias is None else z + bias[None, :]
    z = z * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def probabilities(z: Tensor) -> Tensor:
    e = torch.exp(z - z.detach().max(dim=1, keepdim=True).values)
    return e / e.sum(dim=1, keepdim=True)


def _pick(table: Tensor, ids: Tensor) -> Tensor:
    """table[n, ids[n, k]] by plain indexing."""
    rows = torch.arange(len(table))
    if ids.dim() == 1:
        return table[rows, ids]
    return torch.stack([table[rows, ids[:, k]] for k in range(ids.shape[1])], dim=1)


def best_ids(z: Tensor, k: int) -> Tensor:
    """The ids of the k largest logits of each row by sorting, largest first."""
    order = [sorted(range(z.shape[1]), key=lambda v: -float(row[v])) for row in z.detach()]
    return torch.tensor([ids[:k] for ids in order], dtype=torch.long).reshape(len(z), -1)


def logprobs(z: Tensor, ids: Tensor) -> Tensor:
    return _pick(torch.log(probabilities(z)), ids)


def entropy(z: Tensor) -> Tensor:
    p = probabilities(z)
    return -torch.xlogy(p, p).sum(1)


def kl(z_p: Tensor, z_q: Tensor) -> Tensor:
    p, q = probabilities(z_p), probabilities(z_q)
    return (p * (torch.log(p) - torch.log(q))).sum(1)


def jensen_shannon(z: Tensor, t: Tensor, beta: float) -> Tensor:
    p, q = probabilities(z), probabilities(t)
    m = beta * q + (1 - beta) * p
    to_q = (q * (torch.log(q) - torch.log(m))).sum(1)
    to_p = (p * (torch.log(p) - torch.log(m))).sum(1)
    return beta * to_q + (1 - beta) * to_p


def pair_of_moments(z: Tensor, t: Tensor, extra: Tensor) -> Tensor:
    """Two values a position, for reads of [N, M]: E_p[t] and extra * logsumexp."""
    p = probabilities(z)
    return torch.stack([(p * t).sum(1), extra * torch.log(torch.exp(z).sum(1))], dim=1)


# name -> (call(student, teacher, ids, extra), definition(z, t, ids, extra)); ids [N, 3]
READS = {
    "logprobs_n": (lambda s, q, i, e: s.logprobs(i[:, 0]), lambda z, t, i, e: logprobs(z, i[:, 0])),
    "logprobs_nk": (lambda s, q, i, e: s.logprobs(i), lambda z, t, i, e: logprobs(z, i)),
    "logits_at": (lambda s, q, i, e: s.logits_at(i), lambda z, t, i, e: _pick(z, i)),
    "topk": (lambda s, q, i, e: s.topk(3)[1], lambda z, t, i, e: logprobs(z, best_ids(z, 3))),
    "entropy": (lambda s, q, i, e: s.entropy(), lambda z, t, i, e: entropy(z)),
    "logsumexp": (
        lambda s, q, i, e: s.logsumexp(),
        lambda z, t, i, e: torch.log(torch.exp(z).sum(1)),
    ),
    "reverse_kl": (lambda s, q, i, e: s.reverse_kl(q), lambda z, t, i, e: kl(z, t)),
    "forward_kl": (lambda s, q, i, e: s.forward_kl(q), lambda z, t, i, e: kl(t, z)),
    "jensen_shannon": (
        lambda s, q, i, e: s.jensen_shannon(q, 0.3),
        lambda z, t, i, e: jensen_shannon(z, t, 0.3),
    ),
    "read_two_values": (
        lambda s, q, i, e: s.read(pair_of_moments, q, e),
        lambda z, t, i, e: pair_of_moments(z, t, e),
    ),
    "weighted_sum": (
        lambda s, q, i, e: s.weighted_sum(kl, e, q)[0],
        lambda z, t, i, e: (e * kl(z, t)).sum(),
    ),
}
