"""Prompts: where they come from, how they become tokens, and in which order the ranks get them.

A row is a JSON object (a line of a `.jsonl` file, an item of a `.json` list), a line of a `.csv`
file with a header, or a row of a `.parquet` file or of a `datasets` dataset:

    {"prompt": "What is 2 + 3?", "task": "add", "answer": "5"}
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    {"prompt": "What is 2 + 3?", "teacher_prompt": "What is 2 + 3? Hint: 5", "completion": "5"}

Columns (others are ignored; null or, in CSV, an empty cell counts as missing):
    prompt: A string, rendered as one user turn of the tokenizer's chat template, or a conversation
        ending with a user or tool turn. Without a chat template the string is tokenised as it is.
    messages: Read when there is no `prompt`: a conversation whose last assistant turn is dropped.
    task: Name of the task the prompt belongs to. Default "default".
    answer: Reference answer for a verifier, a string or a number. Default none.
    teacher_prompt: What the teacher sees instead, a string or a conversation. Default the prompt.
    completion: A string, for training off-policy, in all rows of a split or in none. It counts as a
        finished answer: it is tokenised without special tokens and the tokenizer's EOS is appended,
        unless it ends with it already.
    truncated: true for a `completion` that was cut off, which gets no EOS. Default false.
"""

from opd_lightning.data.datamodule import OPDDataModule
from opd_lightning.data.loaders import EvalLoader, TrainLoader
from opd_lightning.data.rows import PromptRow
from opd_lightning.data.source import PromptSource

__all__ = ["EvalLoader", "OPDDataModule", "PromptRow", "PromptSource", "TrainLoader"]
