"""Teachers: frozen models that score every token of the student's completions."""

from opd_lightning.teachers.base import Teacher
from opd_lightning.teachers.local import LocalTeacher
from opd_lightning.teachers.vocabulary import shared_vocabulary

__all__ = ["LocalTeacher", "Teacher", "shared_vocabulary"]
