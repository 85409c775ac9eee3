"""Item 5: token -> id maps are compared at start; padding is cut, differences are refused."""

import logging

import pytest

from opd_lightning.errors import ConfigError
from opd_lightning.teachers import shared_vocabulary
from tests.tiny import tiny_tokenizer


def named(name: str, added: tuple[str, ...] = ()):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(added))
    tokenizer.name_or_path = name
    return tokenizer


@pytest.mark.parametrize(("student", "teacher"), [(304, 320), (320, 304)])
def test_padding_is_cut_to_the_shared_rows_and_said_once(
    student: int, teacher: int, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, "opd_lightning"):
        assert shared_vocabulary(named("a"), named("b"), student, teacher) == 304
    (record,) = caplog.records
    assert f"student {student}, teacher {teacher} rows" in record.getMessage()
    assert "304 shared rows" in record.getMessage()


def test_equal_heads_say_nothing(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, "opd_lightning"):
        assert shared_vocabulary(named("a"), named("b"), 300, 300) == 300
    assert not caplog.records


def test_first_differing_tokens_and_both_tokenizers_are_named():
    student = named("owner/student", ("<left>", "<right>"))
    teacher = named("owner/teacher", ("<right>", "<left>", "<more>"))
    with pytest.raises(ConfigError) as error:
        shared_vocabulary(student, teacher, 303, 303)
    message = str(error.value)
    assert "different vocabularies, 3 ids differ" in message
    assert "id 300: student '<left>', teacher '<right>'" in message
    assert "id 301: student '<right>', teacher '<left>'" in message
    assert "id 302: student None, teacher '<more>'" in message
    assert "'owner/student' (302 tokens)" in message
    assert "'owner/teacher' (303 tokens)" in message
    assert "take a teacher of the student's family" in message


def test_only_the_first_of_many_differences_are_shown():
    teacher = named("b", tuple(f"<t{i}>" for i in range(20)))
    with pytest.raises(ConfigError) as error:
        shared_vocabulary(named("a"), teacher, 320, 320)
    message = str(error.value)
    assert "20 ids differ" in message
    assert "<t0>" in message
    assert "<t4>" in message
    assert "<t5>" not in message


def test_a_token_beyond_the_shared_rows_is_refused():
    """id 300 is the 301st: 300 rows hold the ids 0 to 299 only."""
    pair = named("a", ("<x>",)), named("b", ("<x>",))
    assert shared_vocabulary(*pair, 301, 301) == 301
    with pytest.raises(ConfigError) as error:
        shared_vocabulary(*pair, 301, 300)
    message = str(error.value)
    assert "ids up to 300, but the smaller head has 300 rows (student 301, teacher 300)" in message
    assert "Resize" in message
