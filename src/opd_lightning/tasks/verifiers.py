"""Which task scores which row of data."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from opd_lightning.errors import ConfigError, nearest
from opd_lightning.tasks.base import Task
from opd_lightning.tasks.registry import TASKS


class Verifiers:
    """Tasks by the names that data gives them.

    A name that is not among those given is looked up in the registry, upper and lower case alike,
    and made with its defaults: rows of task "math" are scored by `Math`.

    Args:
        tasks: Name in the column `task` -> task.
    """

    def __init__(self, tasks: Mapping[str, Task] | None = None) -> None:
        self.given = dict(tasks or {})
        self._found: dict[str, Task | None] = {}

    def task(self, name: str) -> Task | None:
        """Return the task that scores rows of task `name`, None where there is none.

        Raises:
            ConfigError: If the registered class cannot be made without arguments.
        """
        if name in self.given:
            return self.given[name]
        if name not in self._found:
            cls = TASKS.find(name)
            try:
                self._found[name] = None if cls is None else cls()
            except TypeError as error:
                raise ConfigError(
                    f"rows of task {name!r} are scored by {cls.__name__}, which needs arguments "
                    f"({error}). Give it under `tasks`, with class_path and init_args."
                ) from error
        return self._found[name]

    def scores_row(self, name: str, answer: str | None) -> bool:
        """Return whether a row of this task and answer is scored."""
        task = self.task(name)
        return task is not None and (answer is not None or not task.needs_answer)

    def scored_tasks(self, rows: Iterable[tuple[str, str | None]]) -> list[str]:
        """Return the tasks of the rows (task, answer) that are scored, sorted."""
        return sorted({name for name, answer in set(rows) if self.scores_row(name, answer)})

    def check(self, rows: Iterable[tuple[str, str | None]]) -> None:
        """Refuse given tasks that score nothing.

        Raises:
            ConfigError: If the data has no row of a given task, or one without the answer it needs.
        """
        rows = set(rows)
        present = sorted({name for name, _ in rows})
        for name, task in self.given.items():
            if name not in present:
                raise ConfigError(
                    f"tasks names {name!r}, but the data has no row of that task."
                    f"{nearest(name, present)} Tasks of the data: {', '.join(present)}."
                )
            if task.needs_answer and (name, None) in rows:
                raise ConfigError(
                    f"tasks gives {type(task).__name__} for {name!r}, but rows of that task have "
                    "no answer. Fill their column `answer`, or leave the task out."
                )

    def scores(
        self, names: Sequence[str], answers: Sequence[str | None], completions: Sequence[str]
    ) -> list[float | None]:
        """Return the score of each completion, None where its row is not scored.

        Args:
            names: Task of each completion.
            answers: Reference answer of each, or None.
            completions: Their texts.

        Raises:
            ConfigError: If a task gives something else than one finite number a completion.
        """
        rows_of = defaultdict(list)
        for row, (name, answer) in enumerate(zip(names, answers, strict=True)):
            if self.scores_row(name, answer):
                rows_of[name].append(row)
        scores: list[float | None] = [None] * len(completions)
        for name, rows in rows_of.items():
            given = self.task(name).scores(
                [completions[i] for i in rows], [answers[i] for i in rows]
            )
            _check_scores(given, len(rows), name, self.task(name))
            for row, score in zip(rows, given, strict=True):
                scores[row] = float(score)
        return scores


def _check_scores(scores: Sequence[float], number: int, name: str, task: Task) -> None:
    wrong = [s for s in scores if not isinstance(s, int | float) or not abs(s) < float("inf")]
    if wrong or len(scores) != number:
        raise ConfigError(
            f"{type(task).__name__}, for task {name!r}, gave {len(scores)} scores for {number} "
            f"completions{f', among them {wrong[0]!r}' if wrong else ''}. A score is a finite "
            "number, one a completion."
        )
