"""`opd memory`: exact where lifetimes are known, near the peak of a real run, no weights."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.common import EXACT_MEMORY
from benchmarks.memory import TINY, measured_bytes, predicted, write_qwen, write_world
from opd_lightning.cli import main
from opd_lightning.data import OPDDataModule
from opd_lightning.module import OPDModule
from opd_lightning.objectives import (
    HeadTailReverseKL,
    Objective,
    ReverseKL,
    SampledTokenReverseKL,
    TopKReverseKL,
)
from opd_lightning.policy import CausalPolicy, PolicySpec
from opd_lightning.rollout import RolloutCallback, SamplingConfig, TransformersEngine
from opd_lightning.rollout.cache import grown
from opd_lightning.tools.memory import MemoryEstimate, estimate_memory
from opd_lightning.tools.run_shape import Layout
from opd_lightning.tools.traced_run import TracedRun, faked
from tests.tiny import save_tiny

ADAMW = partial(torch.optim.AdamW, lr=1e-3)
PROMPTS, PROMPT_TOKENS, LIMIT = 8, 9, 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models as folders with a config.json and a tokenizer, and `whole` ones with weights."""
    folder = tmp_path_factory.mktemp("models")
    for name, layers in (("student", 2), ("teacher", 3)):
        save_tiny(folder / "whole" / name, num_hidden_layers=layers)
        shutil.copytree(folder / "whole" / name, folder / name)
        (folder / name / "model.safetensors").unlink()
    return folder


def estimate(
    models: Path,
    layout: Layout | None = None,
    engine: TransformersEngine | None = None,
    student: dict[str, Any] | None = None,
    completions: int = 1,
    val: str | None = None,
    **settings: Any,
) -> MemoryEstimate:
    settings = {"objective": TopKReverseKL(k=8), "optimizer": ADAMW} | settings
    module = OPDModule(
        PolicySpec(str(models / "student"), **(student or {})),
        str(models / "teacher"),
        **settings,
    )
    data = OPDDataModule(
        train="not-there.jsonl", val=val, prompts_per_step=PROMPTS, max_prompt_tokens=PROMPT_TOKENS
    )
    sampling = SamplingConfig(max_completion_length=LIMIT, num_generations=completions)
    rollout = RolloutCallback(sampling, engine=engine)
    return estimate_memory(module, data, rollout, layout or Layout())


def held(found: MemoryEstimate, phase: str) -> dict[str, int]:
    return next(p.held for p in found.phases if p.name == phase)


def size(model: nn.Module, itemsize: int = 4) -> int:
    return itemsize * sum(p.numel() for p in model.parameters())


def whole(models: Path, name: str) -> nn.Module:
    return PolicySpec(str(models / "whole" / name)).load()


def test_what_is_there_all_the_time_is_exact(models: Path):
    student, teacher = whole(models, "student"), whole(models, "teacher")
    found = estimate(models)
    steps = 4 * len(list(student.parameters()))  # AdamW's step counts
    for phase in found.phases:
        assert phase.held["parameters"] == size(student)
        assert phase.held["teacher"] == size(teacher)
    assert held(found, "rollout")["optimizer states"] == 2 * size(student) + steps
    assert held(found, "update")["optimizer states"] == 2 * size(student) + steps
    step = held(found, "optimizer")
    assert step["gradients"] == size(student)
    largest = max(p.numel() for p in student.parameters()) * 4
    extra = step["optimizer states"] - 2 * size(student) - steps
    assert largest <= extra <= 3 * largest, "one parameter at a time on a CPU"
    assert found.peak.total == max(p.total for p in found.phases)


def test_settings_that_change_weights_and_states(models: Path):
    student = whole(models, "student")
    sgd = estimate(models, optimizer=partial(torch.optim.SGD, lr=1e-3))
    assert held(sgd, "optimizer")["optimizer states"] < size(student) / 2
    half = estimate(models, Layout(precision="bf16-true"))
    assert held(half, "rollout")["parameters"] == size(student, 2)
    frozen = estimate(models, student={"freeze": ["embed_tokens"]})
    kept = size(student) - 4 * student.get_input_embeddings().weight.numel()
    assert held(frozen, "optimizer")["gradients"] == kept
    gpu = estimate(models, Layout(on_gpu=True))
    steps = 4 * len(list(student.parameters()))
    extra = held(gpu, "optimizer")["optimizer states"] - 2 * size(student) - steps
    assert extra >= size(student), "torch's foreach takes a copy of all parameters"


