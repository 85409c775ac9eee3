"""A teacher in this process."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd_lightning.distributions import TokenDistribution
from opd_lightning.policy import CausalPolicy, DType, PolicySpec
from opd_lightning.records import Rollout
from opd_lightning.sharding import Sharding, load_policy
from opd_lightning.teachers.base import Teacher

T = TypeVar("T")


class LocalTeacher(Teacher):
    """A Hugging Face causal language model held beside the student, frozen.

    Args:
        path: A Hugging Face folder, or a hub name.
        dtype: Of the weights, any: the teacher is never trained.
        attn_implementation: transformers' name, such as "sdpa" or "flash_attention_2".
        compile: Run the decoder through torch.compile.
        trust_remote_code: Whether the model's own Python files may run.
        revision: Branch, tag or commit of a hub name.
        packed: Whether rows are read behind one another without padding; see `CausalPolicy`.
        allow_pickle: Whether weights may be read from `*.bin` files; see `PolicySpec`.
    """

    provides = "full"

    def __init__(
        self,
        path: str,
        dtype: DType = "float32",
        attn_implementation: str | None = None,
        compile: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
        packed: bool | None = None,
        allow_pickle: bool = False,
    ) -> None:
        self.spec = PolicySpec(
            path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            compile=compile,
            trust_remote_code=trust_remote_code,
            revision=revision,
            packed=packed,
            allow_pickle=allow_pickle,
        )
        self.policy: CausalPolicy | None = None

    def check(self) -> None:
        """Refuse a folder that holds no model; see `PolicySpec.check`."""
        self.spec.check()

    def load_tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the teacher's folder."""
        return self.spec.load_tokenizer()

    def vocab_size(self) -> int:
        """Return the vocabulary size of the teacher's config."""
        return self.spec.load_config().get_text_config().vocab_size

    def load(self, device: torch.device, vocab_size: int, sharding: Sharding | None = None) -> None:
        """Load the weights onto `device` and freeze them; a second call only moves them."""
        if self.policy is None:
            self.policy = load_policy(
                self.spec, device, sharding, vocab_size=vocab_size, frozen=True
            )
        if sharding is None:
            self.policy.to(device)

    def read(
        self, rollout: Rollout, reader: Callable[[TokenDistribution], T], temperature: float = 1.0
    ) -> T:
        """Return `reader(distribution)`; its own prompt is used where the rollout has one."""
        ids, attention_mask, completion_mask = rollout.seen_by_teacher()
        view = replace(
            rollout,
            input_ids=ids,
            attention_mask=attention_mask,
            completion_mask=completion_mask,
        )
        return self.policy.read(view, reader, temperature)
