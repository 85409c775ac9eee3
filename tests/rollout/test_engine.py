"""TransformersEngine: what it draws, for whom, and what it leaves behind."""

import weakref
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from opd_lightning.errors import ConfigError
from opd_lightning.policy import CausalPolicy
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.rollout import SamplingConfig, TransformersEngine
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [200], [40, 41, 42], [90, 17, 33, 60, 2, 4], [7, 7]]
MANY_ENDS = list(range(1, 300, 8))
"""End tokens so many that rows end at different steps, one in eight tokens of the vocabulary."""


def policy_of(name: str = "llama", ends: int | list[int] = 1, **config: object) -> CausalPolicy:
    model = tiny_model(name, **config)
    model.generation_config.eos_token_id = ends
    return CausalPolicy(model, tiny_tokenizer())


def generate(
    policy: CausalPolicy,
    prompts: list[list[int]] = PROMPTS,
    seed: int = 0,
    max_rows: int | None = None,
    **sampling: object,
) -> Rollout:
    config = SamplingConfig(**({"max_completion_length": 16} | sampling))
    batch = PromptBatch.from_token_ids(prompts)
    return TransformersEngine(max_rows).generate(policy, batch, config, seed)


def completions(rollout: Rollout) -> list[list[int]]:
    pairs = zip(rollout.input_ids, rollout.completion_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


class BatchSizes:
    """Records [rows, tokens] of every call of the decoder."""

    def __init__(self, policy: CausalPolicy) -> None:
        self.calls: list[tuple[int, int]] = []
        self._decoder = policy.model.base_model

    def __enter__(self) -> list[tuple[int, int]]:
        def record(module, args, kwargs):  # noqa: ANN001
            ids = args[0] if args else kwargs["input_ids"]
            self.calls.append(tuple(ids.shape))

        self._handle = self._decoder.register_forward_pre_hook(record, with_kwargs=True)
        return self.calls

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


# ----------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("max_rows", [None, 2])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "cohere", "phi"])
def test_greedy_equals_transformers_generate(name: str, max_rows: int | None):
    """Longer than the sliding windows of 4, prompts of different lengths, early and late ends."""
    policy = policy_of(name, MANY_ENDS)
    rollout = generate(policy, max_rows=max_rows, top_k=1, max_completion_length=24)
    for prompt, found in zip(PROMPTS, completions(rollout), strict=True):
        output = policy.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=1,
        )
        assert found == output[0, len(prompt) :].tolist()
    assert rollout.flat_sampling_logprobs.eq(0).all(), "a greedy choice is certain"


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_batch_of_transformers_generate_gives_the_same(name: str):
    """Their left padding against ours, several rows at once."""
    free = completions(generate(policy_of(name, []), top_k=1))
    policy = policy_of(name, [free[0][3], free[1][7]])
    width = max(map(len, PROMPTS))
    padding = [width - len(p) for p in PROMPTS]
    ids = torch.tensor([[1] * n + p for n, p in zip(padding, PROMPTS, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
    output = policy.model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=1
    )
    found = completions(generate(policy, top_k=1, max_completion_length=12))
    for ours, theirs in zip(found, output[:, width:].tolist(), strict=True):
        assert ours == theirs[: len(ours)]
    lengths = {len(c) for c in found}
    assert len(lengths) > 1 and min(lengths) < 12, "the premise: rows end at different steps"


# ------------------------------------------------------------------------------------- independence


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_completions_do_not_depend_on_the_batch(name: str):
    policy = policy_of(name, MANY_ENDS)
    together = completions(generate(policy, num_generations=3))
    assert len({tuple(c) for c in together}) > 10, "the premise: completions differ"
    reverse = completions(generate(policy, PROMPTS[::-1], num_generations=3))
    groups = [reverse[i : i + 3] for i in range(0, 15, 3)]
    assert together == [c for group in groups[::-1] for c in group]
    for max_rows in (1, 4):
        assert together == completions(generate(policy, max_rows=max_rows, num_generations=3))
    for i, prompt in enumerate(PROMPTS):
        alone = completions(generate(policy, [prompt], num_generations=3))
        assert alone == together[3 * i : 3 * i + 3]
        fewer = completions(generate(policy, [prompt, [99, 98]], num_generations=2))
        assert fewer[:2] == together[3 * i : 3 * i + 2]


def test_training_mode_and_the_global_random_state_do_not_matter():
    policy = policy_of("gpt2", attn_pdrop=0.5)
    torch.manual_seed(1)
    trained = completions(generate(policy.train()))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert completions(generate(policy.eval())) == trained
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_matters_and_a_longer_limit_continues():
    policy = policy_of()
    short, long = (
        completions(generate(policy, max_completion_length=n, num_generations=2)) for n in (5, 16)
    )
    assert [c[:5] for c in long] == short
    assert completions(generate(policy, seed=1, num_generations=2)) != long
    siblings = zip(long[::2], long[1::2], strict=True)
    assert all(a != b for a, b in siblings), "siblings are different completions"


def test_siblings_stand_together_behind_their_prompt():
    rollout = generate(policy_of("llama", MANY_ENDS), num_generations=2)
    assert rollout.num_rows == 10
    for row in range(10):
        prompt = PROMPTS[row // 2]
        length = int(rollout.attention_mask[row].sum())
        mask = rollout.completion_mask[row]
        assert rollout.input_ids[row, : len(prompt)].tolist() == prompt
        assert mask[len(prompt) : length].all()
        assert int(mask.sum()) == length - len(prompt)


# --------------------------------------------------------------------------------------------- ends


def test_end_tokens_belong_to_the_completion_and_nothing_follows():
    """Two end tokens in the generation config; one of them is the pad token too."""
    policy = policy_of("gpt2")
    free = completions(generate(policy_of("gpt2", []), num_generations=8))
    second = free[0][3]
    policy.model.generation_config.eos_token_id = [1, second]
    ends = {1, second}
    rollout = generate(policy, num_generations=8)
    reasons = set()
    for found, whole, cut in zip(
        completions(rollout), free, rollout.truncated.tolist(), strict=True
    ):
        at = next((i for i, token in enumerate(whole) if token in ends), None)
        assert found == (whole if at is None else whole[: at + 1])
        assert cut == (at is None)
        reasons.add(None if at is None else whole[at])
    assert reasons == {None, 1, second}, "the premise: both end tokens and the limit occur"


def test_an_end_token_at_the_limit_is_no_truncation():
    policy = policy_of()
    free = completions(generate(policy_of("llama", []), [[5, 6]]))[0]
    policy.model.generation_config.eos_token_id = free[3]
    assert free.index(free[3]) == 3, "the premise: it stands there first"
    assert generate(policy, [[5, 6]], max_completion_length=4).truncated.tolist() == [False]
    assert generate(policy, [[5, 6]], max_completion_length=3).truncated.tolist() == [True]


def test_pad_tokens_in_prompts_and_completions_are_tokens():
    """Masks go by length: an end token that is the pad token too stays visible to the model."""
    policy = policy_of("llama", [])
    policy.model.config.pad_token_id = 1
    prompts = [[1, 5, 1, 6, 1], [0, 0, 7]]
    rollout = generate(policy, prompts)
    assert rollout.completion_lengths.tolist() == [16, 16]
    check_sampling_logprobs(policy, rollout, SamplingConfig())


def test_without_a_generation_config_the_tokenizer_names_the_end():
    assert policy_of("llama", [3, 4]).eos_token_ids == [3, 4]
    policy = policy_of("llama", 7)
    assert policy.eos_token_ids == [7]
    policy.model.generation_config.eos_token_id = None
    assert policy.eos_token_ids == [1]
    policy.tokenizer = None
    assert policy.eos_token_ids == []


def test_limit_of_one_token():
    policy = policy_of("gemma3")
    with BatchSizes(policy) as calls:
        rollout = generate(policy, max_completion_length=1)
    assert rollout.completion_lengths.tolist() == [1] * 5
    assert calls == [(5, 9)]


# ------------------------------------------------------------------------------------- stop strings


def find_stop_string(free: list[list[int]]) -> str:
    """Text across the 4th and 5th token of the first completion, whole in neither of them."""
    tokenizer = tiny_tokenizer()
    left, right = (tokenizer.decode([token]) for token in free[0][3:5])
    stop = left[-1] + right[0]
    assert "\ufffd" not in stop and stop not in left and stop not in right
    return stop


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it():
    policy = policy_of("llama", [])
    tokenizer = policy.tokenizer
    # until the tokens of interest are readable text, not halves of a character
    for seed in range(50):
        free = completions(generate(policy, seed=seed, num_generations=4))
        try:
            stop = find_stop_string(free)
        except AssertionError:
            continue
        break
    rollout = generate(policy, seed=seed, num_generations=4, stop=[stop, "never occurs"])
    ended = 0
    for found, whole, cut in zip(
        completions(rollout), free, rollout.truncated.tolist(), strict=True
    ):
        at = next((i for i in range(1, 17) if stop in tokenizer.decode(whole[:i])), None)
        assert found == whole[:at]
        assert cut == (at is None)
        ended += at is not None
    assert completions(rollout)[0] == free[0][:5], "it spans two tokens"
    assert 0 < ended < len(free)


def test_a_stop_string_of_the_prompt_does_not_stop():
    policy = policy_of("llama", [])
    prompt = policy.tokenizer("Answer: STOP ST")["input_ids"]
    free = completions(generate(policy, [prompt]))[0]
    text = policy.tokenizer.decode(free)
    assert "STOP" not in text and not text.startswith("OP")
    rollout = generate(policy, [prompt], stop=["STOP"])
    assert completions(rollout)[0] == free


def test_a_stop_string_that_begins_in_the_prompt_does_not_stop():
    policy = policy_of("llama", [])
    decode, prompt = policy.tokenizer.decode, policy.tokenizer("Answer: ST")["input_ids"]
    for seed in range(50):  # until the first token is readable text, not half a character
        free = completions(generate(policy, [prompt], seed=seed))[0]
        stop = "ST" + decode(free[:1])
        if stop.isascii() and stop not in decode(free):
            break
    else:
        raise AssertionError("the premise: some completion begins with readable text")
    assert completions(generate(policy, [prompt], seed=seed, stop=[stop]))[0] == free


def test_stop_strings_without_a_tokenizer_are_refused():
    policy = CausalPolicy(tiny_model())
    with pytest.raises(ConfigError, match=r"stop strings \['END'\] need a tokenizer; give one"):
        generate(policy, stop=["END"])


def test_stop_strings_beside_ids_that_the_tokenizer_has_not():
    """A head padded to more rows than the tokenizer has tokens may draw them."""
    policy = policy_of("llama", [], vocab_size=400)
    rollout = generate(policy, stop=["END"], num_generations=4)
    assert int(rollout.token_ids.max()) >= 300


# -------------------------------------------------------------------------------- log-probabilities


def check_sampling_logprobs(
    policy: CausalPolicy, rollout: Rollout, sampling: SamplingConfig
) -> None:
    """Recompute them row by row, without padding or cache, by plain loops."""
    for row in range(rollout.num_rows):
        length = int(rollout.attention_mask[row].sum())
        ids = rollout.input_ids[row, :length]
        with torch.no_grad():
            logits = policy.model(ids[None]).logits[0, :, : policy.vocab_size]
        for column in rollout.completion_mask[row].nonzero()[:, 0].tolist():
            z = (logits[column - 1].float() / sampling.temperature).tolist()
            kept = sorted(range(len(z)), key=lambda i: -z[i])[: sampling.top_k or None]
            mass = torch.tensor([z[i] for i in kept], dtype=torch.float64).softmax(0)
            covered = mass.cumsum(0)
            size = int((covered < sampling.top_p - 1e-9).sum()) + 1
            token = int(ids[column])
            assert token in kept[:size]
            expected = float((mass[kept.index(token)] / covered[min(size, len(kept)) - 1]).log())
            found = float(rollout.sampling_logprobs[row, column])
            assert abs(found - expected) < 1e-4, (row, column, found, expected)
    outside = rollout.sampling_logprobs[~rollout.completion_mask]
    assert not outside.any()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "granite"])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(max_completion_length=12),
        SamplingConfig(temperature=0.7, top_p=0.9, top_k=40, max_completion_length=12),
    ],
)
def test_sampling_logprobs_equal_a_full_recomputation(name: str, sampling: SamplingConfig):
    policy = policy_of(name, MANY_ENDS)
    batch = PromptBatch.from_token_ids(PROMPTS)
    rollout = TransformersEngine(4).generate(policy, batch, sampling, seed=5)
    check_sampling_logprobs(policy, rollout, sampling)


