"""`OPDDataModule`: prompts for training and evaluation, validated before any model is loaded."""

import warnings
from collections.abc import Iterable
from typing import Any, Literal, get_args

import lightning as L
from transformers import PreTrainedTokenizerBase

from opd_lightning.data.encoding import Overlong, PromptEncoder
from opd_lightning.data.loaders import EvalLoader, TrainLoader
from opd_lightning.data.rounds import EvalRounds, TrainRounds
from opd_lightning.data.source import PromptSource
from opd_lightning.data.table import PromptTable
from opd_lightning.errors import ConfigError, nearest

Split = Literal["train", "val", "test", "predict"]

_SPLITS_OF_STAGE: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
    None: get_args(Split),
}


class OPDDataModule(L.LightningDataModule):
    """Prompts from files or `datasets`; batches are `PromptBatch`, one a round.

    The row format is described in `opd_lightning.data`. Everything is read, checked and tokenised
    in `setup`; the order of training prompts is a function of (seed, position) alone, so a run
    resumed in the middle of an epoch, or with another number of ranks, sees the rounds it would
    have seen. Training rounds are always full: what an epoch has left over sits it out. Evaluation
    takes every prompt once, in file order; a rank may get an empty batch at the end.

    Example:
        >>> data = OPDDataModule(train="train.jsonl", prompts_per_step=64)  # doctest: +SKIP
        >>> trainer.fit(module, datamodule=data)  # doctest: +SKIP

    Args:
        train: Path of a `.jsonl`, `.json`, `.csv` or `.parquet` file, or a dataset for
            `datasets.load_dataset` as `NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`, or
            `task:NAME:NUMBER:SEED` for prompts of a task; None for no training.
        val: Same, for validation; None for none.
        test: Same, for testing; default `val`.
        predict: Same, for prediction; default `test`, then `val`.
        prompts_per_step: Prompts of one round over all ranks, a multiple of their number.
        eval_prompts_per_step: Same for evaluation, any number; default `prompts_per_step`.
        seed: Chooses the order of the training prompts.
        shuffle: False for training in file order.
        max_prompt_tokens: Longest prompt in tokens, chat template included.
        overlong: What becomes of a longer prompt: "drop" it, "error", or "truncate" (both ends are
            kept, half of the limit each; the middle is cut out).
        chat_template_kwargs: Passed to the chat template, for example `{"enable_thinking": false}`.
        system_prompt: System turn for prompts (the teacher's too) that have none of their own.
        prompt_column: Column that holds the prompt; default `prompt`, else `messages`.
        num_workers: Processes that build batches; the prompts are tokenised already, so 0 is fast.

    Attributes:
        tokenizer: The student's tokenizer; when it is None, `setup` takes that of the
            LightningModule.

    Raises:
        ConfigError: If a number is too small or `overlong` is not known.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        prompts_per_step: int = 8,
        eval_prompts_per_step: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        max_prompt_tokens: int = 2048,
        overlong: Overlong = "drop",
        chat_template_kwargs: dict[str, Any] | None = None,
        system_prompt: str | None = None,
        prompt_column: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if eval_prompts_per_step is None:
            eval_prompts_per_step = prompts_per_step
        _check_at_least(1, "prompts_per_step", prompts_per_step)
        _check_at_least(1, "eval_prompts_per_step", eval_prompts_per_step)
        _check_at_least(1, "max_prompt_tokens", max_prompt_tokens)
        _check_at_least(0, "num_workers", num_workers)
        if overlong not in (known := get_args(Overlong)):
            raise ConfigError(
                f"data.overlong is {overlong!r}.{nearest(str(overlong), known)} Known: "
                f"{', '.join(known)}."
            )
        self.sources: dict[Split, str | None] = {
            "train": train,
            "val": val,
            "test": test or val,
            "predict": predict or test or val,
        }
        self.prompts_per_step = prompts_per_step
        self.eval_prompts_per_step = eval_prompts_per_step
        self.seed = seed
        self.shuffle = shuffle
        self.max_prompt_tokens = max_prompt_tokens
        self.overlong: Overlong = overlong
        self.chat_template_kwargs = chat_template_kwargs
        self.system_prompt = system_prompt
        self.prompt_column = prompt_column
        self.num_workers = num_workers
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.tables: dict[Split, PromptTable] = {}
        self._train_loader: TrainLoader | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read, check and tokenise the splits of `stage`: "fit", "validate", "test", "predict" or
        None (all).

        The tokenizer and the context limit are the LightningModule's attributes `tokenizer` and
        `context_length` (int or None); it must have them before its own `setup` and
        `configure_model`.

        Raises:
            ConfigError: If no tokenizer is known, the stage's data is not given, the Trainer's
                options do not fit, or `prepare` refuses the data.
        """
        module = self.trainer.lightning_module if self.trainer is not None else None
        tokenizer = (
            self.tokenizer if self.tokenizer is not None else getattr(module, "tokenizer", None)
        )
        if tokenizer is None:
            raise ConfigError(
                f"OPDDataModule has no tokenizer: {type(module).__name__} has no attribute "
                "'tokenizer'. Set datamodule.tokenizer, or give the LightningModule one in its "
                "__init__."
            )
        if self.trainer is not None and self.trainer.overfit_batches:
            raise ConfigError(
                f"trainer.overfit_batches={self.trainer.overfit_batches} has no effect on rounds. "
                "Train on a file with few prompts instead."
            )
        splits = _SPLITS_OF_STAGE[stage]
        if stage is not None and self.sources[splits[0]] is None:
            raise ConfigError(
                f"data.{splits[0]} is not given, but the stage is {stage!r}. Give a file or a "
                "dataset name."
            )
        self.prepare(tokenizer, splits, getattr(module, "context_length", None))

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        splits: Iterable[Split] = get_args(Split),
        context_length: int | None = None,
    ) -> None:
        """Read, check and tokenise; with it the module can be used without a Trainer.

        Training starts from its first round again.

        Args:
            tokenizer: The student's tokenizer.
            splits: Which splits; those without a source are passed over.
            context_length: Most tokens that the student can read, or None for no limit.

        Raises:
            ConfigError: For data that cannot be found, read, rendered or fitted (with file and
                line), and a `prompts_per_step` that suits neither the data nor the number of ranks.
        """
        encoder = PromptEncoder(
            tokenizer,
            max_prompt_tokens=self.max_prompt_tokens,
            overlong=self.overlong,
            system_prompt=self.system_prompt,
            chat_template_kwargs=self.chat_template_kwargs,
            context_length=context_length,
        )
        tables: dict[str, PromptTable] = {}
        for split in splits:
            spec = self.sources[split]
            if spec is None:
                continue
            if spec not in tables:
                rows = PromptSource(spec, self.prompt_column).rows()
                tables[spec] = PromptTable(encoder.encode(rows, spec))
            self.tables[split] = tables[spec]
            if split == "train":
                self._train_loader = self._make_train_loader()

    @property
    def has_completions(self) -> bool | None:
        """Whether the training prompts come with completions; None before `setup`."""
        return self.tables["train"].has_completions if "train" in self.tables else None

    @property
    def longest_prompt(self) -> int | None:
        """Tokens of the longest prompt of all splits that were read; None before `setup`."""
        lengths = [len(p.prompt_ids) for table in self.tables.values() for p in table.prompts]
        return max(lengths, default=None)

    def train_dataloader(self) -> TrainLoader:
        """Return the one training loader, which knows its place in the data."""
        self._table("train")
        return self._train_loader

    def val_dataloader(self) -> EvalLoader | list[EvalLoader]:
        """Return the validation loader; an empty list, which means no validation, without `val`."""
        if self.sources["val"] is None:
            # Lightning's sign for no validation, of which it then warns
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
            return []
        return self._make_eval_loader("val")

    def test_dataloader(self) -> EvalLoader:
        """Return the test loader."""
        return self._make_eval_loader("test")

    def predict_dataloader(self) -> EvalLoader:
        """Return the prediction loader."""
        return self._make_eval_loader("predict")

    def _make_train_loader(self) -> TrainLoader:
        rank, world_size = self._rank_and_world_size()
        table = self.tables["train"]
        rounds = TrainRounds(
            len(table), self.prompts_per_step, self.seed, self.shuffle, rank, world_size
        )
        return TrainLoader(table, rounds, self.num_workers)

    def _make_eval_loader(self, split: Split) -> EvalLoader:
        table = self._table(split)
        rounds = EvalRounds(len(table), self.eval_prompts_per_step, *self._rank_and_world_size())
        return EvalLoader(table, rounds, self.num_workers)

    def _table(self, split: Split) -> PromptTable:
        if split not in self.tables:
            raise ConfigError(
                f"data.{split} is {self.sources[split]!r} and not prepared. Give a file or a "
                "dataset name, and call prepare(tokenizer) when there is no Trainer."
            )
        return self.tables[split]

    def _rank_and_world_size(self) -> tuple[int, int]:
        # The strategy's view, not the global rank: under tensor parallelism several ranks share
        # prompts.
        shares = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (shares["rank"], shares["num_replicas"]) if shares else (0, 1)


def _check_at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise ConfigError(f"data.{name} is {value}. Give at least {least}.")
