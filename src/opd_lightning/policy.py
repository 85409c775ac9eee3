"""CausalPolicy: a Hugging Face causal language model that hands a TokenDistribution to a reader.

B rows, L tokens with padding, N completion tokens, D hidden size, V shared vocabulary.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd_lightning.distributions import TokenDistribution
from opd_lightning.errors import ConfigError, nearest
from opd_lightning.records import Rollout

log = logging.getLogger("opd_lightning")
T = TypeVar("T")
DType = Literal["float32", "bfloat16", "float16", "float64"]

# Largest difference of logits that the head check accepts, relative to the largest logit: rounding
# of the two paths, by the dtype of the weights.
_HEAD_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 4e-2,
    torch.float16: 1e-2,
}


@dataclass
class PolicySpec:
    """Where a model comes from and how it is held; nothing is loaded until `load`.

    Attributes:
        path: A Hugging Face folder, or a hub name.
        dtype: Of the weights. Train in float32 and choose bf16 autocast by `trainer.precision`.
        attn_implementation: transformers' name, such as "sdpa" or "flash_attention_2".
        gradient_checkpointing: Compute activations again in the backward pass to save memory.
        compile: Run the decoder through torch.compile (not during rollouts).
        freeze: Parts of parameter names, such as "embed_tokens": those are not trained.
        trust_remote_code: Whether the model's own Python files may run.
        revision: Branch, tag or commit of a hub name.
        packed: Whether rows are read behind one another without padding; see `CausalPolicy`.
        allow_pickle: Whether weights may be read from `*.bin` files, which are pickles, where a
            model has no safetensors.
    """

    path: str
    dtype: DType = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    freeze: list[str] = field(default_factory=list)
    trust_remote_code: bool = False
    revision: str | None = None
    packed: bool | None = None
    allow_pickle: bool = False

    def check(self) -> None:
        """Refuse a local folder that holds no model.

        Raises:
            ConfigError: If the folder is missing, or has no config.json or no weights.
        """
        self._check_config()
        folder = Path(self.path)
        if not folder.exists() or any(folder.glob("*.safetensors")):
            return
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if pickles and not self.allow_pickle:
            raise ConfigError(
                f"model folder {self.path!r} has no safetensors, but {pickles[0]}: a pickle, "
                "which is less safe to load. Save the model as safetensors (save_pretrained does), "
                "or set allow_pickle: true."
            )
        if not pickles:
            raise ConfigError(
                f"model folder {self.path!r} has no weights (*.safetensors). Was the download or "
                "the export interrupted? Write the folder again."
            )

    def _check_config(self) -> None:
        folder = Path(self.path)
        if not folder.exists():
            if looks_local(self.path):
                raise ConfigError(
                    f"model folder {self.path!r} does not exist.{_nearest_folder(folder)} Give a "
                    "Hugging Face folder (config.json and *.safetensors) or a hub name."
                )
            return
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model folder {self.path!r} has no config.json. Give a folder written by "
                "save_pretrained, `opd prune` or `opd export`."
            )

    def load_config(self) -> Any:
        """Return the transformers config; reads no weights.

        Raises:
            ConfigError: If transformers cannot find or read it.
        """
        self._check_config()
        return self._from_hub(AutoConfig.from_pretrained)

    def load_tokenizer(self) -> Tokenizer:
        """Return the tokenizer, with a pad token (the EOS where the model names none).

        Raises:
            ConfigError: If transformers cannot find or read it.
        """
        self._check_config()
        try:
            tokenizer = self._from_hub(AutoTokenizer.from_pretrained)
        except ConfigError:
            self.check()  # a folder without weights is an interrupted copy: say that first
            raise
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = tokenizer.eos_token_id
        return tokenizer

    def load(self) -> PreTrainedModel:
        """Return the model with its weights, on the CPU.

        Raises:
            ConfigError: If transformers cannot find or read it.
        """
        self.check()
        load = AutoModelForCausalLM.from_pretrained
        options = self._loading_options()
        if not self.allow_pickle:
            options["use_safetensors"] = True
        return self._prepared(self._from_hub(load, **options))

    def build(self) -> PreTrainedModel:
        """Return the model on torch's default device, from its config.json alone: no weights read.

        Raises:
            ConfigError: If transformers cannot find or read the config.
        """
        self._check_config()
        config = self._from_hub(AutoConfig.from_pretrained)
        options = self._loading_options() | {"trust_remote_code": self.trust_remote_code}
        model = AutoModelForCausalLM.from_config(config, **options)
        model.tie_weights()  # which transformers skips where it is told not to initialise
        return self._prepared(model)

    def set_generation_config(self, model: PreTrainedModel) -> None:
        """Give a model that was built from a config alone the generation config that is here.

        Without one it keeps what transformers has derived from the config.
        """
        with suppress(OSError):
            revision = self.revision or "main"
            model.generation_config = GenerationConfig.from_pretrained(self.path, revision=revision)

    def _loading_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype)}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        return options

    def _prepared(self, model: PreTrainedModel) -> PreTrainedModel:
        _freeze(model, self.freeze)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.compile:
            model.base_model.compile(dynamic=True)
        return model.train()

    def _from_hub(self, loader: Callable[..., T], **kwargs: Any) -> T:
        try:
            return loader(
                self.path,
                revision=self.revision or "main",
                trust_remote_code=self.trust_remote_code,
                **kwargs,
            )
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            first_line = (str(error) or type(error).__name__).strip().splitlines()[0]
            hint = _nearest_folder(Path(self.path))
            raise ConfigError(f"cannot load the model {self.path!r}: {first_line}{hint}") from error


def as_spec(model: PolicySpec | str | Path) -> PolicySpec:
    """Return `model` as a spec; a string or path becomes one with the defaults."""
    return model if isinstance(model, PolicySpec) else PolicySpec(str(model))


def looks_local(path: str) -> bool:
    """Whether `path` is meant as a folder and not as a hub name (`owner/name` or `name`)."""
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        return True
    return "/" in path and Path(path).parent.is_dir()


def _nearest_folder(folder: Path) -> str:
    siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
    return nearest(folder.name, siblings)


class CausalPolicy(nn.Module):
    """A causal language model as an objective's source of distributions.

    Dropout is switched off, also in training mode (which gradient checkpointing needs): the student
    that is trained is the one that was sampled.

    Args:
        model: The Hugging Face model, with its output head.
        tokenizer: Its tokenizer; needed for stop strings and text output only.
        vocab_size: Rows of the head that count (ids shared with the other model); default all.
        packed: Whether `read` puts the rows behind one another, without padding, as one sequence
            whose position ids start again at each row; None: where the attention is a flash one,
            whose kernels then compute nothing across rows. Others (sdpa, eager) mask a square of
            all tokens: time and memory quadratic in them.

    Attributes:
        compute_device: Where inputs go, if not where the weights are (sharded and offloaded).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer | None = None,
        vocab_size: int | None = None,
        packed: bool | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size or model.get_output_embeddings().weight.shape[0]
        self.packed = self.uses_flash_attention if packed is None else packed
        self.compute_device: torch.device | None = None
        self._packed_by_choice = packed is True
        self._dense = False
        _disable_dropout(model)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.compute_device or self.model.device

    @property
    def uses_flash_attention(self) -> bool:
        """Whether the attention has kernels for rows of varying length; those need a GPU."""
        return "flash" in (self.model.config._attn_implementation or "")

    @property
    def eos_token_ids(self) -> list[int]:
        """All end tokens of the generation config, of the tokenizer where it names none."""
        eos = self.model.generation_config.eos_token_id
        if eos is None and self.tokenizer is not None:
            eos = self.tokenizer.eos_token_id
        if eos is None:
            return []
        return list(eos) if isinstance(eos, list | tuple) else [eos]

    def read(
        self,
        rollout: Rollout,
        reader: Callable[[TokenDistribution], T],
        temperature: float = 1.0,
    ) -> T:
        """Run the model over the rollout and return `reader(distribution)`, called inside.

        The distribution is that of each completion token given all before it, N rows. Inside,
        because a sharded head is whole only within its module's forward: this method is one that
        FSDP treats as a forward.

        Args:
            rollout: B >= 0 rows; only the ids, the attention mask and the completion mask are read.
            reader: What to do with the distribution.
            temperature: Divides the logits.
        """
        inputs, predicts = self._inputs(one_row_at_least(rollout))
        if self._dense:
            logits = self.model(**inputs, use_cache=False).logits
            chosen = logits[predicts][:, : self.vocab_size]
            return reader(TokenDistribution.from_logits(chosen, temperature))
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return reader(self._distribution(hidden[predicts], temperature))

    def _inputs(self, rollout: Rollout) -> tuple[dict[str, Tensor | None], Tensor]:
        """Return the model's inputs and, in their shape, where the next token is a completion's."""
        ids, mask = rollout.input_ids, rollout.attention_mask
        predicts = torch.zeros_like(rollout.completion_mask)
        predicts[:, :-1] = rollout.completion_mask[:, 1:]
        if not self.packed:
            return {"input_ids": ids, "attention_mask": mask}, predicts
        real = mask.bool()
        position_ids = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        # without a mask, transformers takes position ids that start again for another sequence
        inputs = {"input_ids": ids[real][None], "position_ids": position_ids[real][None]}
        return inputs | {"attention_mask": None}, predicts[real][None]

    def _distribution(self, hidden: Tensor, temperature: float) -> TokenDistribution:
        head = self.model.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        if self.vocab_size < len(weight):  # a slice's backward pass copies the whole gradient
            weight = weight[: self.vocab_size]
            bias = None if bias is None else bias[: self.vocab_size]
        return TokenDistribution.from_hidden(
            hidden,
            weight,
            bias,
            temperature=temperature,
            **head_settings(self.model.config),
        )

    @torch.no_grad()
    def check_head(self) -> float:
        """Compare the chunked head with `model(...).logits` on a few tokens, at start.

        Where they differ (an output layer with a step that the config does not name), distributions
        are built from the model's own logits from then on: right, but N x V numbers in memory. A
        warning names the difference.

        Returns:
            The largest difference of two logits, relative to the largest logit.
        """
        ids = torch.arange(8, device=self.device)[None] % self.vocab_size
        training = self.model.training
        self.model.eval()
        # compiled code would be compiled for this one call
        with torch.compiler.set_stance("force_eager"):
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :, : self.vocab_size]
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        chunked = self._distribution(hidden, 1.0).dense_rows(slice(0, len(hidden)))
        self.model.train(training)
        difference = float((chunked - logits).abs().max() / logits.abs().max().clamp(min=1e-6))
        if not difference <= _HEAD_TOLERANCE[logits.dtype]:
            self._dense = True
            log.warning(
                "%s: the chunked head differs from the model's own logits by %.1e of the largest "
                "(settings read from its config: %s). Dense logits are used instead: same results, "
                "memory grows with tokens x vocabulary.",
                type(self.model).__name__,
                difference,
                head_settings(self.model.config) or "none",
            )
        return difference

    @torch.no_grad()
    def check_packed(self) -> None:
        """Where rows are packed, compare two packed rows with each of them alone, at start.

        Raises:
            ConfigError: If they differ and `packed=True` was asked for. Where it was chosen by the
                attention, rows are padded from then on, and a warning says so.
        """
        if not self.packed:
            return
        ids = (torch.arange(20, device=self.device).view(2, 10) * 7 + 1) % self.vocab_size
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        rows = Rollout(ids, mask, mask.bool())
        training = self.model.training
        self.model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                packed = self.model.base_model(**self._inputs(rows)[0], use_cache=False)
                alone = [
                    self.model.base_model(input_ids=row[keep.bool()][None], use_cache=False)
                    for row, keep in zip(ids, mask, strict=True)
                ]
            packed = packed.last_hidden_state[0]
            alone = torch.cat([output.last_hidden_state[0] for output in alone])
            difference = float((packed - alone).abs().max() / alone.abs().max().clamp(min=1e-6))
            tolerance = max(_HEAD_TOLERANCE[alone.dtype], 1e-5)  # eager softmax is fp32 at best
            reason = f"differ by {difference:.1e} of the largest value (at most {tolerance:.0e})"
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            difference, tolerance, reason = float("inf"), 0.0, f"fail ({error})"
        finally:
            self.model.train(training)
        if difference <= tolerance:
            return
        said = (
            f"{type(self.model).__name__} with attention {self.model.config._attn_implementation!r}"
            f" cannot read packed rows: hidden states of two rows, packed and alone, {reason}."
        )
        if self._packed_by_choice:
            raise ConfigError(f"packed=True: {said} Set packed to false, or null to choose.")
        self.packed = False
        log.warning("%s Rows are padded instead: same results.", said)