def test_sampling_logprobs_equal_the_policys_own_read():
    """At temperature T without truncation the student's read is the distribution drawn from."""
    policy = policy_of("gemma2", MANY_ENDS)
    rollout = generate(policy, temperature=0.8, num_generations=3)
    with torch.no_grad():
        read = policy.read(rollout, lambda d: d.logprobs(rollout.token_ids), temperature=0.8)
    torch.testing.assert_close(rollout.flat_sampling_logprobs, read, atol=1e-4, rtol=0)


def test_only_the_shared_rows_of_the_head_are_drawn():
    policy = policy_of("llama", [])
    policy.vocab_size = 150
    rollout = generate(policy, num_generations=4)
    assert int(rollout.token_ids.max()) < 150
    check_sampling_logprobs(policy, rollout, SamplingConfig())


def test_a_head_with_an_unnamed_step_is_drawn_from_as_it_is():
    class Halved(LlamaForCausalLM):
        def forward(self, *args, **kwargs):  # noqa: ANN002, ANN003
            output = super().forward(*args, **kwargs)
            output.logits = output.logits / 2
            return output

    model = Halved(tiny_model().config)
    model.load_state_dict(tiny_model().state_dict())
    policy = CausalPolicy(model, tiny_tokenizer())
    policy.check_head()
    rollout = generate(policy)
    check_sampling_logprobs(policy, rollout, SamplingConfig())


