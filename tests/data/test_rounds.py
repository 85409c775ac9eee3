"""Order and sharing: properties that hold for any seed, position and number of ranks."""

import pytest

from opd_lightning.data.rounds import EvalRounds, TrainRounds
from opd_lightning.errors import ConfigError


def _union(rounds_of_ranks: list, position: int) -> list[int]:
    return [i for rounds in rounds_of_ranks for i in rounds.indices(position)]


def _interleaved(rounds_of_ranks: list, position: int) -> list[int]:
    shares = zip(*(rounds.indices(position) for rounds in rounds_of_ranks), strict=True)
    return [i for share in shares for i in share]


@pytest.mark.parametrize("world_size", [2, 3, 6])
@pytest.mark.parametrize("shuffle", [True, False])
def test_round_is_the_same_for_any_number_of_ranks(world_size: int, shuffle: bool):
    single = TrainRounds(20, 6, seed=3, shuffle=shuffle)
    ranks = [TrainRounds(20, 6, 3, shuffle, rank, world_size) for rank in range(world_size)]
    for position in range(10):
        assert _interleaved(ranks, position) == single.indices(position)
        assert all(len(rounds.indices(position)) == 6 // world_size for rounds in ranks)


def test_epoch_takes_each_prompt_once_and_leaves_the_rest_over():
    rounds = TrainRounds(20, 6)
    assert len(rounds) == 3
    epochs = [[i for r in range(3) for i in rounds.indices(3 * e + r)] for e in range(4)]
    assert all(len(set(epoch)) == 18 and max(epoch) < 20 for epoch in epochs)
    assert len({frozenset(range(20)) - frozenset(epoch) for epoch in epochs}) > 1
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_depends_on_seed_and_position_alone():
    forwards = [TrainRounds(20, 4, seed=1).indices(position) for position in range(15)]
    rounds = TrainRounds(20, 4, seed=1)
    backwards = [rounds.indices(position) for position in reversed(range(15))]
    assert forwards == backwards[::-1]
    assert forwards != [TrainRounds(20, 4, seed=2).indices(position) for position in range(15)]
    # seed + epoch would make these two the same permutation
    assert TrainRounds(20, 20, seed=0).indices(1) != TrainRounds(20, 20, seed=1).indices(0)


def test_file_order_without_shuffle():
    rounds = TrainRounds(5, 2, shuffle=False)
    assert [rounds.indices(p) for p in range(3)] == [[0, 1], [2, 3], [0, 1]]


def test_refused_sizes():
    with pytest.raises(ConfigError, match=r"prompts_per_step=8 .*3 ranks\. .*multiple of 3.* 9"):
        TrainRounds(20, 8, world_size=3)
    with pytest.raises(ConfigError, match=r"prompts_per_step=8 but the training data has 7"):
        TrainRounds(7, 8)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_prompts", [1, 4, 8, 9, 11])
def test_evaluation_takes_all_prompts_once_in_order(world_size: int, num_prompts: int):
    ranks = [EvalRounds(num_prompts, 4, rank, world_size) for rank in range(world_size)]
    assert {len(rounds) for rounds in ranks} == {-(-num_prompts // 4)}
    taken = [i for position in range(len(ranks[0])) for i in _union(ranks, position)]
    assert taken == list(range(num_prompts))


def test_evaluation_rank_may_have_none():
    assert [EvalRounds(1, 4, rank, 2).indices(0) for rank in range(2)] == [[], [0]]
