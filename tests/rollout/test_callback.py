"""RolloutCallback in a real Trainer: what it fills, with which seeds, and how it fails."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from opd_lightning.errors import ConfigError, RunError
from opd_lightning.policy import CausalPolicy
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.rollout import RolloutCallback, SamplingConfig, TransformersEngine
from opd_lightning.rollout.callback import round_seed
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = [[5, 6, 7], [40, 41], [90]]


class Student(L.LightningModule):
    """Keeps the batches that it is given; its weights never move."""

    def __init__(self, name: str = "llama", **config: object) -> None:
        super().__init__()
        self.student = CausalPolicy(tiny_model(name, **config), tiny_tokenizer())
        self.seen: dict[str, list[PromptBatch]] = {
            stage: [] for stage in ("train", "val", "test", "predict")
        }
        self.updates_per_batch = 1
        self.automatic_optimization = False

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen["train"].append(batch)
        for _ in range(self.updates_per_batch):
            self.optimizers().step()

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen["val"].append(batch)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen["test"].append(batch)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen["predict"].append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def loader(batches: int = 1, prompts: list[list[int]] = PROMPTS) -> DataLoader:
    """The same prompts in each batch, so that only seeds can make completions differ."""
    data = [PromptBatch.from_token_ids(prompts) for _ in range(batches)]
    for number, batch in enumerate(data):
        batch.index = torch.arange(len(prompts)) + 100 * (number + 1)
    return DataLoader(data, batch_size=None)


def trainer(callback: RolloutCallback, max_steps: int = 3) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=1,
        num_sanity_val_steps=0,
    )


def callback(**kwargs: object) -> RolloutCallback:
    return RolloutCallback(SamplingConfig(max_completion_length=6, num_generations=2), **kwargs)


def tokens(batch: PromptBatch) -> list[int]:
    return batch.rollout.token_ids.tolist()


def test_every_loop_gets_its_completions():
    module, rollouts = Student(), callback()
    runner = trainer(rollouts)
    runner.fit(module, loader(3), loader())
    runner.test(module, loader(), verbose=False)
    runner.predict(module, loader(), return_predictions=False)
    train, val = module.seen["train"], module.seen["val"]
    assert (len(train), len(val)) == (3, 3)
    assert all(batch.rollout.num_rows == 6 for batch in train), "two siblings a prompt"
    others = val + module.seen["test"] + module.seen["predict"]
    assert all(batch.rollout.num_rows == 3 for batch in others), "one completion a prompt"
    assert all(batch.rollout_seconds > 0 for batch in train + others)

    first, second, third = map(tokens, train)
    assert first != second != third != first, "the seed moves with the optimiser steps"
    assert len({tuple(tokens(batch)) for batch in others}) == 1, "evaluation draws the same"


def test_training_draws_with_the_seed_of_its_optimiser_step():
    for seed in (0, 3):
        module, rollouts = Student(), callback(seed=seed)
        module.updates_per_batch = 2
        trainer(rollouts, max_steps=4).fit(module, loader(2))
        for step, batch in zip((0, 2), module.seen["train"], strict=True):
            expected: Rollout = TransformersEngine().generate(
                module.student, batch, rollouts.sampling, round_seed(seed, step)
            )
            assert tokens(batch) == expected.token_ids.tolist()


def test_evaluation_has_its_own_sampling():
    rollouts = callback(evaluation=SamplingConfig(max_completion_length=2, num_generations=3))
    module = Student()
    trainer(rollouts).validate(module, loader(), verbose=False)
    (batch,) = module.seen["val"]
    assert batch.rollout.num_rows == 9
    assert int(batch.rollout.completion_lengths.max()) == 2


def test_evaluation_defaults_to_the_training_settings_and_one_completion():
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, stop=["x"], num_generations=4)
    rollouts = RolloutCallback(sampling)
    assert rollouts.evaluation == SamplingConfig(temperature=0.7, top_p=0.9, stop=["x"])
    assert rollouts.sampling.num_generations == 4
    assert RolloutCallback().sampling == SamplingConfig()


@pytest.mark.parametrize("long_prompt", [[5] * 30, [5, 9999]])
def test_a_failed_rollout_names_engine_and_lines(long_prompt: list[int]):
    """Beyond GPT-2's 32 places, and an id that the embedding has not: torch's IndexError."""
    module = Student("gpt2", max_position_embeddings=32)
    data = loader(2, [[5, 6], long_prompt])
    with pytest.raises(RunError) as error:
        trainer(callback()).fit(module, data)
    message = str(error.value)
    assert "TransformersEngine failed on 2 prompts (lines [100, 101])" in message
    assert "index out of range" in message
    assert "The last checkpoint is intact" in message
    assert isinstance(error.value.__cause__, IndexError)


def test_a_configuration_error_stays_one():
    module = Student()
    module.student.tokenizer = None
    rollouts = RolloutCallback(SamplingConfig(stop=["END"]))
    with pytest.raises(ConfigError, match="need a tokenizer"):
        trainer(rollouts).fit(module, loader())


def test_seeds_of_rounds_differ():
    pairs = [(seed, number) for seed in range(20) for number in [*range(200), 2**40]]
    seeds = {round_seed(*pair) for pair in pairs}
    assert len(seeds) == len(pairs)
    assert all(0 <= seed < 2**63 for seed in seeds)
