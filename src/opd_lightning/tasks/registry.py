"""The known tasks and environments."""

from opd_lightning.registry import Registry
from opd_lightning.tasks.base import Environment, Task
from opd_lightning.tasks.guess_number import GuessNumber
from opd_lightning.tasks.mathematics import Math
from opd_lightning.tasks.simple import Arithmetic, ExactMatch

TASKS: Registry[Task] = Registry(
    Task, [Math, Arithmetic, ExactMatch], "opd_lightning.tasks", any_case=True
)
ENVIRONMENTS: Registry[Environment] = Registry(
    Environment, [GuessNumber], "opd_lightning.environments", any_case=True
)
