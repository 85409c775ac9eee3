"""What is recorded of every completion token, over micro-batches and ranks, for diagnostics.

N completion tokens, B rows, V vocabulary, K ids of a support, C positions of one chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from opd_lightning.distributions import Distribution, TokenDistribution
from opd_lightning.distributions.rows import entropy_of_logprobs
from opd_lightning.records import Rollout

COLUMNS = (
    "token_id",
    "position",
    "counts",  # 1 where the token's weight is not 0
    "repeated",  # 1 where the 4-gram that ends here stood in this completion before
    "student_logprob",
    "teacher_logprob",
    "sampling_logprob",
    "student_entropy",
    "teacher_entropy",
    "overlap",
    "overlap_student_mass",
    "overlap_teacher_mass",
    "student_support_mass",
    "teacher_support_mass",
    "in_support",
)
ROW_COLUMNS = ("length", "truncated", "repeated_ngrams", "longest_loop")
NGRAM = 4
LONGEST_PERIOD = 32


@dataclass
class TokenTable:
    """Measures of the N completion tokens of a rollout and of its B rows, on the CPU.

    Attributes:
        tokens: [N, len(COLUMNS)]; NaN where a number is not known (a teacher of top-K only).
        rows: [B, len(ROW_COLUMNS)].
    """

    tokens: Tensor
    rows: Tensor

    def __getitem__(self, column: str) -> Tensor:
        """Return one column of the tokens that count, [<= N]; `token_id` and `position` int64."""
        values = self.tokens[self.tokens[:, COLUMNS.index("counts")] > 0]
        values = values[:, COLUMNS.index(column)]
        return values.long() if column in ("token_id", "position") else values

    def row(self, column: str) -> Tensor:
        """Return one column of the rows, [B]."""
        return self.rows[:, ROW_COLUMNS.index(column)]

    @property
    def advantage(self) -> Tensor:
        """log q(y) - log pi(y) of the tokens that count, nats."""
        return self["teacher_logprob"] - self["student_logprob"]

    @property
    def masked_fraction(self) -> float:
        """Share of the completion tokens whose weight is 0."""
        counts = self.tokens[:, COLUMNS.index("counts")]
        return float((counts == 0).float().mean()) if len(counts) else 0.0


class TokenRecords(Metric):
    """Collects `TokenTable`s; `compute` returns one table of all ranks' tokens and rows.

    Each rank adds one at least, maybe of no tokens: the others wait for what it has.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("tokens", [], dist_reduce_fx="cat")
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, table: TokenTable) -> None:
        """Add the tokens and rows of a micro-batch."""
        self.tokens.append(table.tokens)
        self.rows.append(table.rows)

    def compute(self) -> TokenTable:
        """Return all that was added, on all ranks, on the CPU."""
        return TokenTable(*(_joined(state).cpu() for state in (self.tokens, self.rows)))


def _joined(state: Tensor | list[Tensor]) -> Tensor:
    return torch.cat(state) if isinstance(state, list) else state


