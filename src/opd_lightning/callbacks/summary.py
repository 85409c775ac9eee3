"""What a run leaves behind: a table before and after, samples, a curve, the student."""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table

from opd_lightning.callbacks.curve import draw_learning_curve
from opd_lightning.records import PromptBatch

_SAMPLES = 2
_SAMPLE_CHARACTERS = 400
_MEASURES = {
    "reverse_kl": ("val/kl/reverse", "reverse KL to the teacher, nats a token"),
    "entropy": ("val/entropy", "entropy of the student, nats"),
    "mean_length": ("val/completions/mean_length", "completion length, tokens"),
    "clipped_ratio": ("val/completions/clipped_ratio", "completions that hit the limit"),
}


class RunSummary(L.Callback):
    """Writes `summary.json`, `learning_curve.png` and `student/`, and prints before -> after.

    "Before" is the whole validation that Lightning runs first with `num_sanity_val_steps=-1`,
    "after" the last one of the run; without validation data those rows are left out.

    Hooks: `on_train_start`, `on_train_batch_end`, validation, `on_train_end`. Saves the measures
    and samples of before and of the latest evaluation, the seconds and the tokens, so that a
    resumed run reports the whole.
    Seconds are those of training, without evaluation.

    Args:
        export_student: Whether to write `student/`, a Hugging Face folder.
    """

    def __init__(self, export_student: bool = True) -> None:
        self.export_student = export_student
        self.config: dict[str, Any] = {}
        self._seconds = 0.0
        self._since: float | None = None
        self._tokens = 0
        self._before: dict[str, float] = {}
        self._after: dict[str, float] = {}
        self._samples: dict[str, list[dict[str, str]]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: plain numbers, strings and lists."""
        return {
            "seconds": self._seconds_so_far(),
            "tokens": self._tokens,
            "before": self._before,
            "after": self._after,
            "samples": self._samples,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._seconds, self._tokens = state_dict["seconds"], state_dict["tokens"]
        self._before, self._samples = state_dict["before"], state_dict["samples"]
        self._after = state_dict.get("after", {})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
    ) -> None:
        """Count the round's completion tokens, over all ranks."""
        tokens = batch.rollout.completion_mask.sum()
        self._tokens += int(trainer.strategy.reduce(tokens, reduce_op="sum"))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._seconds, self._since = self._seconds_so_far(), None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first completions, of before and of the latest evaluation."""
        if batch_idx == 0 and batch.num_prompts:
            when = "before" if trainer.sanity_checking else "after"
            self._samples[when] = _samples(batch, pl_module.tokenizer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the measures and start the clock again."""
        measured = {
            name: float(trainer.callback_metrics[key])
            for name, (key, _) in _MEASURES.items()
            if key in trainer.callback_metrics
        }
        if not trainer.sanity_checking:
            self._after = measured | {"step": trainer.global_step}
        elif trainer.num_sanity_val_steps == float("inf"):
            self._before = measured
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._since = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the run's results and print them."""
        self._seconds, self._since = self._seconds_so_far(), None
        folder = Path(pl_module.run_folder)
        if self.export_student:
            pl_module.export(folder / "student")
        if not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        summary = self.summary(trainer.global_step)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
                metrics = Path(logger.log_dir) / logger.experiment.NAME_METRICS_FILE
                draw_learning_curve(metrics, folder / "learning_curve.png")
        self._print(folder, summary)

    def summary(self, steps: int) -> dict[str, Any]:
        """Return the contents of `summary.json`."""
        return {
            **{f"{name}_before": self._before.get(name) for name in _MEASURES},
            **{f"{name}_after": self._after.get(name) for name in _MEASURES},
            "steps": steps,
            "seconds": round(self._seconds, 2),
            "tokens": self._tokens,
            "tokens_per_second": round(self._tokens / max(self._seconds, 1e-9), 2),
            "samples": self._samples,
            "config": self.config,
        }

    def _seconds_so_far(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._seconds + running

    def _print(self, folder: Path, summary: dict[str, Any]) -> None:
        console = Console()
        table = Table(title=f"held-out, before -> after {summary['steps']} steps")
        for heading in ("measure", "before", "after", "change"):
            table.add_column(heading, justify="left" if heading == "measure" else "right")
        for name, (_, label) in _MEASURES.items():
            table.add_row(label, *_before_after(self._before.get(name), self._after.get(name)))
        if self._before or self._after:
            console.print(table)
        for when, samples in self._samples.items():
            for sample in samples:
                console.print(f"[bold]{when}[/bold] | {sample['prompt']!r}", highlight=False)
                console.print(sample["completion"], markup=False, highlight=False)
        print(
            f"{summary['tokens']} completion tokens in {summary['seconds']:.0f} s of training "
            f"({summary['tokens_per_second']:.0f} tokens/s)\nrun folder: {folder}\n"
            "  summary.json, metrics.csv, learning_curve.png, config.yaml, checkpoints/, student/"
        )


def _before_after(before: float | None, after: float | None) -> list[str]:
    cells = ["-" if value is None else f"{value:.3f}" for value in (before, after)]
    if before is None or after is None or before == 0:
        return [*cells, "-"]
    return [*cells, f"{100 * (after / before - 1):+.0f} %"]


def _samples(batch: PromptBatch, tokenizer: Any) -> list[dict[str, str]]:
    rollout = batch.rollout
    group = rollout.num_rows // batch.num_prompts
    prompts = batch.unpadded()
    return [
        {
            "prompt": tokenizer.decode(prompts[row // group], skip_special_tokens=True),
            "completion": tokenizer.decode(
                rollout.input_ids[row][rollout.completion_mask[row]].tolist(),
                skip_special_tokens=True,
            )[:_SAMPLE_CHARACTERS],
        }
        for row in range(min(_SAMPLES * group, rollout.num_rows))[::group]
    ]
