"""Held-out measures, predictions, and runs on a dataset's own completions."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_lightning.callbacks import PredictionWriter
from opd_lightning.data import OPDDataModule
from opd_lightning.errors import ConfigError
from opd_lightning.records import PromptBatch, Rollout
from tests.module.harness import (
    QUIET,
    L,
    answered,
    csv_logger,
    fit,
    loader,
    logged,
    module,
    rollouts,
    until,
    weights,
    write_prompts,
)
from tests.tiny import tiny_tokenizer


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(ids[None]).logits[0, :-1]


def nothing() -> PromptBatch:
    """What a rank gets where a round has fewer prompts than ranks."""
    batch = PromptBatch.from_token_ids([])
    batch.rollout = Rollout.from_completions(batch, [], [])
    return batch


def test_held_out_measures_are_means_over_all_tokens(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    batches = [answered((5, 2), seed=1), nothing(), answered((9,), seed=2)]
    batches[0].rollout.truncated[1] = True
    trainer = L.Trainer(**QUIET | {"logger": csv_logger(tmp_path)})
    (returned,) = trainer.test(module(models), loader(*batches))
    assert "test/kl/reverse" in capsys.readouterr().out, "and printed"
    divergences, entropies, theirs = [], [], []
    for batch in batches:
        for ids, real, mask in zip(
            batch.rollout.input_ids,
            batch.rollout.attention_mask,
            batch.rollout.completion_mask,
            strict=True,
        ):
            row = ids[: int(real.sum())]
            chosen = mask[1 : len(row)]
            p = logits(models / "student", row)[chosen].double().log_softmax(1)
            q = logits(models / "teacher", row)[chosen].double().log_softmax(1)
            divergences += (p.exp() * (p - q)).sum(1).tolist()
            entropies += (-p.exp() * p).sum(1).tolist()
            theirs += (-q.exp() * q).sum(1).tolist()
    (line,) = logged(tmp_path)
    assert len(divergences) == 16
    expected = {
        "test/kl/reverse": sum(divergences) / 16,
        "test/entropy": sum(entropies) / 16,
        "test/teacher/entropy": sum(theirs) / 16,
        "test/completions/mean_length": 16 / 3,
        "test/completions/clipped_ratio": 1 / 3,
    }
    assert {k: line[k] for k in expected} == pytest.approx(expected, rel=1e-4)
    assert returned == pytest.approx(line, rel=1e-6)


def test_predictions_of_no_prompts_are_none(models: Path):
    trainer = L.Trainer(**QUIET)
    none, some = trainer.predict(module(models), loader(nothing(), answered((1, 2))))
    assert none == []
    assert [len(record["token_ids"]) for record in some] == [1, 2]


def test_validation_draws_and_leaves_the_training_alone(models: Path, tmp_path: Path):
    """With validation and without, the weights are the same."""
    prompts = write_prompts(tmp_path / "p.jsonl", 6)
    ends = []
    for val in (None, prompts):
        model = module(models)
        data = OPDDataModule(prompts, val=val, prompts_per_step=2)
        options = until(4, **({} if val is None else {"val_check_interval": 1}))
        fit(model, data, rollouts(), **options)
        ends.append(weights(model))
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_predictions_are_those_of_direct_scoring(models: Path, tmp_path: Path):
    prompts = write_prompts(tmp_path / "p.jsonl", 5, task="letters")
    data = OPDDataModule(predict=prompts, prompts_per_step=2)
    path = tmp_path / "out" / "records.jsonl"
    callbacks = [rollouts(6), PredictionWriter(str(path))]
    callbacks[0].evaluation.num_generations = 2
    trainer = L.Trainer(**QUIET | {"logger": csv_logger(tmp_path)}, callbacks=callbacks)
    returned = trainer.predict(module(models), datamodule=data)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert records == [record for batch in returned for record in batch]
    assert [(r["index"], r["generation"]) for r in records] == [
        (i, g) for i in range(5) for g in range(2)
    ]
    tokenizer = tiny_tokenizer()
    for record in records:
        assert record["task"] == "letters"
        prompt = tokenizer.encode(record["prompt"])
        assert tokenizer.decode(prompt) == record["prompt"]
        ids = torch.tensor(prompt + record["token_ids"])
        here = torch.arange(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]
        for whose in ("student", "teacher"):
            direct = logits(models / whose, ids).log_softmax(1)[here]
            assert record[f"{whose}_logprobs"] == pytest.approx(direct.tolist(), abs=2e-5)
        assert record["tokens"] == [tokenizer.decode([i]) for i in record["token_ids"]]
        ended = record["token_ids"][-1] == tokenizer.eos_token_id
        assert record["truncated"] is not ended
        assert record["completion"] == tokenizer.decode(
            record["token_ids"], skip_special_tokens=True
        )
    assert len({tuple(r["token_ids"]) for r in records}) > 5
    capped = [r for r in records if r["truncated"]]
    assert all(len(r["token_ids"]) == 6 for r in capped)


def test_a_dataset_with_completions_trains_without_a_rollout_callback(models: Path, tmp_path: Path):
    path = write_prompts(tmp_path / "p.jsonl", 6, completion="five and six")
    model = module(models, mini_batches=2)
    data = OPDDataModule(path, val=path, prompts_per_step=2)
    fit(model, data, logger=csv_logger(tmp_path), **until(6, check_val_every_n_epoch=1))
    lines = logged(tmp_path)
    (length,) = {line["completions/mean_length"] for line in lines if "loss" in line}
    ids = tiny_tokenizer().encode("five and six")
    assert length == len(ids) + 1, "its end token counts"
    assert all(
        line["perf/rollout_seconds"] == 0 for line in lines if "perf/rollout_seconds" in line
    )
    before = module(models)
    trainer = L.Trainer(**QUIET)
    (start,) = trainer.validate(before, datamodule=data, verbose=False)
    (end,) = [line for line in lines if "val/kl/reverse" in line]
    assert end["val/kl/reverse"] < start["val/kl/reverse"]


def test_without_completions_and_callback_a_run_is_refused(models: Path, tmp_path: Path):
    data = OPDDataModule(write_prompts(tmp_path / "p.jsonl", 6), prompts_per_step=2)
    with pytest.raises(ConfigError, match="no completions to train on"):
        fit(module(models), data, **until(1))
