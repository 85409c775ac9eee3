"""The special-token mask against a naive loop, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.distributions import TokenDistribution
from opd_lightning.errors import ConfigError
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.weighting import SpecialTokenMask, TokenWeight, combined_weight
from tests.tiny import tiny_tokenizer


def loop(rollout: Rollout, ids: set[int], occurrence: str) -> list[float]:
    """Walk through each row and remember which ids were met in its completion."""
    weights = []
    for row_ids, row_mask in zip(rollout.input_ids, rollout.completion_mask, strict=True):
        met: set[int] = set()
        for token, counted in zip(row_ids.tolist(), row_mask.tolist(), strict=True):
            if not counted:
                continue
            masked = token in ids and (occurrence == "all" or token not in met)
            met.add(token)
            weights.append(0.0 if masked else 1.0)
    return weights


def weigh(mask: TokenWeight, rollout: Rollout) -> list[float]:
    some = TokenDistribution.from_logits(torch.zeros(rollout.num_tokens, 3))
    return mask.weight(rollout, some, some).tolist()


def rollout_with_prompts(prompts: list[list[int]], completions: list[list[int]]) -> Rollout:
    batch = PromptBatch.from_token_ids(prompts)
    return Rollout.from_completions(batch, completions, [False] * len(completions))


@pytest.mark.parametrize(("occurrence", "wanted"), [
    ("first", [0, 1, 0, 1, 1, 1, 0]),
    ("all", [0, 1, 0, 0, 0, 1, 0]),
])  # fmt: skip
def test_each_id_by_itself_in_each_row(occurrence: str, wanted: list[int]):
    rollout = rollout_with_prompts([[1], [1]], [[7, 5, 8, 8, 7], [5, 7]])
    assert weigh(SpecialTokenMask([7, 8], occurrence), rollout) == wanted


@pytest.mark.parametrize("occurrence", ["first", "all"])
def test_ids_in_the_prompt_do_not_count(occurrence: str):
    rollout = rollout_with_prompts([[7, 7, 8], [7]], [[5, 7, 7], [8]])
    wanted = {"first": [1, 0, 1, 1], "all": [1, 0, 0, 1]}[occurrence]
    assert weigh(SpecialTokenMask([7], occurrence), rollout) == wanted


@pytest.mark.parametrize("occurrence", ["first", "all"])
def test_what_another_speaker_says_between_two_spans_does_not_count(occurrence: str):
    rollout = rollout_with_prompts([[1]], [[5, 7, 6, 7, 7]])
    rollout.completion_mask[0, 2] = False  # the first 7 belongs to an environment
    wanted = {"first": [1, 1, 0, 1], "all": [1, 1, 0, 0]}[occurrence]
    assert weigh(SpecialTokenMask([7], occurrence), rollout) == wanted


@given(
    rows=st.lists(st.lists(st.integers(0, 4), max_size=9), min_size=1, max_size=4),
    hidden=st.lists(st.booleans(), min_size=60, max_size=60),
    ids=st.sets(st.integers(0, 4), min_size=1),
    occurrence=st.sampled_from(["first", "all"]),
)
def test_equals_the_loop_on_any_rows_and_spans(
    rows: list[list[int]], hidden: list[bool], ids: set[int], occurrence: str
):
    rollout = rollout_with_prompts([[0, 1, 2, 3, 4]] * len(rows), rows)
    hide = torch.tensor(hidden)[: rollout.input_ids.numel()].reshape_as(rollout.input_ids)
    rollout.completion_mask &= hide
    mask = SpecialTokenMask(sorted(ids), occurrence)
    assert weigh(mask, rollout) == loop(rollout, ids, occurrence)


@pytest.mark.parametrize("occurrence", ["first", "all"])
def test_strings_are_encoded_and_each_of_their_ids_counts(occurrence: str):
    tokenizer = tiny_tokenizer()
    encoded = tokenizer.encode("<think>", add_special_tokens=False)
    end = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    assert len(encoded) > 1 and len(end) == 1
    text = "<think>two and three</think><think>"
    completion = tokenizer.encode(text, add_special_tokens=False) + end
    rollout = rollout_with_prompts([encoded], [completion])
    mask = SpecialTokenMask(["<think>", "<|im_end|>", 65], occurrence)
    mask.setup(tokenizer)
    wanted = loop(rollout, {*encoded, *end, 65}, occurrence)
    assert weigh(mask, rollout) == wanted
    assert 0.0 in wanted and 1.0 in wanted and wanted[-1] == 0.0


def test_the_papers_tokens_are_the_default():
    assert SpecialTokenMask().tokens == ("<", "think", "<|im_end|>")
    assert SpecialTokenMask().occurrence == "first"


def test_no_special_tokens_are_added_in_encoding():
    tokenizer = tiny_tokenizer()
    mask = SpecialTokenMask(["two"])
    mask.setup(tokenizer)
    rollout = rollout_with_prompts([[5]], [[tokenizer.eos_token_id, tokenizer.bos_token_id]])
    assert weigh(mask, rollout) == [1.0, 1.0]


def test_weights_multiply():
    rollout = rollout_with_prompts([[1]], [[5, 6, 7]])
    some = TokenDistribution.from_logits(torch.zeros(3, 3))

    class Half(TokenWeight):
        def weight(self, rollout, student, teacher):  # noqa: ANN001
            return torch.full((rollout.num_tokens,), 0.5)

    product = combined_weight([SpecialTokenMask([6]), Half(), Half()], rollout, some, some)
    assert product.tolist() == [0.25, 0.0, 0.25]
    assert combined_weight([], rollout, some, some).tolist() == [1.0, 1.0, 1.0]


def test_strings_without_a_tokenizer_are_refused_with_the_call_that_is_missing():
    rollout = rollout_with_prompts([[1]], [[5]])
    with pytest.raises(
        ConfigError, match=r"\['<', 7\].*no tokenizer.*setup\(tokenizer\).*token ids"
    ):
        weigh(SpecialTokenMask(["<", 7]), rollout)


def test_a_string_that_encodes_to_nothing_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'' encodes to nothing.*Take it out.*or give its id"):
        SpecialTokenMask(["<", ""]).setup(tiny_tokenizer())


@pytest.mark.parametrize(("make", "message"), [
    (lambda: SpecialTokenMask([]), r"no tokens to mask; got \[\]. Name some, or drop it"),
    (lambda: SpecialTokenMask([5], "last"), r"'last' is not known. Known: first, all"),
    (lambda: SpecialTokenMask(["<", -1, 3, -2]), r"must be 0 or above; got \[-1, -2\]"),
])  # fmt: skip
def test_wrong_settings_are_refused(make, message: str):  # noqa: ANN001
    with pytest.raises(ConfigError, match=message):
        make()