def one_row_at_least(rollout: Rollout) -> Rollout:
    """Return the rollout, or a row without completion where it has none (a rank without prompts).

    Its forwards and the keys of its measures are then those of the other ranks, which wait for it.
    """
    if rollout.num_rows:
        return rollout
    ids = torch.zeros(1, 1, dtype=torch.long, device=rollout.input_ids.device)
    return Rollout(ids, torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool))


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # rates that a layer holds as numbers: `attention_dropout`, OPT's `dropout` and `layerdrop`
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _freeze(model: nn.Module, parts: list[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(part in name for name in names):
            raise ConfigError(
                f"student.freeze {part!r} is part of no parameter's name.{nearest(part, names)} "
                f"They look like {', '.join(names[:3])}."
            )
    for name, parameter in model.named_parameters():
        if any(part in name for part in parts):
            parameter.requires_grad_(False)


def export_policy(policy: CausalPolicy, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Write the model, and its tokenizer, as a Hugging Face folder; sharded weights are gathered.

    Args:
        policy: On every rank; rank 0 writes.
        tokenizer: Or None.
        folder: Made if need be.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(policy.model, options=options)
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    generation = policy.model.generation_config
    if generation.temperature is not None or generation.top_p is not None:
        # transformers refuses to save sampling settings beside greedy decoding
        generation.do_sample = True
    policy.model.save_pretrained(folder, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def head_settings(config: Any) -> dict[str, float]:
    """Return softcap and scale of a model's output head, as its config names them.

    Gemma: `final_logit_softcapping`; Cohere: `logit_scale`; Granite: 1 / `logits_scaling`;
    Falcon-H1: `lm_head_multiplier`.
    """
    settings = {}
    if softcap := getattr(config, "final_logit_softcapping", None):
        settings["softcap"] = float(softcap)
    if scale := getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None):
        settings["scale"] = float(scale)
    if divisor := getattr(config, "logits_scaling", None):
        settings["scale"] = 1.0 / float(divisor)
    return settings
