"""Templates, special tokens and lengths; expected tokens come from the tokenizer's own calls."""

import logging
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from opd_lightning.data import PromptRow
from opd_lightning.data.encoding import EncodedPrompt, PromptEncoder
from opd_lightning.errors import ConfigError
from tests.tiny import tiny_tokenizer


def _with_bos(chat_template: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts BOS before a text by default, as Llama's does."""
    tokenizer = tiny_tokenizer(chat_template)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
    )
    assert tokenizer("Hi")["input_ids"][0] == 0, "premise: BOS by default"
    return tokenizer


def _encode(
    tokenizer: PreTrainedTokenizerFast, *rows: PromptRow, **options: Any
) -> list[EncodedPrompt]:
    options.setdefault("max_prompt_tokens", 1000)
    return PromptEncoder(tokenizer, **options).encode(rows, "a.jsonl")


def _rows(*prompts: str, **columns: Any) -> list[PromptRow]:
    return [PromptRow(i, f"a.jsonl:{i + 1}", p, **columns) for i, p in enumerate(prompts)]


def _of_characters(*counts: int) -> list[PromptRow]:
    return _rows(*("z" * count for count in counts))


def test_string_is_one_user_turn(tokenizer: PreTrainedTokenizerFast):
    turns = [{"role": "user", "content": "What is 2?"}]
    (encoded,) = _encode(tokenizer, *_rows("What is 2?"))
    expected = "<|im_start|>user\nWhat is 2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encoded.prompt_ids) == expected
    assert encoded.prompt_ids == tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    (as_conversation,) = _encode(tokenizer, PromptRow(0, "a.jsonl:1", turns))
    assert as_conversation.prompt_ids == encoded.prompt_ids


def test_bos_is_not_doubled():
    (encoded,) = _encode(_with_bos(chat_template=True), *_rows("Hi"))
    assert encoded.prompt_ids[:2].count(0) == 1


def test_without_template_the_string_has_the_default_special_tokens():
    tokenizer = _with_bos(chat_template=False)
    (encoded,) = _encode(tokenizer, *_rows("Hi"))
    assert encoded.prompt_ids == tokenizer("Hi")["input_ids"]
    assert encoded.prompt_ids[0] == 0


def test_without_template_what_needs_one_is_refused():
    tokenizer = tiny_tokenizer(chat_template=False)
    conversation = PromptRow(2, "a.jsonl:3", [{"role": "user", "content": "Hi"}])
    with pytest.raises(ConfigError, match=r"a\.jsonl:3: the prompt is a conversation.*'Hi'"):
        _encode(tokenizer, conversation)
    with pytest.raises(ConfigError, match=r"data\.system_prompt is 'Be brief\.'.*no chat template"):
        _encode(tokenizer, *_rows("Hi"), system_prompt="Be brief.")
    with pytest.raises(ConfigError, match=r"data\.chat_template_kwargs is .*no chat template"):
        _encode(tokenizer, *_rows("Hi"), chat_template_kwargs={"x": 1})


def test_system_prompt_where_there_is_none(tokenizer: PreTrainedTokenizerFast):
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"}]
    rows = [PromptRow(0, "a:1", "Hi", teacher_prompt="Hint"), PromptRow(1, "a:2", own)]
    first, second = _encode(tokenizer, *rows, system_prompt="Be brief.")
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert tokenizer.decode(first.prompt_ids).startswith(system + "<|im_start|>user\nHi")
    assert tokenizer.decode(first.teacher_prompt_ids).startswith(system + "<|im_start|>user\nHint")
    assert "Be brief." not in tokenizer.decode(second.prompt_ids)
    assert second.teacher_prompt_ids is None


def test_chat_template_kwargs_reach_the_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{% if not thinking %}<think></think>{% endif %}"
    (with_thinking,) = _encode(tokenizer, *_rows("Hi"), chat_template_kwargs={"thinking": True})
    (without,) = _encode(tokenizer, *_rows("Hi"))
    assert tokenizer.decode(without.prompt_ids).endswith("<think></think>")
    assert tokenizer.decode(with_thinking.prompt_ids).endswith("assistant\n")


