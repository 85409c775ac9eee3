"""Where the prompts of a split come from: a local file or a dataset of the `datasets` library."""

from pathlib import Path

from opd_lightning.data.files import READERS, read_file
from opd_lightning.data.rows import PromptRow, Record
from opd_lightning.errors import ConfigError, nearest
from opd_lightning.tasks import TASKS


class PromptSource:
    """The rows of one split, read and checked.

    Example:
        >>> PromptSource("prompts.jsonl").rows()  # doctest: +SKIP
        [PromptRow(index=0, where='prompts.jsonl:1', prompt='What is 2 + 3?', task='add', ...)]

    Args:
        spec: `task:NAME:NUMBER` or `task:NAME:NUMBER:SEED` for prompts that a task makes itself,
            such as `task:Arithmetic:1000`; else the path of a `.jsonl`, `.json`, `.csv` or
            `.parquet` file, else what `datasets.load_dataset` takes (a name on the Hugging Face hub
            or a local folder), as `NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`, for example
            `openai/gsm8k:main:test`; SPLIT may be sliced (`train[:100]`). Without SPLIT the dataset
            must have one split only.
        prompt_column: Column that holds the prompt; default `prompt`, else `messages`.
    """

    def __init__(self, spec: str, prompt_column: str | None = None) -> None:
        self.spec = spec
        self.prompt_column = prompt_column

    def rows(self) -> list[PromptRow]:
        """Read all rows and check each of them.

        Raises:
            ConfigError: If the file or dataset cannot be found or read, has no rows, has a row that
                `PromptRow.from_record` refuses, or has completions for some rows only.
        """
        records = self._records()
        if not records:
            raise ConfigError(
                f"{self.spec}: no rows. Give a file or a split with at least one prompt."
            )
        rows = [PromptRow.from_record(record, self.prompt_column) for record in records]
        _check_all_or_no_completions(rows)
        return rows

    def _records(self) -> list[Record]:
        if self.spec.startswith("task:"):
            return _prompts_of_task(self.spec)
        path = Path(self.spec).expanduser()
        if path.is_file():
            return read_file(path)
        if path.suffix.lower() in READERS:
            raise ConfigError(f"{self.spec}: file not found.{_nearest_path(path)}")
        return _read_dataset(self.spec)


def _check_all_or_no_completions(rows: list[PromptRow]) -> None:
    without = [row for row in rows if row.completion is None]
    if without and len(without) < len(rows):
        raise ConfigError(
            f"{without[0].where}: no completion, but {len(rows) - len(without)} of {len(rows)} "
            "rows have one. Give all rows of a split a completion (off-policy), or none "
            "(on-policy)."
        )


def _prompts_of_task(spec: str) -> list[Record]:
    name, *numbers = spec.removeprefix("task:").split(":")
    if len(numbers) not in (1, 2) or not all(n.isdecimal() for n in numbers) or numbers[0] == "0":
        raise ConfigError(
            f"{spec!r} is not task:NAME:NUMBER or task:NAME:NUMBER:SEED with a number of prompts "
            "of at least 1, for example task:Arithmetic:1000."
        )
    rows = TASKS.resolve(name)().prompts(*map(int, numbers))
    return [Record(i, f"{spec}[{i}]", row) for i, row in enumerate(rows)]


def _nearest_path(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" There is no folder {folder} (working directory {Path.cwd()})."
    names = sorted(item.name for item in folder.iterdir() if item.suffix.lower() in READERS)
    return nearest(path.name, names) or f" Files in {folder}: {', '.join(names[:10]) or 'none'}."


def _read_dataset(spec: str) -> list[Record]:
    import datasets  # slow to import, and of use here only

    name, config, split = _parse_name(spec)
    if name.startswith(("/", "./", "../", "~")):  # no name on the hub: do not ask there
        name = str(Path(name).expanduser())
        if not Path(name).exists():
            raise ConfigError(f"{spec}: file or folder not found.{_nearest_path(Path(name))}")
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    # its own errors, those of the hub's client, and ValueError for configs and splits
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"'{spec}' is neither a file nor a dataset that can be loaded ({reason}). Give a path "
            f"that ends in {', '.join(READERS)}, or NAME, NAME:SPLIT or "
            f"NAME:CONFIG:SPLIT.{_nearest_path(Path(spec))}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) != 1:
            raise ConfigError(
                f"'{spec}' has the splits {', '.join(loaded)}. Say which, for example "
                f"'{spec}:{next(iter(loaded))}'."
            )
        loaded = next(iter(loaded.values()))
    return [Record(index, f"{spec}[{index}]", columns) for index, columns in enumerate(loaded)]


def _parse_name(spec: str) -> tuple[str, str | None, str | None]:
    head, bracket, slice_ = spec.partition("[")  # the colon of a sliced split is not a separator
    parts = head.split(":")
    parts[-1] += bracket + slice_
    if len(parts) > 3 or not all(parts):
        raise ConfigError(
            f"'{spec}' is not a dataset name. Give NAME, NAME:SPLIT or NAME:CONFIG:SPLIT, for "
            "example openai/gsm8k:main:train."
        )
    name, config, split = parts[0], None, None
    if len(parts) == 2:
        split = parts[1]
    elif len(parts) == 3:
        config, split = parts[1:]
    return name, config, split
