"""Scores of completions become rewards where the data can be checked, on all ranks or none."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from opd_lightning.data import OPDDataModule
from opd_lightning.errors import ConfigError
from opd_lightning.objectives import Mixture, OutcomeReward, ReverseKL
from opd_lightning.records import PromptBatch, Rollout
from opd_lightning.rollout import RolloutCallback, SamplingConfig
from opd_lightning.rollout.callback import completion_texts, score_rollout
from opd_lightning.tasks import Task, Verifiers
from tests.module.harness import csv_logger, fit, logged, module, save_pair, until
from tests.tiny import tiny_tokenizer


class Vowels(Task):
    """The share of vowels: a score that random models reach."""

    def score(self, completion: str, answer: str | None) -> float:
        return sum(c in answer for c in completion) / max(1, len(completion))


class Seen(L.Callback):
    def __init__(self) -> None:
        self.batches: list[PromptBatch] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches.append(args[3])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("models"))


def data(folder: Path, tasks: list[str], answer: str | None = "aeiou") -> OPDDataModule:
    rows = [{"prompt": f"a{i}", "task": t, "answer": answer} for i, t in enumerate(tasks)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return OPDDataModule(str(path), prompts_per_step=len(tasks), shuffle=False)


def answering(**settings: object) -> RolloutCallback:
    sampling = SamplingConfig(max_completion_length=6, num_generations=2)
    return RolloutCallback(sampling, **settings)


def test_rewards_are_the_scores_and_zero_where_there_is_no_verifier(models: Path, tmp_path: Path):
    seen = Seen()
    rollout = answering(tasks={"letters": Vowels()})
    model = module(models, Mixture([ReverseKL(), OutcomeReward()], [1.0, 0.1]))
    rows = data(tmp_path, ["letters", "default", "letters", "letters"])
    fit(model, rows, rollout, seen, **until(1), logger=csv_logger(tmp_path))
    (batch,) = seen.batches
    texts = completion_texts(batch.rollout, model.tokenizer)
    scores = [Vowels().score(text, "aeiou") for text in texts]
    assert len(texts) == 8 and any(scores)
    scores[2] = scores[3] = 0.0
    assert batch.rollout.reward.tolist() == pytest.approx(scores)
    assert "loss/OutcomeReward" in logged(tmp_path)[0]


def test_siblings_are_held_to_the_answer_of_their_prompt():
    tokenizer = tiny_tokenizer()
    batch = PromptBatch.from_token_ids([[5], [6, 7]], task=["exactmatch", "exactmatch"])
    batch.answer = ["ab", "cd"]
    said = [tokenizer.encode(text) for text in ("ab", "cd", "ab", "cd")]
    batch.rollout = Rollout.from_completions(batch, said, [False] * 4)
    assert score_rollout(Verifiers(), batch, tokenizer) == [1.0, 0.0, 0.0, 1.0]


def test_a_registered_name_is_enough(models: Path, tmp_path: Path):
    seen = Seen()
    train = OPDDataModule("task:Arithmetic:3:7", prompts_per_step=3)
    fit(module(models), train, answering(), seen, **until(1))
    assert seen.batches[0].rollout.reward.shape == (6,)
    assert all(answer.lstrip("-").isdigit() for answer in seen.batches[0].answer)


@pytest.mark.parametrize(("tasks", "answer"), [(["other"], "1"), (["arithmetic"], None)])
def test_without_a_verifier_or_answers_there_is_no_reward(
    models: Path, tmp_path: Path, tasks: list[str], answer: str | None
):
    seen = Seen()
    fit(module(models), data(tmp_path, tasks, answer), answering(), seen, **until(1))
    assert seen.batches[0].rollout.reward is None


def test_a_batch_without_scored_rows_still_has_rewards(models: Path, tmp_path: Path):
    """Or a rank that got it would stop where the others go on."""
    seen = Seen()
    rows = data(tmp_path, ["default", "arithmetic"])
    rows.prompts_per_step = 1
    fit(module(models), rows, answering(), seen, **until(2))
    assert [batch.rollout.reward.shape for batch in seen.batches] == [(2,), (2,)]


def test_a_task_that_the_data_does_not_have_is_refused(models: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"names 'letter'.*Did you mean letters\?"):
        fit(module(models), data(tmp_path, ["letters"]), answering(tasks={"letter": Vowels()}))


@pytest.mark.parametrize("spec", [
    "task:Arithmetic", "task:Arithmetic:0", "task:Arithmetic:x", "task:Arithmetic:1:2:3",
])  # fmt: skip
def test_a_wrong_spec_of_task_prompts_is_refused(models: Path, spec: str):
    with pytest.raises(ConfigError, match=r"task:NAME:NUMBER"):
        fit(module(models), OPDDataModule(spec, prompts_per_step=1), answering())


def test_a_wrong_task_name_lists_the_known(models: Path):
    with pytest.raises(ConfigError, match=r"'Arithmetik' is not known\. Did you mean Arithmetic\?"):
        fit(module(models), OPDDataModule("task:Arithmetik:3", prompts_per_step=1), answering())
