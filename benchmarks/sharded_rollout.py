"""Rollouts of a sharded student: weights gathered once a rollout, or at each token.

python benchmarks/sharded_rollout.py [--tokens 32]     (starts two gloo processes of one thread)

Prints a JSON line: medians of the seconds of one rollout in four turns, of
- `once`: all weights gathered on entry (what TransformersEngine does),
- `each_token`: root and layers gathered for each forward pass, all processes in step, as
  transformers' `synced_gpus` has it,
- `whole`: not sharded, every process holds the model.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import LlamaConfig, LlamaForCausalLM

from opd_lightning.policy import CausalPolicy, PolicySpec
from opd_lightning.records import PromptBatch
from opd_lightning.rollout import SamplingConfig, TransformersEngine, transformers_engine
from opd_lightning.sharding import Sharding, gathered, load_policy

_PROCESSES, _PORT, _TURNS = 2, "29731", 4
_SHAPE = {
    "vocab_size": 8000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
}
_ROWS = 8
_forward = transformers_engine._forward


class _Stepping(CausalPolicy):
    def step(self, *args: torch.Tensor) -> torch.Tensor:
        return _forward(self, *args)


def _seconds(policy: CausalPolicy, tokens: int, each_token: bool) -> float:
    if each_token:
        transformers_engine.gathered = lambda policy: nullcontext()
        transformers_engine._forward = lambda policy, *args: policy.step(*args)
    else:
        transformers_engine.gathered = gathered
        transformers_engine._forward = _forward
    prompts = PromptBatch.from_token_ids([list(range(5, 21 + row)) for row in range(_ROWS)])
    engine = TransformersEngine(pack_weights=False)
    torch.distributed.barrier()
    started = time.perf_counter()
    engine.generate(policy, prompts, SamplingConfig(max_completion_length=tokens), seed=0)
    return time.perf_counter() - started


def _measure(folder: Path, tokens: int) -> dict[str, float]:
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (_PROCESSES,))
    spec, device = PolicySpec(str(folder)), torch.device("cpu")
    policies = {}
    for name, sharding in (("sharded", Sharding(mesh, device)), ("whole", None)):
        policy = load_policy(spec, device, sharding)
        policy.model.generation_config.eos_token_id = []  # so that all rows run to the limit
        policies[name] = policy
    sharded = policies["sharded"]
    sharded.step = _Stepping.step.__get__(sharded)
    register_fsdp_forward_method(sharded, "step")
    turns: dict[str, list[float]] = {"once": [], "each_token": [], "whole": []}
    for _ in range(_TURNS + 1):
        turns["once"].append(_seconds(sharded, tokens, each_token=False))
        turns["each_token"].append(_seconds(sharded, tokens, each_token=True))
        turns["whole"].append(_seconds(policies["whole"], tokens, each_token=False))
    return {name: statistics.median(values[1:]) for name, values in turns.items()}


def main() -> None:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--folder")
    given = parser.parse_args()
    if given.folder:
        measured = _measure(Path(given.folder), given.tokens)
        if torch.distributed.get_rank() == 0:
            print(json.dumps({"tokens": given.tokens, "rows": _ROWS} | measured))
        torch.distributed.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**_SHAPE)).save_pretrained(folder)
        command = [sys.executable, __file__, "--folder", folder, "--tokens", str(given.tokens)]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _PORT, "WORLD_SIZE": str(_PROCESSES)}
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        running = [
            subprocess.Popen(command, env={**os.environ, **group, **threads, "RANK": str(rank)})
            for rank in range(_PROCESSES)
        ]
        sys.exit(max(process.wait() for process in running))


if __name__ == "__main__":
    main()