def test_processes_share_or_copy(models: Path):
    student, teacher = whole(models, "student"), whole(models, "teacher")
    ddp = estimate(models, Layout(2, "ddp"))
    assert held(ddp, "rollout")["gradient buckets"] == size(student)
    assert held(ddp, "rollout")["parameters"] == size(student)
    single = estimate(models)
    assert held(ddp, "rollout")["KV cache"] * 2 == held(single, "rollout")["KV cache"]
    fsdp = estimate(models, Layout(2, "fsdp"))
    assert held(fsdp, "update")["parameters"] == pytest.approx(size(student) / 2, rel=0.02)
    assert held(fsdp, "update")["teacher"] == pytest.approx(size(teacher) / 2, rel=0.02)
    assert held(fsdp, "optimizer")["gradients"] == pytest.approx(size(student) / 2, rel=0.02)
    assert held(fsdp, "rollout")["gathered weights"] == size(student)
    assert held(fsdp, "update")["gathered weights"] > 0
    copies = estimate(models, Layout(2, "fsdp", replicas=2))
    assert held(copies, "update")["parameters"] == size(student)
    offloaded = estimate(models, Layout(2, "fsdp", offload_student=True))
    assert held(offloaded, "optimizer")["gradients"] == 0
    bf16 = estimate(models, Layout(2, "fsdp", param_dtype="bfloat16"))
    assert held(bf16, "rollout")["gathered weights"] == size(student, 2)
    assert held(bf16, "update")["parameters"] == held(fsdp, "update")["parameters"]


@pytest.mark.parametrize("max_rows", [None, 5])
def test_the_cache_holds_every_row_to_its_limit(models: Path, max_rows: int | None):
    found = held(estimate(models, engine=TransformersEngine(max_rows), completions=4), "rollout")
    rows = max_rows or 4 * PROMPTS
    layers, heads, head_size = 2, 2, 8
    columns = grown(PROMPT_TOKENS, PROMPT_TOKENS + LIMIT - 1)
    cache = 4 * 2 * layers * heads * head_size * rows * columns
    drawn = rows * LIMIT * (8 + 8 + 4)
    assert found["KV cache"] == pytest.approx(cache + drawn, rel=0.01)
    linears = [m for m in whole(models, "student").modules() if isinstance(m, nn.Linear)]
    assert found["packed weights"] == sum(m.weight.numel() * 4 for m in linears)
    plain = estimate(models, engine=TransformersEngine(pack_weights=False))
    assert held(plain, "rollout")["packed weights"] == 0


def test_the_cache_grows_by_blocks():
    assert grown(10, 11) == grown(10, 138) == 138
    assert grown(10, 139) == grown(10, 267) == 267


class RealTensors(TracedRun):
    """The same passes on real models: what is alive then is what there really is."""

    def __init__(self, module: OPDModule, models: Path) -> None:
        super().__init__(module, Layout())
        self.student = CausalPolicy(PolicySpec(**vars(module.student_spec)).load())
        self.teacher = CausalPolicy(whole(models, "teacher")).requires_grad_(False)


