"""A whole training step beside TRL's `DistillationTrainer`, interleaved, whole and by part.

    python benchmarks/step.py [--small]        # on a GPU where there is one

Each side trains in a process of its own that waits before every step; the steps are called in turn.
Both have the same student and teacher (random Llamas), prompts, optimiser, threads and fp32, both
generate with transformers, and completions have the same lengths on both sides, ended by EOS
(`ForcedLengths`). Before anything is timed, both must give the same loss on the same rollout.

Parts: rollout; teacher: the forward of its decoder; student and loss: the student's forward, both
output heads, the loss and the backward pass; optimiser: clipping and step; other: the rest of the
time from one step to the next, with loops, logging and data.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import common
from opd_lightning import (
    LocalTeacher,
    Objective,
    OPDDataModule,
    OPDModule,
    PromptBatch,
    ReverseKL,
    Rollout,
    RolloutCallback,
    SamplingConfig,
    TopKReverseKL,
)

PARTS = ("rollout", "teacher", "student and loss", "optimiser", "other")
TRL = "TRL, beta=1"
# name -> objective, optimiser steps between measures over the whole vocabulary
OURS: dict[str, tuple[Callable[[], Objective], int]] = {
    "TopKReverseKL(k=32)": (partial(TopKReverseKL, k=32), 0),
    "ReverseKL": (ReverseKL, 0),
    "TopKReverseKL(k=32), measured every step": (partial(TopKReverseKL, k=32), 1),
    "ReverseKL, measured every step": (ReverseKL, 1),
}
TARGETS = {"TopKReverseKL(k=32)": 2.5, "ReverseKL": 1.8}
TOLERANCE = 1e-5
SPREADS = ("uneven", "equal")
PAD, BOS, EOS = 0, 1, 2

SMALL = {
    "rows": 8,
    "longest": 64,
    "vocab_size": 32_000,
    "student": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8},
    "teacher": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 11},
    "learning_rate": 1e-5,
    # rows x padded length of a micro-batch of ours, by how the lengths are spread
    "micro_batch_tokens": {"uneven": 256, "equal": None},
    "variants": list(TARGETS),
    "warm_up": 1,
    "rounds": 3,
}
FULL = SMALL | {
    "rows": 16,
    "longest": 128,
    "micro_batch_tokens": {"uneven": 512, "equal": None},
    "variants": list(OURS),
    "rounds": 5,
}


# -------------------------------------------------------------------------- the same on both sides


def completion_lengths(spread: str, rows: int, longest: int) -> list[int]:
    """Return the tokens of each row's completion, EOS included, in a fixed mixed order.

    "uneven": quantiles of a log-normal distribution whose median is a quarter of `longest` and
    whose largest is `longest`; "equal": `longest` each.
    """
    if spread == "equal":
        return [longest] * rows
    scores = [NormalDist().inv_cdf((i + 0.5) / rows) for i in range(rows)]
    scale = math.log(4) / scores[-1]
    lengths = [max(1, round(longest / 4 * math.exp(scale * score))) for score in scores]
    random.Random(0).shuffle(lengths)
    return lengths


def prompt_lengths(rows: int) -> list[int]:
    """Return the tokens of each row's prompt."""
    return [8 + 5 * i % 17 for i in range(rows)]


def prompts(rows: int, vocab_size: int, rounds: int) -> list[list[int]]:
    """Return `rounds` times `rows` prompts; prompt i's ids are i modulo `rows`."""
    draw = random.Random(0)
    lengths = prompt_lengths(rows)
    return [_tokens(draw, row, lengths[row], rows, vocab_size) for row in [*range(rows)] * rounds]


