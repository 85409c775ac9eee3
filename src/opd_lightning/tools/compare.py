"""`opd compare`: two students on the same prompts, with the same random numbers."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opd_lightning.callbacks.evaluate import Evaluate, add_scores, score_records
from opd_lightning.callbacks.predictions import json_lines
from opd_lightning.data import OPDDataModule
from opd_lightning.errors import ConfigError
from opd_lightning.metrics import Comparison, Estimate, compare_pairs
from opd_lightning.metrics.success import PromptMetric
from opd_lightning.module import OPDModule
from opd_lightning.policy import CausalPolicy, Tokenizer
from opd_lightning.rollout import RolloutCallback
from opd_lightning.sharding import load_policy
from opd_lightning.tools.export import load_checkpoint, student_of


@dataclass(frozen=True)
class Finding:
    """One metric of one task for both students.

    Attributes:
        task: Name in the data.
        metric: `avg@4`, `success_rate` or `pass@4`.
        prompts: How many both have answered.
        first: The first student's estimate.
        second: The second's.
        comparison: Second minus first, prompt by prompt.
    """

    task: str
    metric: str
    prompts: int
    first: Estimate
    second: Estimate
    comparison: Comparison


def compare(
    first: str,
    second: str,
    module: OPDModule,
    data: OPDDataModule,
    rollout: RolloutCallback | None,
    evaluate: Evaluate,
    out: Path | None = None,
) -> list[Finding]:
    """Return a finding for each task and metric, on the test prompts (by default, `data.val`).

    Completion g of a prompt is drawn with the same random numbers by both students, and prompts are
    drawn in pairs by the bootstrap: what they have in common drops out of the difference.

    Args:
        first: A checkpoint of `opd fit`, or a Hugging Face folder.
        second: The same; differences are second minus first.
        module: Says how a student is loaded; its tokenizer serves checkpoints.
        data: The prompts.
        rollout: Gives what `evaluate` leaves open.
        evaluate: How to sample and score.
        out: Folder for `first.jsonl`, `second.jsonl` (completions with scores) and
            `comparison.json`; None: nothing is written.

    Raises:
        ConfigError: If a student, the prompts or their scores are missing, or the two tokenizers
            leave other prompts.
    """
    evaluate.complete(rollout)
    if data.sources["test"] is None:
        raise ConfigError(
            "opd compare needs prompts, but neither data.test nor data.val is given. Give a file "
            "with the columns prompt, task and answer."
        )
    # both are looked for before the first is run
    for path in (first, second):
        if not is_model(path) and not Path(path).exists():
            raise ConfigError(
                f"{path!r} is neither a checkpoint nor a Hugging Face folder: it does not exist."
            )
    measured = []
    for name, path in {"first": first, "second": second}.items():
        metrics, records = _measure(path, module, data, evaluate)
        measured.append(metrics)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{name}.jsonl").write_text(json_lines(records), encoding="utf-8")
    findings = [
        _finding(task, metric, *(side[task][metric] for side in measured))
        for task in measured[0]
        for metric in measured[0][task]
    ]
    if out is not None:
        (out / "comparison.json").write_text(as_json(first, second, findings, evaluate) + "\n")
    return findings


def is_model(path: str) -> bool:
    """Return whether there is a Hugging Face folder at `path`."""
    return (Path(path) / "config.json").is_file()


def _measure(
    path: str, module: OPDModule, data: OPDDataModule, evaluate: Evaluate
) -> tuple[dict[str, dict[str, PromptMetric]], list[dict[str, Any]]]:
    """Return the metrics of each task and the completions of one student."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, tokenizer = _load(path, module, device)
    data.prepare(tokenizer, ["test"], module.context_length)
    rows = [(p.task, p.answer) for p in data.tables["test"].prompts]
    evaluate.verifiers.check(rows)
    metrics = {task: evaluate.metrics() for task in evaluate.tasks_of(rows)}
    records = []
    for batch, scores in evaluate.sampled(student, tokenizer, data.test_dataloader()):
        add_scores(metrics, batch.to("cpu"), scores)
        records += score_records(batch, scores, tokenizer)
    return metrics, records


def _load(path: str, module: OPDModule, device: torch.device) -> tuple[CausalPolicy, Tokenizer]:
    if is_model(path):
        spec = replace(module.student_spec, path=path)
        tokenizer = spec.load_tokenizer()
        return load_policy(spec, device, None, tokenizer).to(device), tokenizer
    model = student_of(load_checkpoint(path))
    module.student_spec.set_generation_config(model)
    return CausalPolicy(model, module.tokenizer).to(device), module.tokenizer


def _finding(task: str, name: str, first: PromptMetric, second: PromptMetric) -> Finding:
    (first_index, first_values), (second_index, second_values) = (
        side.by_prompt() for side in (first, second)
    )
    if first_index.tolist() != second_index.tolist():
        raise ConfigError(
            f"the two students were asked other prompts of task {task!r} ({len(first_index)} and "
            f"{len(second_index)}): some are too long for one tokenizer alone. Raise "
            "data.max_prompt_tokens."
        )
    comparison = compare_pairs(
        first_values, second_values, first.level, first.resamples, first.seed
    )
    return Finding(task, name, len(first_index), first.compute(), second.compute(), comparison)


def as_table(first: str, second: str, findings: list[Finding], evaluate: Evaluate) -> str:
    """Return the findings for a terminal, with what they hold for."""
    sampling = evaluate.sampling
    lines = [
        f"first   {first}",
        f"second  {second}",
        f"{evaluate.num_samples} completions a prompt, temperature {sampling.temperature}, top_p "
        f"{sampling.top_p}, top_k {sampling.top_k}, at most {sampling.max_completion_length} "
        f"tokens, seed {evaluate.seed or 0}; {evaluate.level:.0%} bootstrap intervals over prompts",
        "",
    ]
    rows = [("task", "metric", "prompts", "first", "second", "second - first", "better/worse/same")]
    for f in findings:
        c = f.comparison
        rows.append(
            (
                f.task,
                f.metric,
                str(f.prompts),
                f"{f.first.mean:.3f} [{f.first.low:.3f}, {f.first.high:.3f}]",
                f"{f.second.mean:.3f} [{f.second.low:.3f}, {f.second.high:.3f}]",
                f"{c.difference.mean:+.3f} [{c.difference.low:+.3f}, {c.difference.high:+.3f}]",
                f"{c.wins}/{c.losses}/{c.ties}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def as_json(first: str, second: str, findings: list[Finding], evaluate: Evaluate) -> str:
    """Return the same as JSON."""
    told = {
        "first": first,
        "second": second,
        "sampling": asdict(evaluate.sampling),
        "seed": evaluate.seed or 0,
        "threshold": evaluate.threshold,
        "level": evaluate.level,
        "findings": [
            {
                "task": f.task,
                "metric": f.metric,
                "prompts": f.prompts,
                "first": f.first._asdict(),
                "second": f.second._asdict(),
                "difference": f.comparison.difference._asdict(),
                "wins": f.comparison.wins,
                "losses": f.comparison.losses,
                "ties": f.comparison.ties,
            }
            for f in findings
        ],
    }
    return json.dumps(told, indent=2)