def test_template_that_refuses_a_prompt_names_the_row():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: .*refuses the prompt \(no system turns\)"):
        _encode(tokenizer, *_rows("Hi"))


def test_completion_ends_with_one_eos_unless_truncated(tokenizer: PreTrainedTokenizerFast):
    five = tokenizer("five", add_special_tokens=False)["input_ids"]
    finished, with_eos, cut_off, empty = _encode(
        tokenizer,
        *_rows("a", completion="five"),
        *_rows("a", completion="five<|im_end|>"),
        *_rows("a", completion="five", truncated=True),
        *_rows("a", completion=""),
    )
    assert finished.completion_ids == with_eos.completion_ids == [*five, tokenizer.eos_token_id]
    assert (cut_off.completion_ids, cut_off.truncated) == (five, True)
    assert empty.completion_ids == [tokenizer.eos_token_id]


def test_completion_has_no_bos():
    (encoded,) = _encode(_with_bos(chat_template=True), *_rows("a", completion="five"))
    assert 0 not in encoded.completion_ids


def test_completion_without_eos_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: .*no EOS token.*truncated = true"):
        _encode(tokenizer, *_rows("a", completion="five"))


def test_overlong_dropped_and_reported(caplog: pytest.LogCaptureFixture):
    tokenizer = tiny_tokenizer(chat_template=False)
    with caplog.at_level(logging.WARNING, logger="opd_lightning"):
        kept = _encode(tokenizer, *_of_characters(9, 10, 11, 12), max_prompt_tokens=10)
    assert [(p.index, len(p.prompt_ids)) for p in kept] == [(0, 9), (1, 10)]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 prompts of a.jsonl exceed max_prompt_tokens=10: dropped"
    ]


@pytest.mark.parametrize(
    ("limit", "expected"), [(5, "abghi"), (4, "abhi"), (1, "i"), (9, "abcdefghi")]
)
def test_overlong_truncated_in_the_middle(limit: int, expected: str):
    tokenizer = tiny_tokenizer(chat_template=False)
    (encoded,) = _encode(
        tokenizer, *_rows("abcdefghi"), max_prompt_tokens=limit, overlong="truncate"
    )
    assert tokenizer.decode(encoded.prompt_ids) == expected


def test_overlong_error_names_the_first_row():
    tokenizer = tiny_tokenizer(chat_template=False)
    with pytest.raises(
        ConfigError, match=r"a\.jsonl:2: a prompt of 12 tokens; 2 of 3 .*=10\. Raise"
    ):
        _encode(tokenizer, *_of_characters(9, 12, 11), max_prompt_tokens=10, overlong="error")


def test_everything_dropped_is_an_error():
    tokenizer = tiny_tokenizer(chat_template=False)
    with pytest.raises(
        ConfigError, match=r"2 of 2 prompts of a\.jsonl .*shortest has 11.*truncate"
    ):
        _encode(tokenizer, *_of_characters(12, 11), max_prompt_tokens=10)


def test_context_must_hold_prompt_and_completion():
    tokenizer = tiny_tokenizer(chat_template=False)
    rows = _of_characters(4, 10)
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: 10 prompt tokens .* context of 10"):
        _encode(tokenizer, *rows, context_length=10)
    assert len(_encode(tokenizer, *rows, context_length=11)) == 2
    assert len(_encode(tokenizer, *rows, context_length=10, max_prompt_tokens=9)) == 1
    truncated = {"max_prompt_tokens": 9, "overlong": "truncate"}
    assert len(_encode(tokenizer, *rows, context_length=10, **truncated)) == 2
    with pytest.raises(ConfigError, match=r"4 prompt tokens and a completion of at least 3"):
        _encode(tokenizer, *_rows("zzzz", completion="zz"), context_length=6)


def test_prompt_without_tokens_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: the tokenizer makes no tokens"):
        _encode(tokenizer, *_rows("Hi"))
