"""The sampler against distributions enumerated by plain loops; the numbers that decide it."""

import math

import pytest
import torch

from opd_lightning.errors import ConfigError
from opd_lightning.rollout import SamplingConfig
from opd_lightning.rollout.sampling import sample, uniforms

LOGITS = [0.3, -1.2, 2.5, 0.9, 2.4, -0.5, 1.7, -3.0, 0.0, 1.1, -0.2]
NEARLY_ONE = 1 - 2**-53


def enumerated(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The distribution that should be drawn from: temperature, top-k, top-p of what is left."""
    largest = max(logits)
    mass = [math.exp((z - largest) / temperature) for z in logits]
    order = sorted(range(len(mass)), key=lambda i: -mass[i])
    kept = order[:top_k] if top_k else order
    total = sum(mass[i] for i in kept)
    if top_p < 1:
        nucleus, covered = [], 0.0
        for i in kept:
            nucleus.append(i)
            covered += mass[i] / total
            if covered >= top_p:
                break
        kept = nucleus
    total = sum(mass[i] for i in kept)
    kept = set(kept)
    return [mass[i] / total if i in kept else 0.0 for i in range(len(mass))]


GRID = [
    (temperature, top_k, top_p)
    for temperature in (0.5, 1.0, 1.7)
    for top_k in (0, 1, 4, 11, 50)
    for top_p in (1.0, 0.9, 0.5, 1e-6)
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), GRID)
def test_inverse_distribution_function(temperature: float, top_k: int, top_p: float):
    """Over an even grid of n uniforms a token of probability p is drawn n p times, +- 1."""
    expected = enumerated(LOGITS, temperature, top_k, top_p)
    n = 5000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, logprobs = sample(torch.tensor([LOGITS]).expand(n, -1), uniform, config)
    counts = torch.bincount(tokens, minlength=len(LOGITS)).tolist()
    for token, (count, probability) in enumerate(zip(counts, expected, strict=True)):
        assert abs(count - n * probability) <= 1.01, (token, count, n * probability)
        assert (count == 0) or probability > 0, f"token {token} is outside the kept set"
    drawn = torch.tensor(expected, dtype=torch.float64)[tokens].log()
    torch.testing.assert_close(logprobs.double(), drawn, atol=2e-6, rtol=0)
    # in order of the ids: a larger uniform never gives a smaller id
    assert (tokens.diff() >= 0).all()


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 6, 0.8)])
def test_frequencies_of_the_seeded_numbers(temperature: float, top_k: int, top_p: float):
    """Chi-square over 20,000 draws; 11 tokens leave 10 degrees of freedom, 35 is 1 in 10,000."""
    n = 20_000
    uniform = uniforms(3, [5, 6], 0, n)
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, _ = sample(torch.tensor([LOGITS]).expand(n, -1), uniform, config)
    counts = torch.bincount(tokens, minlength=len(LOGITS)).tolist()
    expected = enumerated(LOGITS, temperature, top_k, top_p)
    pairs = [(c, n * p) for c, p in zip(counts, expected, strict=True) if p > 0]
    assert sum(c for c, _ in pairs) == n
    assert sum((c - e) ** 2 / e for c, e in pairs) < 35


def test_nucleus_is_the_smallest_set_with_that_mass():
    logits = torch.tensor([[0.05, 0.5, 0.2, 0.25]]).log()
    grid = torch.linspace(0, NEARLY_ONE, 200, dtype=torch.float64)
    for top_p, kept in [
        (0.001, {1}), (0.499, {1}), (0.501, {1, 3}), (0.749, {1, 3}), (0.751, {1, 2, 3}),
        (0.949, {1, 2, 3}), (0.951, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3}),
    ]:  # fmt: skip
        tokens, _ = sample(logits.expand(200, -1), grid, SamplingConfig(top_p=top_p))
        assert set(tokens.tolist()) == kept, top_p


def test_top_p_1_and_top_k_0_keep_every_token_exactly():
    torch.manual_seed(0)
    logits = torch.randn(64, 2000) * 6
    uniform = torch.rand(64, dtype=torch.float64)
    tokens, logprobs = sample(logits, uniform, SamplingConfig())
    expected = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("vocab_size", [7, 255, 256, 257, 1000, 5 * 256])
def test_tokens_of_a_whole_vocabulary_are_those_of_one_running_sum(vocab_size: int):
    """The sampler sums blocks of 256 ids; sizes on and off their borders, sharp and flat rows."""
    generator = torch.Generator().manual_seed(vocab_size)
    scale = torch.linspace(0, 8, 400)[:, None]
    logits = torch.randn(400, vocab_size, generator=generator) * scale
    uniform = torch.rand(400, dtype=torch.float64, generator=generator)
    tokens, _ = sample(logits, uniform, SamplingConfig())
    cumulative = logits.double().softmax(-1).cumsum(-1)
    # a number within fp32 rounding of a border may fall on either side
    for shift in (-1e-6, 1e-6):
        near = (cumulative <= (uniform + shift)[:, None]).sum(-1).clamp(max=vocab_size - 1)
        assert ((tokens - near) * shift <= 0).all()
    assert len(set(tokens.tolist())) > min(vocab_size, 100) / 2


@pytest.mark.parametrize("config", [{}, {"top_p": 0.9}, {"top_k": 40}, {"top_k": 40, "top_p": 0.9}])
def test_a_rows_draw_does_not_depend_on_the_other_rows(config: dict):
    """Nuclei of one token and of most of the vocabulary side by side, and ties at the last place.

    Rows whose kept set outgrows the first candidates are drawn again: alone, not all rows.
    """
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 3000, generator=generator)
    logits *= torch.tensor([9.0, 0.1, 3.0, 0.0, 1.0, 30.0])[:, None]  # row 3: all tokens tied
    uniform = torch.rand(6, dtype=torch.float64, generator=generator)
    together = sample(logits, uniform, SamplingConfig(**config))
    for row in range(6):
        alone = sample(logits[row : row + 1], uniform[row : row + 1], SamplingConfig(**config))
        assert torch.equal(alone[0], together[0][row : row + 1])
        assert torch.equal(alone[1], together[1][row : row + 1])
    if "top_k" in config and "top_p" not in config:
        assert math.isclose(float(together[1][3]), -math.log(3000), abs_tol=1e-5), "ties are kept"


@pytest.mark.parametrize("config", [{}, {"top_p": 0.9}, {"top_k": 40}])
def test_without_logprobs_the_tokens_are_the_same(config: dict):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(50, 2000, generator=generator) * 3
    uniform = torch.rand(50, dtype=torch.float64, generator=generator)
    tokens, logprobs = sample(logits, uniform, SamplingConfig(**config), with_logprobs=False)
    assert logprobs is None
    assert torch.equal(tokens, sample(logits, uniform, SamplingConfig(**config))[0])


def test_top_k_1_is_greedy_with_certainty():
    torch.manual_seed(0)
    logits = torch.randn(50, 300)
    for uniform in (0.0, 0.5, NEARLY_ONE):
        numbers = torch.full((50,), uniform, dtype=torch.float64)
        tokens, logprobs = sample(logits, numbers, SamplingConfig(top_k=1))
        assert torch.equal(tokens, logits.argmax(-1))
        assert torch.equal(logprobs, torch.zeros(50))


@pytest.mark.parametrize("uniform", [0.0, 5e-324, 1e-300, 0.5, NEARLY_ONE])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
def test_extreme_numbers_stay_within_the_kept_set(uniform: float, top_p: float):
    """Also where the first and the last ids are impossible, and the sums do not round to 1."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, 5000, generator=generator) * 4
    logits[:, :7] = -torch.inf
    logits[:, -9:] = -torch.inf
    numbers = torch.full((200,), uniform, dtype=torch.float64)
    tokens, logprobs = sample(logits, numbers, SamplingConfig(top_p=top_p))
    assert logprobs.isfinite().all()
    assert (tokens >= 7).all()
    assert (tokens < 4991).all()
    for row in range(0, 200, 20):
        kept = enumerated(logits[row].tolist(), 1.0, 0, top_p)
        assert kept[int(tokens[row])] > 0


def test_half_precision_logits_are_drawn_in_fp32():
    logits = (torch.arange(500) / 100).bfloat16()[None].expand(500, -1)
    uniform = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    tokens, logprobs = sample(logits, uniform, SamplingConfig())
    assert logprobs.dtype == torch.float32
    expected, _ = sample(logits.float(), uniform, SamplingConfig())
    assert torch.equal(tokens, expected)


def test_numbers_depend_on_seed_prompt_and_completion_number():
    base = uniforms(7, [5, 6], 1, 50)
    assert torch.equal(base, uniforms(7, [5, 6], 1, 50))
    for other in [(8, [5, 6], 1), (7, [5, 6], 0), (7, [5], 1), (7, [6, 5], 1), (7, [5, 6, 0], 1)]:
        assert not (uniforms(*other, 50) == base).any(), other
    # numbers of one argument must not stand for another's
    assert not (uniforms(1, [5, 6], 7, 50) == base).any()
    assert not (uniforms(7, [1, 5, 6], 5, 50) == base).any()


def test_a_longer_limit_keeps_the_first_numbers():
    longest = uniforms(7, [5, 6], 1, 1000)
    for length in (1, 2, 63, 999):
        assert torch.equal(uniforms(7, [5, 6], 1, length), longest[:length])


def test_numbers_are_uniform():
    """Largest gap to the uniform distribution function over 20,000: 2 / sqrt(n) is 1 in 1,000."""
    numbers = torch.cat([uniforms(seed, [5], g, 100) for seed in range(50) for g in range(4)])
    assert numbers.dtype == torch.float64
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    n = len(numbers)
    gap = (numbers.sort().values - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max()
    assert gap < 2 / math.sqrt(n)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0; greedy decoding is top_k=1; got 0.0."),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"top_p": 0.0}, "top_p must be in (0, 1]; 1 keeps every token; got 0.0."),
        ({"top_p": 1.1}, "got 1.1."),
        ({"top_k": -1}, "top_k must be 0 (keep every token) or more; got -1."),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1; got 0."),
        ({"num_generations": 0}, "num_generations must be at least 1; got 0."),
        ({"stop": ["\n", ""]}, "must be a list of strings, none of them empty; got ['\\n', '']."),
        ({"stop": "END"}, "stop must be a list of strings, none of them empty; got 'END'."),
    ],
)
def test_wrong_settings_are_refused(setting: dict, message: str):
    with pytest.raises(ConfigError) as error:
        SamplingConfig(**setting)
    assert message in str(error.value)
