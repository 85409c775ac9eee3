"""What is asked and how an answer is checked: tasks with verifiers, environments with episodes."""

from opd_lightning.tasks.base import Environment, Task, Turn
from opd_lightning.tasks.guess_number import GuessNumber
from opd_lightning.tasks.mathematics import Math
from opd_lightning.tasks.registry import ENVIRONMENTS, TASKS
from opd_lightning.tasks.simple import Arithmetic, ExactMatch
from opd_lightning.tasks.verifiers import Verifiers

__all__ = [
    "ENVIRONMENTS",
    "TASKS",
    "Arithmetic",
    "Environment",
    "ExactMatch",
    "GuessNumber",
    "Math",
    "Task",
    "Turn",
    "Verifiers",
]
