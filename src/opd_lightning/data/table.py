"""The encoded prompts of a split as a torch dataset, and how they become a `PromptBatch`."""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from opd_lightning.data.encoding import EncodedPrompt
from opd_lightning.records import PromptBatch, Rollout, pad_right


class PromptTable(Dataset[EncodedPrompt]):
    """The encoded prompts of one split.

    Whether batches carry teacher prompts and a rollout is decided by the whole split: all batches,
    an empty one too, have the same fields, so ranks never disagree on what to compute.

    Args:
        prompts: The encoded rows, at least one, with completions for all or none.
    """

    def __init__(self, prompts: Sequence[EncodedPrompt]) -> None:
        self.prompts = list(prompts)
        self.has_teacher_prompts = any(p.teacher_prompt_ids is not None for p in self.prompts)
        self.has_completions = self.prompts[0].completion_ids is not None

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, item: int) -> EncodedPrompt:
        return self.prompts[item]

    def collate(self, prompts: Sequence[EncodedPrompt]) -> PromptBatch:
        """Return the batch of P >= 0 prompts; for P = 0 its tensors are of shape [0, 0] and [0]."""
        input_ids, attention_mask = pad_right([p.prompt_ids for p in prompts])
        batch = PromptBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            task=[p.task for p in prompts],
            index=torch.tensor([p.index for p in prompts], dtype=torch.long),
            answer=[p.answer for p in prompts],
        )
        if self.has_teacher_prompts:
            batch.teacher_input_ids, batch.teacher_attention_mask = pad_right(
                [
                    p.prompt_ids if p.teacher_prompt_ids is None else p.teacher_prompt_ids
                    for p in prompts
                ]
            )
        if self.has_completions:
            batch.rollout = Rollout.from_completions(
                batch,
                completions=[p.completion_ids for p in prompts],
                truncated=[p.truncated for p in prompts],
            )
        return batch
