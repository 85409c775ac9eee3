"""Whether two tokenizers speak of the same ids, and how many of them."""

import logging

from transformers import PreTrainedTokenizerBase as Tokenizer

from opd_lightning.errors import ConfigError

log = logging.getLogger("opd_lightning")

_DIFFERENCES_SHOWN = 5


def shared_vocabulary(
    student: Tokenizer, teacher: Tokenizer, student_size: int, teacher_size: int
) -> int:
    """Return the number of ids, from 0 on, that both models' heads have.

    The token -> id maps must agree; heads padded to different sizes are cut to the smaller one
    (Qwen2.5 has 151,936 and 152,064 rows for one vocabulary), said once in the log.

    Args:
        student: The student's tokenizer.
        teacher: The teacher's.
        student_size: Rows of the student's head.
        teacher_size: Rows of the teacher's head.

    Raises:
        ConfigError: If the maps differ, naming the first differing tokens, or if the shared rows
            do not hold all tokens of the maps.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        raise ConfigError(_difference(student, teacher, ours, theirs))
    shared = min(student_size, teacher_size)
    largest = max(ours.values())
    if largest >= shared:
        raise ConfigError(
            f"the tokenizer has ids up to {largest}, but the smaller head has {shared} rows "
            f"(student {student_size}, teacher {teacher_size}). Resize that model's embeddings."
        )
    if student_size != teacher_size:
        log.info(
            "vocabularies are padded differently (student %d, teacher %d rows): the %d shared rows "
            "are compared",
            student_size,
            teacher_size,
            shared,
        )
    return shared


def _difference(
    student: Tokenizer, teacher: Tokenizer, ours: dict[str, int], theirs: dict[str, int]
) -> str:
    token_of = [{i: t for t, i in vocabulary.items()} for vocabulary in (ours, theirs)]
    ids = sorted({*token_of[0], *token_of[1]})
    differing = [i for i in ids if token_of[0].get(i) != token_of[1].get(i)]
    shown = "; ".join(
        f"id {i}: student {token_of[0].get(i)!r}, teacher {token_of[1].get(i)!r}"
        for i in differing[:_DIFFERENCES_SHOWN]
    )
    return (
        f"student and teacher have different vocabularies, {len(differing)} ids differ ({shown}). "
        f"Tokenizers: {student.name_or_path!r} ({len(ours)} tokens) and {teacher.name_or_path!r} "
        f"({len(theirs)} tokens). Token by token comparison needs one vocabulary: take a teacher "
        "of the student's family."
    )
