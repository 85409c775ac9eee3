"""What a served teacher gives, and what it says when asked for more."""

import pytest
import torch

from opd_lightning.distributions import TopKDistribution
from opd_lightning.errors import ConfigError

IDS = torch.tensor([[4, 1, 0], [2, 3, 5]])
LOGPROBS = torch.tensor([[-0.5, -1.5, -3.0], [-0.1, -4.0, -5.0]])
SAMPLED = torch.tensor([-1.5, -9.0])


def served() -> TopKDistribution:
    return TopKDistribution(IDS, LOGPROBS, SAMPLED)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_topk_gives_the_first_k(k: int):
    ids, logprobs = served().topk(k)
    assert torch.equal(ids, IDS[:, :k])
    assert torch.equal(logprobs, LOGPROBS[:, :k])


def test_logprobs_of_the_sampled_tokens_and_number_of_tokens():
    assert torch.equal(served().logprobs(torch.tensor([1, 0])), SAMPLED)
    assert served().num_tokens == 2
    assert served().provides == "topk"


def test_more_than_it_has_is_refused_with_both_numbers_and_two_ways_out():
    with pytest.raises(ConfigError, match=r"top 4 .*gives 3.*Lower the objective's k or have"):
        served().topk(4)


def test_logprobs_of_chosen_ids_are_refused_and_the_working_objectives_listed():
    with pytest.raises(
        ConfigError, match=r"top 3 .*\(2, 3\).*SampledTokenReverseKL.*TopKReverseKL"
    ):
        served().logprobs(IDS)


@pytest.mark.parametrize("name", ["entropy", "logsumexp", "reverse_kl", "logits_at", "read"])
def test_reads_of_the_whole_vocabulary_are_refused_by_name(name: str):
    with pytest.raises(ConfigError, match=rf"'{name}' needs the whole vocabulary.*top 3.*HeadTail"):
        getattr(served(), name)()


def test_shapes_that_do_not_agree_are_refused_with_all_shapes():
    with pytest.raises(ConfigError, match=r"\[N, K\].*\(2, 3\), \(2, 2\) and \(2,\)"):
        TopKDistribution(IDS, LOGPROBS[:, :2], SAMPLED)
    with pytest.raises(ConfigError, match=r"\(2, 3\), \(2, 3\) and \(1,\)"):
        TopKDistribution(IDS, LOGPROBS, SAMPLED[:1])


def test_non_finite_numbers_vanish_only_where_ignored():
    logprobs, sampled = LOGPROBS.clone(), SAMPLED.clone()
    logprobs[0, 1], logprobs[1, 2], sampled[0], sampled[1] = (
        torch.nan,
        -torch.inf,
        torch.nan,
        -torch.inf,
    )
    clean = TopKDistribution(IDS, logprobs, sampled).finite_where_ignored(
        torch.tensor([True, False])
    )
    ids, kept = clean.topk(3)
    assert torch.equal(ids, IDS)
    assert kept[0].isfinite().all() and torch.equal(kept[0, [0, 2]], LOGPROBS[0, [0, 2]])
    assert torch.equal(kept[1], logprobs[1])
    assert clean.logprobs(torch.tensor([1, 0])).tolist() == [0.0, -torch.inf]
