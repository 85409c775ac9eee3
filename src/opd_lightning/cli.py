"""`opd`: LightningCLI's fit, validate, test and predict, and the further verbs."""

import argparse
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import transformers
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from opd_lightning.callbacks import (
    Diagnostics,
    Evaluate,
    OPDProgressBar,
    PredictionWriter,
    RunCheckpoint,
    RunSummary,
    StopOnSignal,
    run_loggers,
)
from opd_lightning.callbacks.signals import refuse_foreign_checkpoint
from opd_lightning.config_errors import explain
from opd_lightning.data import OPDDataModule
from opd_lightning.errors import ConfigError, OPDError, RunError, nearest
from opd_lightning.module import OPDModule
from opd_lightning.objectives import known_objectives
from opd_lightning.resume import (
    Resume,
    begin,
    check_given_checkpoint,
    check_identity,
    find_start,
    identity_of,
    is_finished,
    nested_arguments,
    nested_settings,
    run_version,
)
from opd_lightning.rollout import RolloutCallback
from opd_lightning.strategy import FSDP2Strategy  # noqa: F401  (known to the parser by its name)
from opd_lightning.study.bigram import bigram
from opd_lightning.study.control import SEEDS, control
from opd_lightning.study.landing import landing
from opd_lightning.tools.audit import (
    as_json,
    as_markdown,
    as_table,
    audit,
    audited_objectives,
    objective_from,
    write_page,
)
from opd_lightning.tools.compare import as_json as comparison_json
from opd_lightning.tools.compare import as_table as comparison_table
from opd_lightning.tools.compare import compare
from opd_lightning.tools.demo import demo
from opd_lightning.tools.export import check_checkpoint, export
from opd_lightning.tools.memory import as_json as memory_json
from opd_lightning.tools.memory import as_table as memory_table
from opd_lightning.tools.memory import estimate_memory
from opd_lightning.tools.prune import prune
from opd_lightning.tools.report import report
from opd_lightning.tools.run_shape import Layout
from opd_lightning.tools.submit import Job, submit

RUN_VERBS = ("fit", "validate", "test", "predict")

_USAGE = """usage: opd VERB [options]      (opd VERB --help explains one)

  fit        train a student: opd fit --config run.yaml [--config more.yaml] [--model.objective X]
  validate   measure a student or a checkpoint on the held-out prompts
  test       the same on the test prompts
  predict    write completions with student and teacher log-probabilities as JSON lines
  compare    two checkpoints or model folders on the same prompts: opd compare A B --config run.yaml
  submit     send a run or a sweep to SLURM: opd submit --config run.yaml --nodes 2 --gpus 8
  report     one page about runs, side by side: opd report runs/a/version_0 runs/b/version_0
  prune      make a smaller student by removing decoder layers
  export     write the student of a checkpoint as a Hugging Face folder
  audit      what each objective's gradient follows, by enumeration; judges your own too
  study      where objectives land (landing); bias and variance by gamma and length (bigram);
             what gamma costs a policy that moves along a line (control)
  memory     what each rank of a run will hold, from configs alone: opd memory --config … --gpus 8
  demo       write the quickstart's models

  --debug    with any verb: show the traceback of an error
"""