# ------------------------------------------------------------------------------- cost, side effects


@pytest.mark.parametrize("max_rows", [None, 4])
def test_finished_rows_leave_the_batch(max_rows: int | None):
    """Each token is computed once: the prompts, whatever their siblings, then one token a row."""
    policy = policy_of("llama", MANY_ENDS)
    with BatchSizes(policy) as calls:
        rollout = generate(policy, max_rows=max_rows, num_generations=3)
    lengths = rollout.completion_lengths
    assert len(set(lengths.tolist())) > 3, "the premise: rows end at different steps"
    in_order = lengths.view(5, 3)[[1, 4, 2, 3, 0]].flatten()  # by the prompts' lengths
    chunks = in_order.split(max_rows or 15)
    # four rows are three siblings and one of the next prompt; the last three share a prompt
    prompts = [5] if max_rows is None else [2, 2, 2, 1]
    expected = []
    for chunk, read in zip(chunks, prompts, strict=True):
        expected += [read, *(int((chunk > step).sum()) for step in range(1, int(chunk.max())))]
    assert [rows for rows, _ in calls] == expected


def test_siblings_share_the_reading_of_their_prompt():
    """Against rows decoded one at a time, each with a reading of its own."""
    for name in ("llama", "gemma3", "gpt2"):
        policy = policy_of(name, MANY_ENDS)
        with BatchSizes(policy) as shared_calls:
            shared = generate(policy, num_generations=4)
        with BatchSizes(policy) as separate_calls:
            separate = generate(policy, num_generations=4, max_rows=1)
        assert completions(shared) == completions(separate)
        assert torch.equal(shared.truncated, separate.truncated)
        torch.testing.assert_close(
            shared.sampling_logprobs, separate.sampling_logprobs, atol=1e-4, rtol=0
        )
        assert shared_calls[0] == (5, 9), "five prompts, though there are twenty rows"
        read = [tokens for rows, tokens in separate_calls if tokens > 1]
        assert len(read) == 16, "one reading a row, but for the prompt of one token"


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_prompts_of_like_length_are_read_together_and_come_back_in_order(name: str):
    """Groups with at most 64 tokens of padding; sliding layers are joined from short and long."""
    generator = torch.Generator().manual_seed(0)
    lengths = [50, 3, 48, 2, 90, 1, 49]
    prompts = [torch.randint(2, 300, (n,), generator=generator).tolist() for n in lengths]
    policy = policy_of(name, MANY_ENDS)
    with BatchSizes(policy) as calls:
        rollout = generate(policy, prompts, num_generations=2)
    assert calls[:3] == [(3, 3), (3, 50), (1, 90)]
    assert all(tokens == 1 for _, tokens in calls[3:])
    found = completions(rollout)
    for i, prompt in enumerate(prompts):
        assert (
            completions(generate(policy, [prompt], num_generations=2)) == found[2 * i : 2 * i + 2]
        )
        assert rollout.input_ids[2 * i, : len(prompt)].tolist() == prompt
    check_sampling_logprobs(policy, rollout, SamplingConfig())