@torch.no_grad()
def token_table(
    student: TokenDistribution, teacher: Distribution, rollout: Rollout, keep: Tensor, k: int
) -> TokenTable:
    """Measure every completion token in one pass over both heads.

    Args:
        student: N positions.
        teacher: The same positions; one that gives its top-K only leaves its entropy unknown.
        rollout: Whose tokens they are.
        keep: [N] bool, which tokens count.
        k: Size of both supports; at most what the teacher gives.
    """
    ids = rollout.token_ids
    if isinstance(teacher, TokenDistribution):
        k = min(k, student.vocab_size)

        def measures(student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
            log_q = teacher.log_softmax(-1)
            best = log_q.topk(k)
            sampled = log_q.gather(1, ids[:, None])[:, 0]
            entropy = entropy_of_logprobs(log_q)
            return _measures(student, ids, best.indices, best.values, sampled, entropy)

        values = student.read(measures, teacher, ids)
    else:
        support, logprobs = teacher.topk(min(k, teacher.ids.shape[1]))
        sampled = teacher.logprobs(ids)
        values = student.read(
            _measures, ids, support, logprobs, sampled, torch.full_like(sampled, torch.nan)
        )
    sampling = rollout.flat_sampling_logprobs
    known = torch.full_like(values[:, 0], torch.nan) if sampling is None else sampling
    repeated = repeated_ngrams(ids, rollout.row)
    first = [ids, rollout.position, keep, repeated, values[:, 0], values[:, 1], known]
    tokens = torch.cat([torch.stack([f.float() for f in first], 1), values[:, 2:].float()], 1)
    lengths = rollout.completion_lengths
    share = torch.zeros(len(lengths), device=ids.device).index_add(0, rollout.row, repeated.float())
    grams = (lengths - NGRAM + 1).clamp(min=1)
    loops = longest_loops(ids, rollout.row, len(lengths))
    rows = torch.stack(
        [lengths.float(), rollout.truncated.float(), share / grams, loops.float()], 1
    )
    return TokenTable(tokens.cpu(), rows.cpu())


def _measures(
    student: Tensor,
    ids: Tensor,
    support: Tensor,
    logprobs: Tensor,
    sampled: Tensor,
    entropy: Tensor,
) -> Tensor:
    """Return the columns from `student_logprob` on, without the sampling one, [C, 10].

    Args:
        student: Logits [C, V].
        ids: Sampled tokens [C].
        support: The teacher's top-K ids [C, K], and their log-probabilities.
        logprobs: [C, K].
        sampled: The teacher's log-probability of the sampled token [C].
        entropy: The teacher's [C].
    """
    log_p = student.log_softmax(-1)
    own = log_p.topk(support.shape[1]).indices
    both = (support[:, :, None] == own[:, None, :]).any(-1)
    p, q = log_p.gather(1, support).exp(), logprobs.exp()
    columns = [
        log_p.gather(1, ids[:, None])[:, 0],
        sampled,
        entropy_of_logprobs(log_p),
        entropy,
        both.to(p.dtype).mean(1),
        (p * both).sum(1),
        (q * both).sum(1),
        p.sum(1),
        q.sum(1),
        (support == ids[:, None]).any(1),
    ]
    return torch.stack([column.to(p.dtype) for column in columns], dim=-1)


def repeated_ngrams(ids: Tensor, row: Tensor) -> Tensor:
    """Return [N] bool: whether the 4-gram that ends at a token stood in its row before.

    Args:
        ids: [N] tokens, row by row.
        row: [N] their rows.
    """
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    if len(ids) < NGRAM:
        return repeated
    grams, rows = ids.unfold(0, NGRAM, 1), row.unfold(0, NGRAM, 1)
    whole = rows[:, 0] == rows[:, -1]
    grams = torch.cat([rows[whole, :1], grams[whole]], dim=1)
    _, kinds = grams.unique(dim=0, return_inverse=True)
    order = torch.arange(len(kinds), device=ids.device)
    first = torch.full_like(kinds, len(kinds)).scatter_reduce(0, kinds, order, "amin")
    repeated[whole.nonzero()[:, 0] + NGRAM - 1] = first[kinds] < order
    return repeated


def longest_loops(ids: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Return the tokens of each row's longest stretch that repeats itself, [num_rows].

    A stretch has a period of at most 32 tokens and holds it twice at least; 0 where there is none.
    """
    longest = torch.zeros(num_rows, dtype=torch.long, device=ids.device)
    for period in range(1, min(LONGEST_PERIOD, len(ids) - 1) + 1):
        same = (ids[period:] == ids[:-period]) & (row[period:] == row[:-period])
        # how many in a row are the same as a period before: counted from the last that is not
        place = torch.arange(1, len(same) + 1, device=ids.device)
        run = place - torch.where(same, 0, place).cummax(0).values
        stretch = torch.where(run >= period, run + period, 0)
        longest.scatter_reduce_(0, row[period:], stretch, "amax")
    return longest
