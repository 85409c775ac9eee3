"""The data module with and without a Trainer, from YAML, and what it refuses before training."""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from transformers import PreTrainedTokenizerFast

from opd_lightning.data import OPDDataModule
from opd_lightning.errors import ConfigError
from tests.data.two_ranks import Recorder
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]


def _trainer(folder: Path, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def _prompts(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"What is {i}?"} for i in range(count)]


def test_all_stages_with_a_trainer(
    tmp_path: Path, write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast
):
    data = OPDDataModule(
        train=write_jsonl(*_prompts(6)),
        val=write_jsonl(*_prompts(3), name="val.jsonl"),
        test=write_jsonl(*_prompts(5), name="test.jsonl"),
        prompts_per_step=2,
        shuffle=False,
    )
    module = Recorder(tokenizer)
    trainer = _trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=data)
    assert module.seen["train"] == [[0, 1], [2, 3], [4, 5]] * 2
    assert module.seen["val"] == [[0, 1], [2]] * 2
    trainer.test(module, datamodule=data)
    assert module.seen["test"] == [[0, 1], [2, 3], [4]]
    trainer.predict(module, datamodule=data)
    assert module.seen["predict"] == module.seen["test"]


def test_without_a_trainer(write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast):
    spec = write_jsonl(*_prompts(5))
    data = OPDDataModule(val=spec, eval_prompts_per_step=4)
    data.prepare(tokenizer)
    assert [batch.num_prompts for batch in data.val_dataloader()] == [4, 1]
    assert data.test_dataloader().table is data.val_dataloader().table
    assert data.predict_dataloader().table is data.val_dataloader().table
    with pytest.raises(ConfigError, match=r"data\.train is None and not prepared"):
        data.train_dataloader()


def test_each_fit_uses_the_tokenizer_of_its_module(tmp_path: Path, write_jsonl: Callable[..., str]):
    data = OPDDataModule(train=write_jsonl(*_prompts(2)), prompts_per_step=2)
    lengths = []
    for chat_template in (True, False):
        module = Recorder(tiny_tokenizer(chat_template))
        _trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
        lengths.append(len(data.tables["train"][0].prompt_ids))
    assert lengths[0] > lengths[1]
    data.tokenizer = tiny_tokenizer(chat_template=True)
    _trainer(tmp_path, max_steps=1).fit(Recorder(None), datamodule=data)
    assert len(data.tables["train"][0].prompt_ids) == lengths[0]


def test_training_without_validation(
    tmp_path: Path, write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast
):
    module = Recorder(tokenizer)
    data = OPDDataModule(train=write_jsonl(*_prompts(4)), prompts_per_step=2)
    _trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
    assert set(module.seen) == {"train"} and len(module.seen["train"]) == 1


def test_reloading_keeps_the_place_and_a_new_fit_starts_anew(
    tmp_path: Path, write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast
):
    data = OPDDataModule(train=write_jsonl(*_prompts(6)), prompts_per_step=2, seed=3)
    seen = []
    for reload_every in (0, 1):
        module = Recorder(tokenizer)
        options = {"reload_dataloaders_every_n_epochs": reload_every}
        _trainer(tmp_path, max_epochs=3, **options).fit(module, datamodule=data)
        seen.append(module.seen["train"])
    assert seen[0] == seen[1]
    assert seen[0][:3] != seen[0][3:6]


def test_limited_epochs_continue_through_the_data(
    tmp_path: Path, write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast
):
    data = OPDDataModule(train=write_jsonl(*_prompts(6)), prompts_per_step=2, shuffle=False)
    module = Recorder(tokenizer)
    _trainer(tmp_path, max_epochs=3, limit_train_batches=2).fit(module, datamodule=data)
    assert module.seen["train"] == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3], [4, 5]]


def test_refused_before_the_model_is_configured(
    tmp_path: Path, write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast
):
    class NeverConfigured(Recorder):
        def configure_model(self) -> None:
            raise AssertionError("the model was built before the data was checked")

    def message(module: L.LightningModule, data: OPDDataModule, **options: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            _trainer(tmp_path, max_steps=1, **options).fit(module, datamodule=data)
        return str(caught.value)

    good, broken = write_jsonl(*_prompts(8)), write_jsonl('{"prompt": 1}', name="b.jsonl")
    module = NeverConfigured(tokenizer)
    assert "b.jsonl:1" in message(module, OPDDataModule(train=good, val=broken))
    assert "data.train is not given" in message(module, OPDDataModule(val=good))
    few = message(module, OPDDataModule(train=good, prompts_per_step=9))
    assert "prompts_per_step=9" in few and "8" in few
    no_tokenizer = message(NeverConfigured(None), OPDDataModule(train=good))
    assert "NeverConfigured has no attribute 'tokenizer'" in no_tokenizer
    context = message(NeverConfigured(tokenizer, context_length=9), OPDDataModule(train=good))
    assert "prompts.jsonl:1" in context and "context of 9" in context
    assert "overfit_batches=1" in message(module, OPDDataModule(train=good), overfit_batches=1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prompts_per_step": 0}, r"data\.prompts_per_step is 0\. Give at least 1"),
        ({"eval_prompts_per_step": 0}, r"data\.eval_prompts_per_step is 0"),
        ({"max_prompt_tokens": -1}, r"data\.max_prompt_tokens is -1"),
        ({"num_workers": -1}, r"data\.num_workers is -1\. Give at least 0"),
        ({"overlong": "drp"}, r"data\.overlong is 'drp'\. Did you mean drop\? Known: drop, error"),
    ],
)
def test_refused_arguments(options: dict, expected: str):
    with pytest.raises(ConfigError, match=expected):
        OPDDataModule(train="a.jsonl", **options)


def test_overlong_is_reported_once(
    write_jsonl: Callable[..., str], caplog: pytest.LogCaptureFixture
):
    spec = write_jsonl(*_prompts(3), {"prompt": "z" * 200})
    data = OPDDataModule(val=spec, max_prompt_tokens=100)
    with caplog.at_level(logging.WARNING, logger="opd_lightning"):
        data.prepare(tiny_tokenizer())
    assert [record.getMessage() for record in caplog.records] == [
        f"1 of 4 prompts of {spec} exceed max_prompt_tokens=100: dropped"
    ]


def test_constructor_is_the_configuration():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(OPDDataModule, "data")
    text = (
        "data: {train: a.jsonl, overlong: truncate, chat_template_kwargs: {enable_thinking: false}}"
    )
    config = parser.parse_string(text)
    data = parser.instantiate(config).data
    assert (data.overlong, data.chat_template_kwargs) == ("truncate", {"enable_thinking": False})
    assert parser.parse_string(parser.dump(config)) == config
    with pytest.raises(Exception, match="overlong"):
        parser.parse_string("data: {overlong: drp}")


def test_two_ranks_share_the_rounds_even_if_lightning_may_replace_samplers(
    tmp_path: Path, write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast
):
    data = OPDDataModule(
        train=write_jsonl(*_prompts(7)),
        val=write_jsonl(*_prompts(5), name="val.jsonl"),
        prompts_per_step=4,
        seed=2,
    )
    single = Recorder(tokenizer)
    _trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(single, datamodule=data)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.data.two_ranks", str(tmp_path)],
            env={**environment, "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    train = [
        [index for share in zip(*shares, strict=True) for index in share]
        for shares in zip(*(r["train"] for r in ranks), strict=True)
    ]
    val = [first + second for first, second in zip(*(r["val"] for r in ranks), strict=True)]
    assert {"train": train, "val": val} == single.seen
    assert [] in ranks[0]["val"], "premise: a rank with an empty batch"