def test_log_probabilities_may_be_left_out():
    policy = policy_of("llama", MANY_ENDS)
    batch = PromptBatch.from_token_ids(PROMPTS)
    sampling = SamplingConfig(max_completion_length=16, num_generations=2)
    rollout = TransformersEngine(logprobs=False).generate(policy, batch, sampling, seed=0)
    assert rollout.sampling_logprobs is None
    assert rollout.flat_sampling_logprobs is None
    expected = generate(policy, num_generations=2)
    assert completions(rollout) == completions(expected)
    assert torch.equal(rollout.truncated, expected.truncated)


def test_no_scores_outlive_the_step_that_drew_from_them():
    """Weak references to the head's outputs: at each call all but the last one's are gone."""
    policy = policy_of("llama", [])
    head, alive, steps = policy.model.get_output_embeddings(), [], 0

    def watch(module, args, output):  # noqa: ANN001
        nonlocal steps
        steps += 1
        alive[:] = [ref for ref in alive if ref() is not None]
        assert len(alive) <= 1, f"{len(alive)} tensors of scores live at call {steps}"
        assert output.shape[:2] == (5 if steps == 1 else 15, 1), "the last position alone"
        alive.append(weakref.ref(output.untyped_storage()))

    with head.register_forward_hook(watch):
        generate(policy, num_generations=3)
    assert steps == 16


