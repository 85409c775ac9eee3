"""`opd` on two processes, by the YAML files that are layered over a run."""

import json
from pathlib import Path

import yaml
from transformers import AutoModelForCausalLM

from opd_lightning.checkpoints import is_sharded, load_checkpoint
from tests.cli.conftest import ROOT, run_opd, world  # noqa: F401  (a fixture)
from tests.module.harness import distance

TWO = ["--trainer.accelerator", "cpu", "--trainer.devices", "2"]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_sharded_run_leaves_what_any_run_does_and_ddp_reads_it(world: Path, tmp_path: Path):  # noqa: F811
    config = ["--config", str(world / "run.yaml")]
    folder = ["--trainer.default_root_dir", str(tmp_path)]
    done = run_opd(
        *("fit", *config, "--config", "configs/trainer/fsdp.yaml", *TWO, *folder),
        *("--trainer.max_steps", "2", "--trainer.strategy.reshard_after_forward", "false"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out, before -> after 2 steps") == 1, "said by one rank"
    (run,) = tmp_path.glob("version_*")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    logged = (run / "metrics.csv").read_text().splitlines()
    assert len(logged) == 1 + 2 + 2 + 1, "header, updates, evaluations, diagnostics"
    checkpoint = next(path for path in (run / "checkpoints").iterdir() if is_sharded(path))
    state = load_checkpoint(checkpoint)["state_dict"]
    state = {name.removeprefix("student.model."): value for name, value in state.items()}
    model = AutoModelForCausalLM.from_pretrained(run / "student")
    assert distance(model.state_dict(), state) == 0

    written = []
    for name, more in (("ddp", TWO), ("single", [])):
        layer = ["--config", f"configs/trainer/{name}.yaml", *more]
        folder = ["--trainer.default_root_dir", str(tmp_path / name)]
        done = run_opd("predict", *config, *layer, *folder, "--ckpt_path", str(checkpoint))
        assert done.returncode == 0, done.stderr
        (found,) = (tmp_path / name).rglob("*.jsonl")
        written.append(lines(found))
    ddp, single = written
    assert [line["index"] for line in single] == [0, 1, 2, 3]
    for line, expected in zip(ddp, single, strict=True):
        assert {k: v for k, v in line.items() if "logprobs" not in k} == {
            k: v for k, v in expected.items() if "logprobs" not in k
        }


def test_the_layers_are_valid_over_the_quickstart():
    for name in ("single", "ddp", "fsdp"):
        layer = f"configs/trainer/{name}.yaml"
        done = run_opd(
            "fit", "--config", "configs/quickstart.yaml", "--config", layer, "--print_config"
        )
        assert done.returncode == 0, done.stderr
        given = yaml.safe_load((ROOT / layer).read_text())["trainer"]
        assert yaml.safe_load(done.stdout)["trainer"]["accelerator"] == given["accelerator"]
