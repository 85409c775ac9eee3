"""Compares `opd memory` with the peak memory of real runs on a CPU, and prints a table.

    python benchmarks/memory.py            # the 135 M model of `make models` too: 6 GB, minutes
    python benchmarks/memory.py --tiny     # random models of 14 M parameters alone
    python benchmarks/memory.py --planned  # no runs: the table for Qwen2.5-7B on 8 GPUs of 80 GB

Measured is the largest resident size of a process of the run, less that of the same command on a
model of 20 kB: the interpreter, torch, transformers, Lightning and its loggers. Freed memory goes
back to the system at once; `--default-allocator` leaves the holes that glibc keeps.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import Qwen2Config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import EXACT_MEMORY  # noqa: E402
from tests.tiny import save_tiny  # noqa: E402

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
TINY = {
    "vocab_size": 8000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
_NEGLIGIBLE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}
# Starts the command from a small process, for the kernel counts the size of the process that starts
# another as the other's. Prints the largest of it and of those that it waited for, in KiB.
_LAUNCHER = """import os, subprocess, sys
run = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(run.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))"""
_PROMPTS = ["Why is the sky blue?", "Name a fruit.", "What is 2 + 2, and why? Say it in words."]


@dataclass(frozen=True)
class Setting:
    """A run to predict and to measure.

    Attributes:
        name: In the table.
        model: "tiny" or "135M".
        options: Of `opd fit`, over the configuration that all share.
    """

    name: str
    model: str
    options: Sequence[str] = field(default_factory=tuple)


_REVERSE = ("--model.objective", "ReverseKL")
_CHECKPOINTING = ("--model.student.gradient_checkpointing", "true")
_TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
_PLAIN_SGD = ("--model.optimizer", "SGD", "--model.optimizer.lr", "1e-4")


def _small(tokens: int) -> tuple[str, str]:
    return ("--model.micro_batch_tokens", str(tokens))


SETTINGS = [
    Setting("top-K", "tiny"),
    Setting("top-K, micro-batches", "tiny", _small(512)),
    Setting("reverse KL", "tiny", _REVERSE),
    Setting("reverse KL, checkpointing", "tiny", (*_REVERSE, *_CHECKPOINTING)),
    Setting("reverse KL, micro-batches, 2 DDP", "tiny", (*_REVERSE, *_small(512), *_TWO)),
    Setting("top-K, micro-batches", "135M", _small(256)),
    Setting("top-K, one micro-batch", "135M"),
    Setting("top-K, one, checkpointing", "135M", _CHECKPOINTING),
    Setting("reverse KL, micro-batches", "135M", (*_REVERSE, *_small(256))),
    Setting("reverse KL, one, checkpointing", "135M", (*_REVERSE, *_CHECKPOINTING)),
    Setting("reverse KL, SGD, 2 DDP", "135M", (*_REVERSE, *_small(256), *_PLAIN_SGD, *_TWO)),
]


def write_world(folder: Path, shape: dict[str, int], student: str = "", teacher: str = "") -> Path:
    """Write models where none are named, prompts and a configuration; return its path."""
    for name in () if student else ("student", "teacher"):
        save_tiny(folder / name, **shape)
    lines = [json.dumps({"prompt": f"{_PROMPTS[i % 3]} {i}"}) for i in range(32)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "model": {
            "student": {"path": student or str(folder / "student")},
            "teacher": teacher or str(folder / "teacher"),
            "objective": {"class_path": "TopKReverseKL", "init_args": {"k": 32}},
        },
        "data": {"train": str(folder / "train.jsonl"), "prompts_per_step": 16},
        "rollout": {"sampling": {"top_p": 0.9, "max_completion_length": 48}},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 2,
            "max_epochs": -1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": str(folder / "runs"),
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def measured_bytes(config: Path, *options: str) -> int:
    """Return the largest resident size of a process of `opd fit`.

    Raises:
        RuntimeError: If the run fails, with the end of what it wrote.
    """
    command = [sys.executable, "-m", "opd_lightning.cli", "fit", "--config", str(config), *options]
    with tempfile.TemporaryFile() as output:
        run = subprocess.run(
            [sys.executable, "-S", "-c", _LAUNCHER, *command],
            cwd=ROOT,
            env=os.environ | _ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=output,
            check=False,
        )
        output.seek(0)
        if run.returncode != 0:
            raise RuntimeError(f"{command} failed:\n{output.read().decode()[-3000:]}")
    return int(run.stdout) * 1024


def predicted(config: Path, *options: str) -> dict:
    """Return what `opd memory --format json` says."""
    command = [sys.executable, "-m", "opd_lightning.cli", "memory", "--config", str(config)]
    done = subprocess.run(
        [*command, *options, "--format", "json"],
        cwd=ROOT,
        env=os.environ | _ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def compare(settings: Sequence[Setting], folder: Path) -> None:
    """Print predicted and measured peaks, a line as soon as it is known."""
    configs = {"tiny": write_world(_made(folder / "tiny"), TINY)}
    models = ROOT / "models"
    if (models / "student").is_dir():
        own = _made(folder / "135M")
        student, teacher = str(models / "student"), str(models / "teacher")
        configs["135M"] = write_world(own, {}, student, teacher)
    nothing = measured_bytes(write_world(_made(folder / "nothing"), _NEGLIGIBLE))
    print(f"without a model to speak of: {nothing / 1e6:.0f} MB\n")
    print("| model | setting | peak in | predicted, MB | measured, MB | predicted / measured |")
    print("| --- | --- | --- | ---: | ---: | ---: |", flush=True)
    for setting in settings:
        if setting.model not in configs:
            print(f"| {setting.model} | {setting.name} | not run: make models | | | |")
            continue
        estimate = predicted(configs[setting.model], *setting.options)
        said = estimate["peak_bytes"]
        found = measured_bytes(configs[setting.model], *setting.options) - nothing
        print(
            f"| {setting.model} | {setting.name} | {estimate['peak_phase']} | {said / 1e6:.0f} | "
            f"{found / 1e6:.0f} | {said / found:.2f} |",
            flush=True,
        )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ------------------------------------------------------------------------------- Qwen2.5-7B


def write_qwen(folder: Path) -> str:
    """Write the config of Qwen2.5-7B, as published, without weights; return the folder."""
    Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return str(folder)


def plan(folder: Path) -> None:
    """Print the table of a 7B student and a 7B teacher on 8 GPUs of 80 GB under FSDP2."""
    model = write_qwen(folder / "qwen")
    config = {
        "model": {
            "student": {"path": model, "gradient_checkpointing": True},
            "teacher": {
                "class_path": "LocalTeacher",
                "init_args": {"path": model, "dtype": "bfloat16"},
            },
            "objective": {"class_path": "TopKReverseKL", "init_args": {"k": 32}},
        },
        "data": {"train": "none.jsonl", "prompts_per_step": 64, "max_prompt_tokens": 1024},
        "rollout": {"sampling": {"max_completion_length": 4096, "num_generations": 4}},
        "trainer": {
            "strategy": {
                "class_path": "opd_lightning.strategy.FSDP2Strategy",
                "init_args": {"param_dtype": "bfloat16", "reduce_dtype": "float32"},
            }
        },
    }
    (folder / "qwen.yaml").write_text(yaml.safe_dump(config))
    rows = {}
    names: list[str] = []
    for objective in ("TopKReverseKL", "ReverseKL"):
        for tokens in (5120, 20480, 81920):
            for checkpointing in (True, False)[: 2 if tokens == 5120 else 1]:
                estimate = predicted(
                    folder / "qwen.yaml",
                    *("--gpus", "8", "--model.objective", objective, *_small(tokens)),
                    *("--model.student.gradient_checkpointing", str(checkpointing).lower()),
                )
                rows[objective, tokens, checkpointing] = estimate["phases"]
                names += [n for held in estimate["phases"].values() for n in held]
    names = [n for n in dict.fromkeys(names) if any(p["update"].get(n) for p in rows.values())]
    print("| objective | tokens | checkpointing | " + " | ".join(names) + " | update | rollout |")
    print("| --- | ---: | --- |" + " ---: |" * (len(names) + 2))
    for (objective, tokens, checkpointing), phases in rows.items():
        update, rollout = (_total(phases[name]) for name in ("update", "rollout"))
        cells = [f"{phases['update'].get(name, 0) / 1e9:.1f}" for name in names]
        print(
            f"| {objective} | {tokens} | {'yes' if checkpointing else 'no'} | "
            f"{' | '.join(cells)} | {update:.1f} | {rollout:.1f} |"
        )


def _total(held: dict[str, int]) -> float:
    return sum(held.values()) / 1e9


def main() -> None:
    """Parse the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="random models alone")
    parser.add_argument("--default-allocator", action="store_true", help="with glibc's holes")
    parser.add_argument("--planned", action="store_true", help="Qwen2.5-7B on 8 GPUs; no runs")
    given = parser.parse_args()
    if not given.default_allocator:
        _ENVIRONMENT.update(EXACT_MEMORY)
    with tempfile.TemporaryDirectory() as folder:
        if given.planned:
            plan(Path(folder))
        else:
            chosen = [s for s in SETTINGS if s.model == "tiny" or not given.tiny]
            compare(chosen, Path(folder))


if __name__ == "__main__":
    main()