def _tokens(draw: random.Random, row: int, length: int, rows: int, vocab_size: int) -> list[int]:
    """Return ids that are `row` modulo `rows`, none of them special."""
    return [rows * draw.randrange(1, vocab_size // rows) + row for _ in range(length)]


class ForcedLengths:
    """Makes the completion of row i `lengths[i]` tokens long, EOS included, in any generation loop.

    It needs no state between the steps of a generation, so that rows may be sorted, padded and
    dropped: which row it is stands in the newest token, which is i modulo the number of rows (the
    prompt's tokens are, and only such tokens are drawn), and how far it is in the position. The
    output head's logits get -inf at all other ids, and at the last step at all but EOS. Forward
    passes without a cache, those of training, are left alone.
    """

    def __init__(self, lengths: list[int], vocab_size: int) -> None:
        rows = len(lengths)
        ends = [p + n - 2 for p, n in zip(prompt_lengths(rows), lengths, strict=True)]
        self._ends = torch.tensor(ends)
        self._bias = torch.full((rows + 1, vocab_size), -torch.inf)
        for row in range(rows):
            self._bias[row, rows + row :: rows] = 0.0
        self._bias[rows, EOS] = 0.0
        self._which: Tensor | None = None

    def attach(self, model: PreTrainedModel) -> None:
        """Put the hooks on the decoder and on the output head."""
        self._ends, self._bias = self._ends.to(model.device), self._bias.to(model.device)
        model.base_model.register_forward_pre_hook(self._remember, with_kwargs=True)
        model.get_output_embeddings().register_forward_hook(self._force)

    def _remember(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._which = None
        if kwargs.get("past_key_values") is not None:
            ids = kwargs["input_ids"] if args == () else args[0]
            row = ids[:, -1] % len(self._ends)
            ended = kwargs["position_ids"][:, -1] == self._ends[row]
            self._which = row.masked_fill(ended, len(self._ends))

    def _force(self, head: nn.Module, args: tuple, logits: Tensor) -> None:
        if self._which is not None:
            logits[:, -1] += self._bias[self._which]


def save_models(folder: Path, sizes: dict[str, Any]) -> dict[str, int]:
    """Write `student` and `teacher` with one tokenizer of the words t3, t4, …; count parameters."""
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    plain = [f"t{i}" for i in range(len(special), sizes["vocab_size"])]
    vocabulary = {word: i for i, word in enumerate([*special.values(), *plain])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)
    counts = {}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            **sizes[name],
            vocab_size=sizes["vocab_size"],
            num_attention_heads=sizes[name]["hidden_size"] // 64,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
        model = LlamaForCausalLM(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        counts[name] = model.num_parameters()
    return counts


# --------------------------------------------------------------------------------------- processes


class Turns:
    """A training process's side: each step waits for its turn and reports when the next one starts.

    A step's time is from its turn to the moment when the next step could start.
    """

    def __init__(self) -> None:
        # what libraries print must not come between the answers
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._device = common.device()
        self._started: float | None = None
        self._memory: common.PeakMemory | None = None
        self.parts: dict[str, float] = {}
        self.lengths: list[int] = []

    def ready(self) -> None:
        """Say what memory the libraries alone take."""
        self._say({"baseline_bytes": 0 if self._gpu else common.resident_bytes()})

    def next(self) -> None:
        """Report the step that ended, if any, and wait for the turn of the next one."""
        if self._started is not None:
            seconds = common.now(self._device) - self._started
            parts = {**self.parts, "other": seconds - sum(self.parts.values())}
            highest = self._memory.highest_bytes()
            self._memory.__exit__(None, None, None)
            self._say(
                {
                    "seconds": seconds,
                    "parts": parts,
                    "lengths": sorted(self.lengths),
                    "highest_bytes": highest,
                }
            )
        if sys.stdin.readline().strip() != "step":
            os._exit(0)
        self.parts = {}
        self._memory = common.PeakMemory(self._device).__enter__()
        self._started = common.now(self._device)

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return `work`, its seconds counted as `part`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = common.now(self._device)
            result = work(*args, **kwargs)
            self.add(part, common.now(self._device) - started)
            return result

        return run

    def add(self, part: str, seconds: float) -> None:
        """Count seconds as `part` of this step."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    @property
    def _gpu(self) -> bool:
        return self._device.type == "cuda"

    def _say(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)


class Side:
    """The benchmark's end of a training process."""

    def __init__(self, name: str, spread: str, folder: Path, sizes: dict[str, Any]) -> None:
        self.name = name
        self._log = (folder / f"{len(list(folder.glob('*.log')))}.log").open("w+")
        given = {"name": name, "spread": spread, "folder": str(folder), "sizes": sizes}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step", "--process", json.dumps(given)],
            cwd=common.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.baseline_bytes = 0
        self._expected = sorted(completion_lengths(spread, sizes["rows"], sizes["longest"]))

    def wait_until_ready(self) -> None:
        """Hear what memory it takes before it loads anything."""
        self.baseline_bytes = self._hear()["baseline_bytes"]

    def step(self) -> dict[str, Any]:
        """Let it do one step and return what it reports."""
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        report = self._hear()
        if report["lengths"] != self._expected:
            raise common.BenchmarkError(
                f"{self.name}: completions of {report['lengths']} tokens, where both sides should "
                f"have {self._expected}. Does its engine go past the model's decoder or head?"
            )
        return report

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _hear(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise common.BenchmarkError(
                f"{self.name} ended with code {self._process.returncode}:\n"
                f"{self._log.read()[-3000:]}"
            )
        return json.loads(line)


def train(name: str, spread: str, folder: str, sizes: dict[str, Any]) -> None:
    """Train in this process, step by step as it is told to."""
    turns = Turns()
    lengths = completion_lengths(spread, sizes["rows"], sizes["longest"])
    force = ForcedLengths(lengths, sizes["vocab_size"])
    rounds = sizes["warm_up"] + sizes["rounds"] + 1
    if name == TRL:
        _train_trl(turns, force, Path(folder), sizes, rounds)
    else:
        _train_ours(turns, force, Path(folder), sizes, rounds, *_ours(name, spread, sizes))


# -------------------------------------------------------------------------------------------- ours


def _ours(name: str, spread: str, sizes: dict[str, Any]) -> tuple[Objective, dict[str, Any]]:
    objective, metrics_every = OURS[name]
    options = {
        "metrics_every": metrics_every,
        "micro_batch_tokens": sizes["micro_batch_tokens"][spread],
    }
    return objective(), options


def _module(
    folder: Path, sizes: dict[str, Any], objective: Objective, options: dict[str, Any]
) -> OPDModule:
    optimizer = partial(torch.optim.AdamW, lr=sizes["learning_rate"], weight_decay=0.0, fused=True)
    return OPDModule(
        str(folder / "student"),
        LocalTeacher(str(folder / "teacher")),
        objective,
        optimizer=optimizer,
        **options,
    )


class _Kept(DummyLogger):
    """Keeps what was logged last."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.values = metrics


def _trainer(folder: Path, logger: _Kept, callbacks: list[L.Callback], steps: int) -> L.Trainer:
    return L.Trainer(
        accelerator="gpu" if common.device().type == "cuda" else "cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=logger,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


class _TakeTurns(L.Callback):
    """Waits before each step, before its rollout; hands over what the module's clock measured."""

    def __init__(self, turns: Turns, force: ForcedLengths, logger: _Kept) -> None:
        self.turns, self.force, self.logger = turns, force, logger

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.force.attach(pl_module.student.model)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.turns.next()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        names = ("rollout", "teacher", "student", "optimizer")
        for part, name in zip(PARTS, names, strict=False):
            self.turns.add(part, self.logger.values[f"perf/{name}_seconds"])
        self.turns.lengths = batch.rollout.completion_lengths.tolist()


def _train_ours(
    turns: Turns,
    force: ForcedLengths,
    folder: Path,
    sizes: dict[str, Any],
    rounds: int,
    objective: Objective,
    options: dict[str, Any],
) -> None:
    turns.ready()
    logger = _Kept()
    callbacks = [
        _TakeTurns(turns, force, logger),
        RolloutCallback(SamplingConfig(max_completion_length=sizes["longest"])),
    ]
    data = OPDDataModule(
        train=str(folder / "prompts.jsonl"), prompts_per_step=sizes["rows"], shuffle=False
    )
    module = _module(folder, sizes, objective, options)
    _trainer(folder, logger, callbacks, rounds).fit(module, data)


# --------------------------------------------------------------------------------------------- TRL


def _trl_trainer(folder: Path, sizes: dict[str, Any], rounds: int, callbacks: list[Any]) -> Any:
    """Return TRL's trainer; its defaults except where they would make it slower or differ."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DistillationConfig, DistillationTrainer

    config = DistillationConfig(
        output_dir=str(folder / "trl"),
        beta=1.0,
        max_completion_length=sizes["longest"],
        per_device_train_batch_size=sizes["rows"],
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=common.device().type != "cuda",
        max_steps=rounds,
        learning_rate=sizes["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        shuffle_dataset=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    texts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    return DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(texts),
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
        callbacks=callbacks,
    )


def _train_trl(
    turns: Turns, force: ForcedLengths, folder: Path, sizes: dict[str, Any], rounds: int
) -> None:
    from transformers import TrainerCallback
    from trl import DistillationTrainer  # noqa: F401  counted with the libraries

    class TakeTurns(TrainerCallback):
        since: float

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.next()

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            turns.add("optimiser", common.now(common.device()) - self.since)

    turns.ready()
    taking = TakeTurns()
    trainer = _trl_trainer(folder, sizes, rounds, [taking])
    force.attach(trainer.model)
    generate = turns.timed("rollout", trainer._generate_and_score_completions)
    hidden, step = trainer._get_last_hidden_state, trainer.training_step
    teacher_hidden = turns.timed("teacher", hidden)

    def kept_lengths(*args: Any, **kwargs: Any) -> dict[str, Any]:
        rollout = generate(*args, **kwargs)
        turns.lengths = rollout["completion_mask"].sum(1).tolist()
        return rollout

    def of_either(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        is_teacher = model is trainer.accelerator.unwrap_model(trainer.teacher_model)
        return (teacher_hidden if is_teacher else hidden)(model, *args, **kwargs)

    def whole(*args: Any, **kwargs: Any) -> Tensor:
        started = common.now(common.device())
        loss = step(*args, **kwargs)
        taking.since = common.now(common.device())
        inside = turns.parts["rollout"] + turns.parts["teacher"]
        turns.add("student and loss", taking.since - started - inside)
        return loss

    trainer._generate_and_score_completions = kept_lengths
    trainer._get_last_hidden_state = of_either
    trainer.training_step = whole
    trainer.train()


# ------------------------------------------------------------------------------- the loss is equal


def losses(folder: str, sizes: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return loss and gradient norm of both sides on a rollout of random tokens, by spread."""
    return {spread: _losses(folder, spread, sizes) for spread in SPREADS}


def _losses(folder: str, spread: str, sizes: dict[str, Any]) -> dict[str, float]:
    draw = random.Random(1)
    rows, vocab_size = sizes["rows"], sizes["vocab_size"]
    lengths = completion_lengths(spread, rows, sizes["longest"])
    given = prompts(rows, vocab_size, 1)
    answers = [[*_tokens(draw, i, n - 1, rows, vocab_size), EOS] for i, n in enumerate(lengths)]
    ours = _our_loss(Path(folder), sizes, given, answers, _ours("ReverseKL", spread, sizes))
    theirs = _trl_loss(Path(folder), sizes, given, answers)
    found = {"tokens": sum(lengths)}
    for name in ours:
        found |= {
            f"{name}_ours": ours[name],
            f"{name}_trl": theirs[name],
            f"{name}_relative_difference": abs(ours[name] / theirs[name] - 1),
        }
    return found


def _our_loss(
    folder: Path,
    sizes: dict[str, Any],
    given: list[list[int]],
    answers: list[list[int]],
    ours: tuple[Objective, dict[str, Any]],
) -> dict[str, float]:
    """Take one step of OPDModule on the rollout and return what it logs."""
    batch = PromptBatch.from_token_ids(given)
    batch.rollout = Rollout.from_completions(batch, answers, truncated=[False] * len(answers))
    logger = _Kept()
    trainer = _trainer(folder, logger, [], steps=1)
    trainer.fit(_module(folder, sizes, *ours), DataLoader([batch], batch_size=None))
    return {name: float(logger.values[name]) for name in ("loss", "grad_norm")}


def _trl_loss(
    folder: Path, sizes: dict[str, Any], given: list[list[int]], answers: list[list[int]]
) -> dict[str, float]:
    """Return the loss that TRL's trainer computes for the rollout, and its gradient's norm."""
    from trl.trainer.utils import pad

    trainer = _trl_trainer(folder, sizes, 1, [])
    device = trainer.accelerator.device
    inputs = {"num_items_in_batch": torch.tensor(float(sum(map(len, answers))), device=device)}
    for name, ids, side in (("prompt", given, "left"), ("completion", answers, "right")):
        rows = [torch.tensor(row, device=device) for row in ids]
        inputs[f"{name}_ids"] = pad(rows, padding_value=PAD, padding_side=side)
        ones = [torch.ones_like(row) for row in rows]
        inputs[f"{name}_mask"] = pad(ones, padding_value=0, padding_side=side)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), math.inf)
    return {"loss": float(loss), "grad_norm": float(norm)}


# ---------------------------------------------------------------------------------------- the runs


def run(small: bool = False) -> dict[str, Any]:
    """Check the losses, then time the steps, with uneven and with equal lengths.

    Raises:
        BenchmarkError: If the losses differ, a side fails, or its completions have other lengths.
    """
    return measure(SMALL if small else FULL)


def measure(sizes: dict[str, Any]) -> dict[str, Any]:
    """As `run`, with other sizes."""
    result: dict[str, Any] = {"sizes": sizes, "targets": TARGETS, "cases": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result["parameters"] = save_models(folder, sizes)
        rounds = sizes["warm_up"] + sizes["rounds"] + 1
        with (folder / "prompts.jsonl").open("w") as lines:
            for ids in prompts(sizes["rows"], sizes["vocab_size"], rounds):
                prompt = " ".join(f"t{i}" for i in ids)
                print(json.dumps({"prompt": prompt}), file=lines)
        result["check"] = common.run_case(losses, folder=str(folder), sizes=sizes)
        for spread, check in result["check"].items():
            _check_equal(check, spread)
        for spread in SPREADS:
            result["cases"][spread] = _interleaved(spread, folder, sizes)
    return common.settings(result)


def _check_equal(check: dict[str, float], spread: str) -> None:
    for name in ("loss", "grad_norm"):
        if not check[f"{name}_relative_difference"] <= TOLERANCE:
            raise common.BenchmarkError(
                f"{name} on the same rollout ({spread} lengths): ours {check[f'{name}_ours']}, "
                f"TRL's {check[f'{name}_trl']}; they may differ by {TOLERANCE} relative. "
                "Times of different computations are no comparison."
            )


def _interleaved(spread: str, folder: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    sides: list[Side] = []
    try:
        for name in [TRL, *sizes["variants"]]:
            sides.append(Side(name, spread, folder, sizes))
        for side in sides:
            side.wait_until_ready()
        for side in sides:
            for _ in range(sizes["warm_up"]):
                side.step()
        found = common.interleave({side.name: side.step for side in sides}, sizes["rounds"])
    finally:
        for side in sides:
            side.stop()
    baselines = {side.name: side.baseline_bytes for side in sides}
    return _summary(found, baselines)


def _summary(found: dict[str, list[dict[str, Any]]], baselines: dict[str, int]) -> dict[str, Any]:
    """Return seconds, parts and memory of each side, and TRL's over ours."""
    cases = {}
    for name, steps in found.items():
        seconds = [step["seconds"] for step in steps]
        peak = max(step["highest_bytes"] for step in steps) - baselines[name]
        parts = {part: median(step["parts"].get(part, 0.0) for step in steps) for part in PARTS}
        cases[name] = {
            "seconds": median(seconds),
            "seconds_of_steps": seconds,
            "parts": parts,
            "peak_bytes": peak,
            "lengths": steps[0]["lengths"],
        }
    theirs = cases[TRL]
    for case in cases.values():
        case["time_ratio"] = common.ratio(theirs["seconds_of_steps"], case["seconds_of_steps"])
        case["memory_ratio"] = theirs["peak_bytes"] / case["peak_bytes"]
    return cases


def table(result: dict[str, Any]) -> str:
    """Return the checks and one table for each spread of lengths, as Markdown."""
    sizes, blocks = result["sizes"], []
    # fp32: both models; of the student also the gradient and AdamW's two averages
    fixed = 4 * (4 * result["parameters"]["student"] + result["parameters"]["teacher"])
    for spread, cases in result["cases"].items():
        check = result["check"][spread]
        lengths = cases[TRL]["lengths"]
        rows = []
        for name, case in cases.items():
            target = result["targets"].get(name)
            rows.append(
                [
                    name,
                    case["seconds"],
                    f"{case['time_ratio']:.2f}×" + (f" (target {target}×)" if target else ""),
                    *(case["parts"][part] for part in PARTS),
                    f"{common.mib(case['peak_bytes']):.0f}",
                    f"{case['memory_ratio']:.2f}×",
                    f"{common.mib(case['peak_bytes'] - fixed):.0f}",
                ]
            )
        header = ["", "step, s", "TRL / it", *(f"{p}, s" for p in PARTS), "peak, MiB", "TRL / it"]
        header.append("beyond weights, gradients and AdamW, MiB")
        blocks.append(
            f"{spread.capitalize()} lengths: {sizes['rows']} rows, {lengths[0]} to {lengths[-1]} "
            f"tokens, median {median(lengths):.0f}, median of {sizes['rounds']} steps. Loss on the "
            f"same rollout: ours {check['loss_ours']:.7f}, TRL's {check['loss_trl']:.7f} (relative "
            f"difference {check['loss_relative_difference']:.0e}; of the gradient's norm "
            f"{check['grad_norm_relative_difference']:.0e}).\n\n{common.markdown(header, rows)}"
        )
    return "\n\n".join(blocks)


def main() -> None:
    """Print the tables, or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.process:
        train(**json.loads(given.process))
        return
    started = time.perf_counter()
    result = run(given.small)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))
    print(table(result))
    print(f"\n{time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
