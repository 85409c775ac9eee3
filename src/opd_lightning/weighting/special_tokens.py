"""A mask for tokens that the two models spell differently."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from opd_lightning.distributions import Distribution, TokenDistribution
from opd_lightning.errors import ConfigError
from opd_lightning.records import Rollout
from opd_lightning.weighting.base import TokenWeight

# The paper's list for Qwen students of OpenThinker3: the opening of a thinking span and the end.
PAPER_TOKENS = ("<", "think", "<|im_end|>")


class SpecialTokenMask(TokenWeight):
    """Weight 0 for tokens on which the teacher cannot be trusted, 1 for all others.

    A student that writes "<" + "think" + ">" where the teacher knows "<th" + "ink" + ">" is scored
    -19 nats for a matter of spelling, and -59 for its end token (arXiv 2603.25562, figure 5). As in
    the paper's code a string is encoded by the student's tokenizer and each of its ids counts by
    itself; by default only the first occurrence in each row is masked.

    Args:
        tokens: Strings, ids, or both. Default: the paper's three.
        occurrence: "first": only the first of each id in each row; "all": every one.

    Raises:
        ConfigError: If the list is empty, a string encodes to nothing, or an id is negative.
    """

    def __init__(
        self,
        tokens: Sequence[str | int] = PAPER_TOKENS,
        occurrence: Literal["first", "all"] = "first",
    ) -> None:
        if not tokens:
            raise ConfigError(
                f"SpecialTokenMask has no tokens to mask; got {tokens!r}. Name some, or drop it."
            )
        if occurrence not in ("first", "all"):
            raise ConfigError(f"occurrence {occurrence!r} is not known. Known: first, all.")
        if negative := [t for t in tokens if isinstance(t, int) and t < 0]:
            raise ConfigError(f"token ids must be 0 or above; got {negative}.")
        self.tokens = tuple(tokens)
        self.occurrence = occurrence
        self._ids = None if any(isinstance(t, str) for t in tokens) else sorted(set(tokens))

    def setup(self, tokenizer: Any) -> None:
        """Encode the strings by the student's tokenizer, no special tokens added.

        Raises:
            ConfigError: If a string encodes to no token.
        """
        ids = set()
        for token in self.tokens:
            encoded = [token] if isinstance(token, int) else _encode(tokenizer, token)
            ids.update(encoded)
        self._ids = sorted(ids)

    def weight(self, rollout: Rollout, student: TokenDistribution, teacher: Distribution) -> Tensor:
        """Return 0 for masked tokens and 1 for all others, [N].

        Raises:
            ConfigError: If strings were given and `setup` has not seen a tokenizer.
        """
        if self._ids is None:
            raise ConfigError(
                f"SpecialTokenMask({list(self.tokens)}) has strings and no tokenizer. Call "
                "setup(tokenizer) first (OPDModule does), or give token ids."
            )
        completion = rollout.completion_mask
        masked = torch.zeros_like(completion)
        for token_id in self._ids:
            found = (rollout.input_ids == token_id) & completion
            masked |= found & (found.cumsum(1) == 1) if self.occurrence == "first" else found
        return (~masked[completion]).to(torch.get_default_dtype())


def _encode(tokenizer: Any, token: str) -> list[int]:
    ids = tokenizer.encode(token, add_special_tokens=False)
    if not ids:
        raise ConfigError(
            f"the special token {token!r} encodes to nothing by the student's tokenizer "
            f"({tokenizer.name_or_path}). Take it out of SpecialTokenMask, or give its id."
        )
    return ids