class _RunParser(LightningArgumentParser):
    """Takes `resume: auto` in a configuration file for `resume: {mode: auto}`."""

    def _apply_actions(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._apply_actions(nested_settings(cfg), *args, **kwargs)


class OPDCLI(LightningCLI):
    """LightningCLI for OPDModule and OPDDataModule, with the rollout as an argument of its own."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            OPDModule,
            OPDDataModule,
            args=nested_arguments(args),
            parser_class=_RunParser,
            parser_kwargs={verb: {"exit_on_error": False} for verb in RUN_VERBS}
            | {"exit_on_error": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                # one validation before the first step: the "before" of before -> after
                "num_sanity_val_steps": -1,
                # prompts are handed to the ranks by the data module's own sampler
                "use_distributed_sampler": False,
                "default_root_dir": "runs",
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--rollout`; one seed serves data order, rollouts and everything else."""
        parser.add_argument(
            "--rollout",
            type=RolloutCallback | None,
            default={"class_path": "opd_lightning.RolloutCallback"},
            help="How the student's completions are made; null trains on the dataset's own.",
        )
        parser.add_argument(
            "--resume",
            type=Resume,
            default=Resume(),
            help="Whether fit goes on where a run stopped: never, auto, or a path.",
        )
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's; checkpoints are always loaded with `weights_only=True`."""
        return {k: v | {"weights_only"} for k, v in LightningCLI.subcommands().items()}

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parse, and check that a named checkpoint is there.

        Raises:
            ConfigError: If the arguments are not valid, with the nearest valid names, or the
                checkpoint is missing or none.
        """
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            actions = self._subcommand_parsers[args[0]]._actions
            known = [action.dest for action in actions]
            raise ConfigError(explain(str(error), known, args)) from error
        checkpoint = self.config[args[0]].get("ckpt_path")
        if checkpoint and not (args[0] == "fit" and self._is_found_by_lightning(checkpoint)):
            check_checkpoint(checkpoint)

    def _is_found_by_lightning(self, checkpoint: str) -> bool:
        """Whether it is one of Lightning's words, and one that can mean something here.

        Lightning looks for `last` in the folders of the callbacks. Where none is given, that is the
        folder of the run that begins: nothing would be loaded, and the run would go on without.
        """
        callbacks = self.config["fit"]["trainer"].get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        has_folder = any((c.get("init_args") or {}).get("dirpath") for c in callbacks)
        return checkpoint == "hpc" or (checkpoint == "last" and has_folder)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks and loggers that every run has."""
        config = self._get(self.config_init, "trainer")
        rollout = self._get(self.config_init, "rollout")
        if rollout is not None:
            rollout.seed = int(self._get(self.config, "seed_everything"))
        callbacks = [rollout] if rollout is not None else []
        callbacks += config.get("callbacks") or []
        if config.get("enable_progress_bar") is not False:
            callbacks.append(OPDProgressBar())
        # last, so that what they print stands below the bar
        callbacks += {"fit": [RunSummary()], "predict": [PredictionWriter()]}.get(
            self.subcommand, []
        )
        kwargs["callbacks"] = callbacks
        if self.subcommand == "fit" and not _has(callbacks, Diagnostics):
            callbacks.append(Diagnostics())
        if self.subcommand == "fit" and config.get("enable_checkpointing") is not False:
            callbacks += [] if _has(callbacks, RunCheckpoint) else [RunCheckpoint()]
        if config.get("logger") in (None, True):
            root = config["default_root_dir"]
            version = run_version(self.resume, Path(root)) if self.subcommand == "fit" else None
            kwargs["logger"] = run_loggers(root, version)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:  # Lightning's, for a strategy or an accelerator
            raise ConfigError(f"the Trainer refuses its arguments: {error}") from error
        if self.subcommand == "fit":
            trainer.callbacks.append(StopOnSignal())  # behind those that save each few steps
        return trainer

    def before_fit(self) -> None:
        """Find where to begin; hand the resolved configuration to those who keep it."""
        refuse_foreign_checkpoint(self.trainer.default_root_dir, self.config["fit"]["ckpt_path"])
        resolved = yaml.safe_load(self._parser("fit").dump(self.config["fit"], skip_none=False))
        identity = identity_of(resolved)
        self._begin(identity)
        for callback in self.trainer.callbacks:
            if isinstance(callback, RunSummary):
                callback.config = resolved
            if isinstance(callback, RunCheckpoint):
                callback.identity, callback.until = identity, self._limits

    def _begin(self, identity: dict[str, Any]) -> None:
        """Choose the checkpoint, and cut the run folder back to it.

        Raises:
            ConfigError: If it is that of another run, or the one asked for is not whole.
        """
        trainer, given = self.trainer, self.config["fit"].get("ckpt_path")
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        self._limits = [trainer.max_steps, trainer.max_epochs]
        start = find_start(self.resume, folder, self._limits)
        if start.checkpoint is not None:
            allowed = self.resume.allow_change
            check_identity(start.facts["identity"], identity, start.checkpoint, allowed)
            if is_finished(start.facts, self._limits):
                print(
                    f"{folder} holds this run, finished after {start.facts['step']} steps. Raise "
                    "trainer.max_steps to go on, or begin a new run with --resume never."
                )
                sys.exit(0)
            print(f"resuming {folder} at step {start.facts['step']}")
        elif given and Path(given).exists():
            check_given_checkpoint(Path(given), identity, self.resume.allow_change)
        self._start = start
        if self.resume.mode != "never" and trainer.is_global_zero:
            begin(folder, start, identity)

    @property
    def resume(self) -> Resume:
        """What was asked for."""
        return Resume(**vars(self.config["fit"]["resume"]))

    def fit(self, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Train, from the run's own checkpoint where it has one."""
        self.trainer.fit(ckpt_path=self._start.checkpoint or ckpt_path, weights_only=True, **kwargs)

    def validate(self, **kwargs: Any) -> None:
        """Measure; nothing in a checkpoint is executed."""
        self.trainer.validate(weights_only=True, **kwargs)

    def test(self, **kwargs: Any) -> None:
        """Measure on the test prompts."""
        self.trainer.test(weights_only=True, **kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Write completions."""
        self.trainer.predict(weights_only=True, **kwargs)


def _has(callbacks: Sequence[Any], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


class _ParsedRun(OPDCLI):
    """Parses the arguments of `fit` and makes what they describe; no Trainer, and nothing runs."""

    def instantiate_classes(self) -> None:
        """Make module, data and rollout."""
        self.config_init = self.parser.instantiate_classes(self.config)

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def main(args: list[str] | None = None) -> None:
    """Run `opd`; exits with 0, with 2 for a configuration and with 1 for a run that failed."""
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    _quiet()
    try:
        _run(args)
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, exit_code = _told(error)
        if message:
            print(f"opd: {message}", file=sys.stderr)
        sys.exit(exit_code)


def _told(error: Exception) -> tuple[str, int]:
    """Return what to say of an error and the exit code; ours may be wrapped by the parser."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OPDError):
            return str(cause), cause.exit_code
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, MisconfigurationException):
        advice = ""
        if "gradient clipping" in str(error):
            advice = " Here gradients are clipped by model.max_grad_norm."
        if "gradient accumulation" in str(error):
            advice = " Here an update is split by model.micro_batch_tokens."
        return f"{error}{advice}", ConfigError.exit_code
    if "loading state_dict" in str(error):
        differences = " ".join(str(error).split())
        return (
            f"the checkpoint is not one of model.student: {differences:.200}... Give the student "
            "that the run began with.",
            ConfigError.exit_code,
        )
    if re.search(r"Connection (reset|closed) by peer|ProcessGroup|NCCL", str(error)):
        reason = str(error).partition("\n")[0]
        return (
            f"another rank ended while this one waited for it ({reason:.90}...). Look for that "
            "rank's error; one that was killed without a word was most likely out of memory.",
            1,
        )
    return f"{type(error).__name__}: {error} (--debug shows where)", 1


def _run(args: list[str]) -> None:
    verb, rest = (args[0], args[1:]) if args else ("--help", [])
    if verb in ("-h", "--help"):
        print(_USAGE)
    elif verb in RUN_VERBS:
        known_objectives()  # entry points become known to the parser by being imported
        OPDCLI(args)
    elif verb in _TOOLS:
        _TOOLS[verb](rest)
    else:
        verbs = [*RUN_VERBS, *_TOOLS]
        raise ConfigError(
            f"{verb!r} is not a verb of opd.{nearest(verb, verbs)} Known: {', '.join(verbs)}."
        )


class _Parser(argparse.ArgumentParser):
    """Refuses as the rest of `opd` does, in one message."""

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError."""
        raise ConfigError(f"{message}. See {self.prog} --help.")


def _prune(args: list[str]) -> None:
    parser = _Parser("opd prune", description=prune.__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder, or a hub name")
    parser.add_argument("--drop-layers", required=True, help="0-based, such as 13,14 or 10-15,20")
    parser.add_argument("--out", required=True, help="folder to write")
    given = parser.parse_args(args)
    print(prune(given.model, layer_numbers(given.drop_layers), given.out))


def _export(args: list[str]) -> None:
    parser = _Parser("opd export", description=export.__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="a checkpoint of opd fit")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--model", help="folder of the tokenizer; default: the run's student")
    given = parser.parse_args(args)
    print(export(given.ckpt, given.out, given.model))


def _demo(args: list[str]) -> None:
    parser = _Parser("opd demo", description=demo.__doc__.splitlines()[0])
    parser.add_argument("--out", default="models", help="folder to write; default: models")
    for folder in demo(parser.parse_args(args).out):
        print(folder)


def _audit(args: list[str]) -> None:
    parser = _Parser(
        "opd audit",
        description="Exit with 1 if an objective does not follow the divergence that it declares.",
    )
    parser.add_argument(
        "--objective",
        nargs="+",
        metavar="NAME",
        help="a name or a dotted path, maybe with settings: 'TopKReverseKL(k=4, tail=\"bucket\")'; "
        "default: every known objective",
    )
    formats = {"table": as_table, "json": as_json, "markdown": as_markdown}
    parser.add_argument("--format", choices=formats, default="table")
    parser.add_argument("--write", metavar="PAGE", help="renew docs/objectives.md instead")
    given = parser.parse_args(args)
    named = given.objective and [objective_from(name) for name in given.objective]
    findings = audit(named or audited_objectives())
    if given.write:
        write_page(given.write, findings)
    else:
        print(formats[given.format](findings))
    if failed := [f"{f.name} {f.complaint}" for f in findings if f.complaint]:
        raise RunError(f"{len(failed)} of {len(findings)} objectives fail: {'; '.join(failed)}")


def _study(args: list[str]) -> None:
    parser = _Parser("opd study", description="Write a study's tables (CSV) and figures (PNG).")
    studies = {"landing": landing, "bigram": bigram, "control": control}
    parser.add_argument("name", choices=studies)
    parser.add_argument("--out", default="runs/study", help="folder to write; default: runs/study")
    of_control = parser.add_argument_group("control alone")
    of_control.add_argument(
        "--stress", action="store_true", help="batches of 8 and learning rate 3e-2: it goes wrong"
    )
    of_control.add_argument(
        "--seeds", type=int, metavar="N", help=f"how many; default: {len(SEEDS)}"
    )
    given = parser.parse_args(args)
    options = {"stress": given.stress, "seeds": given.seeds}
    options = {name: value for name, value in options.items() if value not in (None, False)}
    if options and given.name != "control":
        said = " and ".join(f"--{name}" for name in options)
        raise ConfigError(f"opd study {given.name} has no {said}; only opd study control has.")
    for path in studies[given.name](Path(given.out), **options):
        print(path)


def _memory(args: list[str]) -> None:
    parser = _Parser(
        "opd memory",
        description="What each rank of a run will hold, from configs alone: no weights are read.",
        epilog="All other options are those of opd fit, such as --config and --model.objective.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, help="processes; default: trainer.devices x num_nodes")
    formats = {"table": memory_table, "json": memory_json}
    parser.add_argument("--format", choices=formats, default="table")
    given, rest = parser.parse_known_args(args)
    if given.gpus is not None and given.gpus < 1:
        raise ConfigError(f"--gpus must be at least 1; got {given.gpus}.")
    run = _ParsedRun(["fit", *rest])
    made = run.config_init["fit"]
    layout = Layout.of_trainer(run.config["fit"]["trainer"].as_dict(), given.gpus)
    estimate = estimate_memory(made["model"], made["data"], made["rollout"], layout)
    print(formats[given.format](estimate))


def _compare(args: list[str]) -> None:
    parser = _Parser(
        "opd compare",
        description="Score two students on the same prompts, and how sure their difference is.",
        epilog="All other options are those of opd fit, such as --config and --data.test. How to "
        "sample and score is that of the Evaluate callback among trainer.callbacks, if there is "
        "one.",
        allow_abbrev=False,
    )
    parser.add_argument("first", help="a checkpoint of opd fit, or a Hugging Face folder")
    parser.add_argument("second", help="the same; differences are second minus first")
    parser.add_argument("--num-samples", type=int, help="completions a prompt; default: 4")
    parser.add_argument("--out", type=Path, help="folder for the completions and comparison.json")
    formats = {"table": comparison_table, "json": comparison_json}
    parser.add_argument("--format", choices=formats, default="table")
    names_first = len(args) > 1 and not any(arg.startswith("-") for arg in args[:2])
    if not names_first and not {"-h", "--help"} & set(args):
        # behind an option of opd fit, its value would be taken for a student
        raise ConfigError(
            f"opd compare takes the two students first: opd compare A B --config run.yaml; got "
            f"{' '.join(args[:2]) or 'nothing'}."
        )
    given, rest = parser.parse_known_args(args)
    made = _ParsedRun(["fit", *rest]).config_init["fit"]
    found = [c for c in made["trainer"]["callbacks"] or [] if isinstance(c, Evaluate)]
    if found and given.num_samples is not None:
        raise ConfigError(
            f"--num-samples {given.num_samples}, but the configuration has an Evaluate callback. "
            "Set its num_samples."
        )
    evaluate = found[0] if found else Evaluate(num_samples=given.num_samples or 4)
    rollout = made["rollout"]
    if rollout is not None:
        rollout.seed = int(made["seed_everything"])
    names = given.first, given.second
    findings = compare(*names, made["model"], made["data"], rollout, evaluate, given.out)
    print(formats[given.format](*names, findings, evaluate))


def _submit(args: list[str]) -> None:
    parser = _Parser(
        "opd submit",
        description="Write a SLURM script into the run's folder and submit it.",
        epilog="All other options are those of opd fit, such as --config and --model.objective.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="number of nodes; default: 1")
    add("--gpus", type=int, default=1, help="of each node, one process each; default: 1; 0: none")
    add("--tasks", type=int, help="processes of each node, where --gpus is 0; default: 1")
    add("--cpus", type=int, default=8, help="of each process; default: 8")
    add("--time", default="24:00:00", help="limit, after which it is requeued; default: 24:00:00")
    add("--partition", help="default: that of the cluster")
    add("--account", help="default: that of the user")
    add("--name", default="opd", help="job name; default: opd")
    add(
        "--signal-seconds",
        type=int,
        default=120,
        help="before the limit, when it is told to save: more than a round takes; default: 120",
    )
    add("--sbatch", action="append", default=[], metavar="OPTION", help="such as --sbatch=--qos=a")
    add("--folder", type=Path, help="of the run; default: a new one in trainer.default_root_dir")
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME=A,B",
        help="an array job over all combinations: objective=ReverseKL,ForwardKL, seed=1,2, or any "
        "dotted argument",
    )
    add("--template", type=Path, help="a site's own script; default: configs/slurm/train.sbatch")
    add("--dry-run", action="store_true", help="print the script, and submit nothing")
    given, fit = parser.parse_known_args(args)
    job = Job(
        given.nodes, given.gpus, given.tasks, given.cpus, given.time, given.partition,
        given.account, given.name, given.signal_seconds, given.sbatch,
    )  # fmt: skip
    print(submit(job, fit, _resolved, given.folder, given.sweep, given.template, given.dry_run))


def _resolved(args: Sequence[str]) -> dict[str, Any]:
    """Return the configuration of `opd fit` with these arguments; its classes are made once."""
    run = _ParsedRun(["fit", *args])
    return yaml.safe_load(run._parser("fit").dump(run.config["fit"], skip_none=False))


def _report(args: list[str]) -> None:
    parser = _Parser("opd report", description=report.__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of opd fit")
    parser.add_argument("--out", help="folder to write; default: report/ in the first run's")
    given = parser.parse_args(args)
    print(report(given.runs, given.out))


_TOOLS: dict[str, Callable[[list[str]], None]] = {
    "submit": _submit,
    "compare": _compare,
    "prune": _prune,
    "report": _report,
    "export": _export,
    "audit": _audit,
    "study": _study,
    "memory": _memory,
    "demo": _demo,
}


def layer_numbers(text: str) -> list[int]:
    """Return the numbers of a list such as `13,14` or `10-15,20`.

    Raises:
        ConfigError: If it is not one.
    """
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last or first) + 1)
    except ValueError:
        raise ConfigError(
            f"--drop-layers takes numbers such as 13,14 or 10-15,20; got {text!r}."
        ) from None
    return numbers


def _quiet() -> None:
    """Leave the terminal to the progress bar and to what a user can act on."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.addFilter(_is_for_all_to_see)
    logger = logging.getLogger("opd_lightning")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    transformers.utils.logging.disable_progress_bar()
    for pattern in (
        ".*does not have many workers.*",
        ".*LightningCLI's args parameter.*",  # main() takes them from sys.argv itself
        ".*is not empty.*",  # two loggers share the run's folder on purpose
        ".*isinstance.treespec, LeafSpec.*",
        ".*no pre-optimization state was saved.*",  # the state after the step is what we want
    ):
        warnings.filterwarnings("ignore", pattern)


def _is_for_all_to_see(record: logging.LogRecord) -> bool:
    """Whether it comes from the first of several processes, or is an error."""
    return not getattr(rank_zero_only, "rank", 0) or record.levelno >= logging.ERROR


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()


if __name__ == "__main__":
    main()