@pytest.mark.parametrize(
    ("objective", "checkpointing"),
    [
        (TopKReverseKL(k=8), False),
        (HeadTailReverseKL(k=8), True),
        (ReverseKL(), False),
        (SampledTokenReverseKL(), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_fake_tensors_live_as_long_as_real_ones(
    models: Path, objective: Objective, checkpointing: bool
):
    spec = PolicySpec(
        str(models / "whole" / "student"),
        gradient_checkpointing=checkpointing,
        attn_implementation="eager",  # sdpa leaves the mask out where it sees that none is needed
    )
    module = OPDModule(spec, str(models / "whole" / "teacher"), objective, micro_batch_tokens=196)
    data = OPDDataModule(train="not-there", prompts_per_step=8, max_prompt_tokens=PROMPT_TOKENS)
    rollout = RolloutCallback(SamplingConfig(max_completion_length=LIMIT))
    work = estimate_memory(module, data, rollout, Layout()).work
    with faked(on_gpu=False):
        fake = TracedRun(module, Layout())._trace_update(work, work.micro_rows)
    real = RealTensors(module, models)._trace_update(work, work.micro_rows)
    assert fake["gradients"] == real["gradients"] == size(whole(models, "student"))
    assert fake.total() == pytest.approx(real.total(), rel=0.03)
    assert fake["activations"] == pytest.approx(real["activations"], rel=0.03)


def test_less_is_held_where_less_is_asked_for(models: Path):
    def activations(**settings: Any) -> int:
        return held(estimate(models, **settings), "update")["activations"]

    everything = activations()
    assert activations(student={"gradient_checkpointing": True}) < 0.8 * everything
    assert activations(micro_batch_tokens=100) < 0.4 * everything
    assert activations(mini_batches=4) < 0.4 * everything
    one, two = (estimate(models, micro_batch_tokens=t) for t in (PROMPTS * 49, PROMPTS * 49 // 2))
    assert (one.work.micro_rows, two.work.micro_rows) == (PROMPTS, PROMPTS // 2)


def test_auto_takes_the_most_that_fits(models: Path):
    smallest, largest = (
        held(estimate(models, micro_batch_tokens=tokens), "update").total() for tokens in (49, 392)
    )
    limit = (smallest + largest) / 2
    found = estimate(models, micro_batch_tokens="auto", memory_limit_gb=limit / 1e9)
    assert 1 < found.work.micro_rows < PROMPTS
    assert 0.8 * limit < held(found, "update").total() <= limit
    assert any("auto" in note and "fit" in note for note in found.notes)


def test_evaluation_reads_its_whole_batch(models: Path):
    found = estimate(models, val="not-there.jsonl")
    assert [p.name for p in found.phases][:2] == ["evaluation's rollout", "evaluation"]
    assert held(found, "evaluation")["loss"] > 0
    assert held(found, "evaluation")["gradients"] == 0


def run_memory(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    main(["memory", *args])
    return capsys.readouterr().out


def test_the_command_reads_configs_and_overrides(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_world(tmp_path, {}, str(models / "student"), str(models / "teacher"))
    options = ("--config", str(config), "--trainer.strategy", "ddp", "--gpus", "4")
    table = run_memory(capsys, *options)
    for part in ("GB per rank", "gradient buckets", "KV cache", "peak: ", "4 x CPU, ddp"):
        assert part in table
    said = json.loads(run_memory(capsys, *options, "--format", "json", "--model.mini_batches", "2"))
    assert said["work"]["mini_batches"] == 2 and said["layout"]["world_size"] == 4
    assert said["work"]["prompt_tokens"] > 20, "the longest prompt of the file"
    assert said["peak_bytes"] == max(sum(p.values()) for p in said["phases"].values())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--gpus", "3"], ["prompts_per_step=16 must be a multiple of the 3 processes"]),
        (["--gpus", "0"], ["--gpus must be at least 1; got 0"]),
        (["--model.objectiv", "ReverseKL"], ["objectiv", "objective"]),
    ],
)
def test_what_cannot_be_is_refused(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    parts: list[str],
):
    config = write_world(tmp_path, {}, str(models / "student"), str(models / "teacher"))
    with pytest.raises(SystemExit) as exit_:
        main(["memory", "--config", str(config), *options])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert all(part in said for part in parts), said


def test_a_large_model_needs_its_config_alone(tmp_path: Path):
    models = tmp_path
    for name in ("student", "teacher"):
        write_qwen(models / name)
    layout = Layout(8, "fsdp", on_gpu=True, param_dtype="bfloat16", reduce_dtype="float32")
    found = estimate(models, layout, student={"gradient_checkpointing": True})
    parameters = 7_615_616_512
    assert held(found, "rollout")["parameters"] == pytest.approx(parameters * 4 / 8, rel=1e-3)
    assert held(found, "rollout")["optimizer states"] == pytest.approx(parameters, rel=1e-3)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_the_peak_of_a_real_run_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in EXACT_MEMORY.items():
        monkeypatch.setenv(name, value)
    nothing = measured_bytes(write_world(made(tmp_path / "nothing"), {}))
    config = write_world(made(tmp_path / "tiny"), TINY)
    options = ("--model.objective", "ReverseKL", "--model.micro_batch_tokens", "512")
    measured = measured_bytes(config, *options) - nothing
    assert measured > 200e6, "large enough to see the models"
    assert predicted(config, *options)["peak_bytes"] == pytest.approx(measured, rel=0.15)
