"""A weight that keeps the tokens where a model hesitates."""

from typing import Literal

import torch
from torch import Tensor

from opd_lightning.distributions import Distribution, TokenDistribution
from opd_lightning.errors import ConfigError
from opd_lightning.records import Rollout
from opd_lightning.weighting.base import TokenWeight, by_row


class EntropyTopRatio(TokenWeight):
    """Weight 1 for the share of each row's tokens of highest entropy, 0 for the others.

    Of the n completion tokens of a row those count whose entropy is at least the m-th highest,
    m = max(1, floor(ratio * n)); ties at that value all count. Source: the entropy mask in the code
    of arXiv 2603.25562 (its example: ratio 0.2), which the paper does not report on.

    A NaN counts as the highest entropy, so that such a token stays and the loss shows it. Costs a
    read of the whole vocabulary of the model that is asked.

    Args:
        ratio: Share of the tokens, above 0 and at most 1.
        of: Whose entropy.

    Raises:
        ConfigError: If `ratio` is not within (0, 1] or `of` is not one of the two words.
    """

    def __init__(self, ratio: float = 0.2, of: Literal["student", "teacher"] = "student") -> None:
        if not 0 < ratio <= 1:
            raise ConfigError(
                f"ratio must be above 0 and at most 1; got {ratio}. It is the share of a row's "
                "tokens that count, 0.2 in the paper's code."
            )
        if of not in ("student", "teacher"):
            raise ConfigError(f"of {of!r} is not known. Known: student, teacher.")
        self.ratio = ratio
        self.of = of

    @torch.no_grad()
    def weight(self, rollout: Rollout, student: TokenDistribution, teacher: Distribution) -> Tensor:
        """Return 1 for the tokens of highest entropy and 0 for the others, [N].

        Raises:
            ConfigError: If `of` is "teacher" and the teacher does not give its whole vocabulary.
        """
        asked = student if self.of == "student" else teacher
        if not isinstance(asked, TokenDistribution):
            raise ConfigError(
                "EntropyTopRatio(of='teacher') needs the teacher's whole vocabulary; this teacher "
                f"gives {asked.provides!r}. Take of='student' or a local teacher."
            )
        entropy = asked.entropy().nan_to_num(nan=torch.inf)
        highest_first = by_row(entropy, rollout, fill=-torch.inf).sort(dim=1, descending=True)
        # 0.21 * 300 is 63 in float64 and 62.99 in fp32; on the CPU, as MPS has no float64
        shares = (rollout.completion_lengths.cpu().double() * self.ratio).floor()
        counts = shares.long().clamp(min=1).to(entropy.device)
        threshold = highest_first.values[rollout.row, counts[rollout.row] - 1]
        return (entropy >= threshold).to(entropy.dtype)
