"""`opd memory`: what a run will hold on each rank, from configs alone; no weights are read.

Forward and backward pass, optimiser step and a rollout's last step run on fake tensors, which have
shapes and lifetimes but no numbers, and what is alive is counted (`TracedRun`).
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from opd_lightning.data import OPDDataModule
from opd_lightning.errors import ConfigError
from opd_lightning.module import OPDModule
from opd_lightning.rollout import RolloutCallback, SamplingConfig
from opd_lightning.rollout.transformers_engine import TransformersEngine
from opd_lightning.tools.run_shape import Layout, Work
from opd_lightning.tools.traced_run import TracedRun, faked

COMPONENTS = (
    "parameters",
    "gradients",
    "gradient buckets",
    "optimizer states",
    "teacher",
    "gathered weights",
    "packed weights",
    "activations",
    "loss",
    "KV cache",
)


@dataclass(frozen=True)
class Phase:
    """A part of a round, and what is held at its peak.

    Attributes:
        name: Of the phase.
        held: Component -> bytes.
    """

    name: str
    held: Counter[str]

    @property
    def total(self) -> int:
        """Bytes."""
        return self.held.total()


@dataclass(frozen=True)
class MemoryEstimate:
    """What a rank holds in each phase; the largest counts, they follow one another.

    Attributes:
        phases: In the order of a round.
        layout: Processes and precision.
        work: Rows and tokens.
        notes: What was assumed, and what is not counted.
    """

    phases: list[Phase]
    layout: Layout
    work: Work
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)


def estimate_memory(
    module: OPDModule,
    data: OPDDataModule,
    rollout: RolloutCallback | None,
    layout: Layout,
) -> MemoryEstimate:
    """Return what a rank of this run will hold, by phase.

    Rows are taken as long as they can come: the longest prompt with a completion up to the limit.
    What the interpreter, its libraries, a GPU's context and allocators hold comes on top.

    Args:
        module: Its models need not be loaded; their folders need a config.json only.
        data: Where its files are missing, prompts count as `max_prompt_tokens`.
        rollout: None where the data has its own completions.
        layout: Processes and precision.

    Raises:
        ConfigError: If a config cannot be read or the settings do not fit together.
    """
    notes: list[str] = []
    prompts = _lengths(module, data)
    with faked(layout.on_gpu):
        run = TracedRun(module, layout)
        work = _work(run, module, data, rollout, layout, prompts, notes)
        if module.auto_micro_batch:
            work = _fitting(run, work, module.memory_limit_gb, notes)
        phases = [Phase("update", run.update(work)), Phase("optimizer", run.optimizer_step())]
        if rollout is not None:
            phases.insert(0, Phase("rollout", _rollout(run, work, rollout, rollout.sampling)))
        if data.sources["val"] is not None:
            phases = _evaluation(run, work, data, rollout, layout) + phases
    if run.teacher is None:
        notes.append(f"{type(module.teacher).__name__}: its memory is not counted")
    return MemoryEstimate(phases, layout, work, notes)


def _lengths(module: OPDModule, data: OPDDataModule) -> tuple[int, int, int] | None:
    """Return the tokens of the longest prompt, teacher's prompt and completion of the data.

    None where a file or the tokenizer is missing. Longest is each by itself.
    """
    files = [data.sources[split] for split in ("train", "val")]
    if not all(file is None or Path(file).is_file() for file in files) or files[0] is None:
        return None
    try:
        tokenizer = module.tokenizer
    except ConfigError:
        return None
    data.prepare(tokenizer, ["train", "val"], module.context_length)
    for weight in module.token_weights:
        weight.setup(tokenizer)
    prompts = [p for table in data.tables.values() for p in table.prompts]
    return (
        max(len(p.prompt_ids) for p in prompts),
        max(len(p.teacher_prompt_ids or p.prompt_ids) for p in prompts),
        max(len(p.completion_ids or ()) for p in prompts),
    )


def _work(
    run: TracedRun,
    module: OPDModule,
    data: OPDDataModule,
    rollout: RolloutCallback | None,
    layout: Layout,
    lengths: tuple[int, int, int] | None,
    notes: list[str],
) -> Work:
    limit = 0 if rollout is None else rollout.sampling.max_completion_length
    if lengths is None:
        context = run.context_length or data.max_prompt_tokens + limit
        longest = max(1, min(data.max_prompt_tokens, context - limit))
        notes.append(
            f"prompts were not read (no file, or no tokenizer): taken as {longest} tokens, the "
            "most that data.max_prompt_tokens and the context allow"
        )
        lengths = longest, longest, max(1, context - longest)
    prompt, teacher_prompt, completion = lengths
    if data.prompts_per_step % layout.world_size:
        raise ConfigError(
            f"data.prompts_per_step={data.prompts_per_step} must be a multiple of the "
            f"{layout.world_size} processes."
        )
    return Work(
        prompt,
        teacher_prompt,
        limit or completion,
        data.prompts_per_step // layout.world_size,
        1 if rollout is None else rollout.sampling.num_generations,
        module.mini_batches,
        module.micro_batch_tokens,
    )


def _fitting(run: TracedRun, work: Work, limit_gb: float | None, notes: list[str]) -> Work:
    """Return the work with the largest micro-batch that fits; one row where no limit is given."""
    one = replace(work, micro_batch_tokens=work.length)
    if limit_gb is None:
        notes.append("micro_batch_tokens: auto without memory_limit_gb: taken as one longest row")
        return one
    low, high = 1, work.update_rows
    while low < high:
        rows = (low + high + 1) // 2
        fits = run.update(replace(work, micro_batch_tokens=rows * work.length)).total()
        low, high = (rows, high) if fits <= limit_gb * 1e9 else (low, rows - 1)
    notes.append(f"micro_batch_tokens: auto: {low * work.length} tokens fit {limit_gb} GB")
    return replace(work, micro_batch_tokens=low * work.length)


def _rollout(
    run: TracedRun, work: Work, rollout: RolloutCallback, sampling: SamplingConfig
) -> Counter[str]:
    engine = rollout.engine
    if not isinstance(engine, TransformersEngine):
        return Counter(run.static)
    return run.rollout(work, sampling, engine.max_rows, engine.pack_weights)


def _evaluation(
    run: TracedRun,
    work: Work,
    data: OPDDataModule,
    rollout: RolloutCallback | None,
    layout: Layout,
) -> list[Phase]:
    """Return the phases of an evaluation, whose batch is not split."""
    prompts = -(-data.eval_prompts_per_step // layout.world_size)
    work = replace(work, prompts=prompts, group=1)
    if rollout is None:
        return [Phase("evaluation", run.evaluation(work))]
    sampling = rollout.evaluation
    work = replace(
        work, completion_tokens=sampling.max_completion_length, group=sampling.num_generations
    )
    return [
        Phase("evaluation's rollout", _rollout(run, work, rollout, sampling)),
        Phase("evaluation", run.evaluation(work)),
    ]


# --------------------------------------------------------------------------------------- output


def as_table(estimate: MemoryEstimate) -> str:
    """Return a line for each component, a column for each phase, in GB (10^9 bytes)."""
    phases, layout, work = estimate.phases, estimate.layout, estimate.work
    width = max(len(name) for name in COMPONENTS) + 2
    columns = [max(len(phase.name), 8) + 2 for phase in phases]

    def line(name: str, cells: list[str]) -> str:
        return name.ljust(width) + "".join(
            cell.rjust(size) for cell, size in zip(cells, columns, strict=True)
        )

    lines = [line("GB per rank", [phase.name for phase in phases])]
    for name in COMPONENTS:
        if any(phase.held[name] for phase in phases):
            lines.append(line(name, [_gb(phase.held[name]) for phase in phases]))
    lines.append(line("total", [_gb(phase.total) for phase in phases]))
    peak = estimate.peak
    lines += [
        "",
        f"peak: {_gb(peak.total).strip()} GB, {peak.name}; {layout.world_size} x "
        f"{'GPU' if layout.on_gpu else 'CPU'}, {layout.kind}, {layout.precision}",
        f"a rank: {work.rows} rows of up to {work.prompt_tokens} + {work.completion_tokens} tokens "
        f"a round, micro-batches of up to {work.micro_rows} rows",
        "on top: the interpreter and its libraries, a GPU's context, holes of the allocator",
        *estimate.notes,
    ]
    return "\n".join(lines)


def _gb(size: int) -> str:
    return f"{size / 1e9:.3f}" if size else "-"


def as_json(estimate: MemoryEstimate) -> str:
    """Return everything as JSON, sizes in bytes."""
    return json.dumps(
        {
            "peak_bytes": estimate.peak.total,
            "peak_phase": estimate.peak.name,
            "phases": {phase.name: dict(phase.held) for phase in estimate.phases},
            "layout": asdict(estimate.layout),
            "work": asdict(estimate.work),
            "notes": estimate.notes,
        },
        indent=2,
    )