def test_prompts_of_like_length_are_decoded_together():
    """Prompts of 9, 1, 3, 6 and 2 tokens, two at a time: little padding on the left."""
    policy = policy_of()
    with BatchSizes(policy) as calls:
        generate(policy, max_rows=2, max_completion_length=1)
    assert calls == [(2, 2), (2, 6), (1, 9)]


def test_no_prompts_give_an_empty_rollout():
    policy = policy_of()
    with BatchSizes(policy) as calls:
        rollout = generate(policy, [], num_generations=2)
    assert calls == []
    assert (rollout.num_rows, rollout.num_tokens) == (0, 0)
    assert rollout.truncated.shape == (0,)
    assert rollout.task == []


@pytest.mark.parametrize(("training", "checkpointing"), list(product([True, False], repeat=2)))
def test_modes_are_restored_and_no_gradient_is_kept(training: bool, checkpointing: bool):
    policy = policy_of().train(training)
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = completions(generate(policy_of()))
    rollout = generate(policy)
    assert completions(rollout) == expected
    assert policy.training is training
    assert policy.model.training is training
    assert policy.model.is_gradient_checkpointing is checkpointing
    assert not rollout.sampling_logprobs.requires_grad
    assert all(p.requires_grad and p.grad is None for p in policy.parameters())


def test_modes_are_restored_after_a_failure():
    policy = policy_of().train()
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(IndexError):
        generate(policy, [[5, 999]])  # no such row in the embedding
    assert policy.training
    assert policy.model.is_gradient_checkpointing


def test_the_teachers_prompts_come_along():
    batch = PromptBatch.from_token_ids(PROMPTS[:2])
    other = PromptBatch.from_token_ids([[50, 51], [60, 61, 62, 63]])
    batch.teacher_input_ids, batch.teacher_attention_mask = other.input_ids, other.attention_mask
    sampling = SamplingConfig(max_completion_length=6, num_generations=2)
    policy = policy_of("llama", MANY_ENDS)
    rollout = TransformersEngine().generate(policy, batch, sampling, seed=0)
    assert completions(rollout) == completions(
        generate(policy, PROMPTS[:2], max_completion_length=6, num_generations=2)
    ), "what the teacher sees is not the student's business"
    ids, mask, completion_mask = rollout.seen_by_teacher()
    for row in range(4):
        teacher_prompt = [[50, 51], [60, 61, 62, 63]][row // 2]
        seen: Tensor = ids[row][mask[row].bool()]
        assert seen.tolist() == teacher_prompt + completions(rollout)[row]
        assert ids[row][completion_mask[row]].tolist() == completions(rollout)[row]


def test_tasks_follow_their_prompts():
    batch = PromptBatch.from_token_ids(PROMPTS[:2])
    batch.task = ["sort", "sum"]
    sampling = SamplingConfig(max_completion_length=2, num_generations=2)
    rollout = TransformersEngine(1).generate(policy_of(), batch, sampling, seed=0)
    assert rollout.task == ["sort", "sort", "sum", "sum"]


@pytest.mark.parametrize("max_rows", [0, -3])
def test_wrong_max_rows_are_refused(max_rows: int):
    with pytest.raises(ConfigError, match=f"max_rows must be at least 1 .*got {max_rows}"):
        TransformersEngine(max_rows)
