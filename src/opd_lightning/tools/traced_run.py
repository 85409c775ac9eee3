"""A round on fake tensors: the package's own code runs, and what it would hold is counted.

B rows, L tokens of a row, P prompts, R rows of a rollout, T columns of its cache, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import DynamicCache
from transformers.initialization import no_init_weights

from opd_lightning import memory
from opd_lightning.distributions import Distribution, TokenDistribution, TopKDistribution, head
from opd_lightning.metrics import on_policy_measures
from opd_lightning.module import OPDModule
from opd_lightning.objectives import Objective
from opd_lightning.policy import CausalPolicy, PolicySpec
from opd_lightning.records import Rollout
from opd_lightning.rollout.cache import can_join, grown, join_caches
from opd_lightning.rollout.sampling import SamplingConfig, sample
from opd_lightning.rollout.transformers_engine import _PREFILL_TOKENS
from opd_lightning.sharding import decoder_layers
from opd_lightning.teachers import LocalTeacher
from opd_lightning.tools.live_bytes import LiveBytes
from opd_lightning.tools.run_shape import Layout, Work
from opd_lightning.weighting import UpdateSize, combined_weight

CPU = torch.device("cpu")
_COMPUTE_DTYPES = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}
# Completion tokens that are traced; of more rows, memory is on a line through a half and the whole.
_TRACED_TOKENS = 16_384
# Copies of a layer that FSDP2 holds while it computes: its weights, and the next layer's as they
# arrive and as they are copied out of what arrived.
_LAYERS_IN_FLIGHT = 3


@contextmanager
def faked(on_gpu: bool) -> Iterator[None]:
    """Make all new tensors fake; their device is the CPU, whatever it stands for."""
    blocks = dict(head.BLOCK_BYTES)
    if on_gpu:
        head.BLOCK_BYTES["cpu"] = blocks["other"]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
            yield
    finally:
        head.BLOCK_BYTES.update(blocks)


class TracedRun:
    """Student and teacher without numbers, inside `faked`; each method traces a part of a round.

    Args:
        module: What is run; its models are not touched.
        layout: Processes and precision.

    Attributes:
        student: The student, in the dtype that it computes in.
        teacher: The teacher, None where it is not in this process.
        static: Component -> bytes that are there all the time.
    """

    def __init__(self, module: OPDModule, layout: Layout) -> None:
        self._module, self._layout = module, layout
        spec = module.student_spec
        if dtype := _COMPUTE_DTYPES.get(layout.precision):
            spec = replace(spec, dtype=dtype)
        self._own_dtype = getattr(torch, spec.dtype)
        if layout.kind == "fsdp" and layout.param_dtype:
            spec = replace(spec, dtype=layout.param_dtype)
        self.student = _policy(spec)
        self._decoder = _policy(replace(spec, gradient_checkpointing=False))
        self.teacher: CausalPolicy | None = None
        if isinstance(module.teacher, LocalTeacher):
            self.teacher = _policy(module.teacher.spec).requires_grad_(False)
            shared = min(self.student.vocab_size, self.teacher.vocab_size)
            for policy in (self.student, self._decoder, self.teacher):
                policy.vocab_size = shared
        self._temporary, states = self._optimizer()
        self.static = self._static(states)

    @property
    def context_length(self) -> int | None:
        """Tokens that the student can take, None where its config does not say."""
        config = self.student.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    # ------------------------------------------------------------------- what is always there

    def _static(self, states: int) -> Counter[str]:
        layout = self._layout
        weights = sum(p.numel() for p in self._shards(self.student.parameters()))
        held = Counter(parameters=weights * self._own_dtype.itemsize)
        held["optimizer states"] = states
        if layout.offload_student:
            held.clear()
        if self.teacher is not None and not layout.offload_teacher:
            held["teacher"] = memory.parameter_bytes(self._shards(self.teacher.parameters()))
        if layout.kind == "ddp":
            held["gradient buckets"] = self.gradient_bytes
        return held

    @property
    def gradient_bytes(self) -> int:
        """Of all gradients that this rank keeps until the optimiser's step."""
        trained = (p for p in self.student.parameters() if p.requires_grad)
        return sum(p.numel() for p in self._shards(trained)) * self._own_dtype.itemsize

    def _shards(self, parameters: Any) -> Iterator[Tensor]:
        """Yield this rank's part of each: FSDP2 cuts the first dimension, padded to equal parts."""
        shards = self._layout.shards
        for p in parameters:
            rows = -(-p.shape[0] // shards) if p.dim() else 1
            yield torch.empty(rows, *p.shape[1:], dtype=p.dtype)

    def _optimizer(self) -> tuple[int, int]:
        """Return the bytes that a step takes for itself, and those of the states that it keeps."""
        trained = [
            nn.Parameter(p.to(self._own_dtype))
            for p in self._shards(p for p in self.student.parameters() if p.requires_grad)
        ]
        for p in trained:
            p.grad = torch.empty_like(p)
        optimizer = self._module.optimizer_factory(trained)
        for group in optimizer.param_groups:
            # torch's own choice where all parameters are on a GPU
            if self._layout.on_gpu and group.get("foreach", 0) is None and not group.get("fused"):
                group["foreach"] = True
        with LiveBytes():  # the first step makes the states
            optimizer.step()
        states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        held = [*trained, *[p.grad for p in trained], *states]
        with LiveBytes(ignored=held) as live:
            optimizer.step()
        return live.peak.total(), sum(v.numel() * v.element_size() for v in states)

    def optimizer_step(self) -> Counter[str]:
        """Return what is held at the peak of the optimiser's step."""
        if self._layout.offload_student:
            return Counter(self.static)
        own = Counter({"gradients": self.gradient_bytes, "optimizer states": self._temporary})
        return self.static + own

    # ------------------------------------------------------------------- forward and backward

    def update(self, work: Work) -> Counter[str]:
        """Return what is held at the peak of the forward and backward passes of an update."""
        rows = work.micro_rows
        peak = self._on_a_line(rows, work, lambda some: self._trace_update(work, some))
        held = self.static + peak
        if self._layout.kind != "fsdp":
            return held
        held["gathered weights"] = self._gathered()
        root, layers = _parts(self.student)
        layer = max(map(_elements, layers))
        reduced = self._reduce_itemsize
        # of a layer: gradients, what is sent, and the last one's that is being sent
        held["gradients"] += layer * (self.student.model.dtype.itemsize + 2 * reduced)
        # when all layers are done, the root's gradients are averaged
        last = self.static + Counter({"gathered weights": held["gathered weights"]})
        last["gradients"] = _elements(root) * (self.student.model.dtype.itemsize + reduced)
        held = max(held, last, key=Counter.total)
        if not self._layout.offload_student:
            held["gradients"] += self.gradient_bytes
        return held

    @property
    def _reduce_itemsize(self) -> int:
        name = self._layout.reduce_dtype
        return getattr(torch, name).itemsize if name else self.student.model.dtype.itemsize

    def _gathered(self) -> int:
        """Return the bytes of whole weights that FSDP2 holds during a forward or backward pass."""
        root, layers = _parts(self.student)
        of_student = _bytes(root)
        in_flight = max(map(_bytes, layers))
        if not self._layout.reshard_after_forward:
            of_student += sum(map(_bytes, layers))
        if self.teacher is not None:
            root, layers = _parts(self.teacher)
            of_student += _bytes(root)
            in_flight = max(in_flight, *map(_bytes, layers))
        return of_student + _LAYERS_IN_FLIGHT * in_flight

    def _on_a_line(
        self, rows: int, work: Work, trace: Callable[[int], Counter[str]]
    ) -> Counter[str]:
        """Return `trace(rows)`, extrapolated where that are many."""
        most = max(2, _TRACED_TOKENS // work.completion_tokens)
        if rows <= most:
            return trace(rows)
        half, whole = trace(most // 2), trace(most)
        steps = (rows - most) / (most - most // 2)
        keys = whole.keys() | half.keys()
        return Counter({k: round(whole[k] + steps * (whole[k] - half[k])) for k in keys})

    def _trace_update(self, work: Work, rows: int) -> Counter[str]:
        live = self._live()
        hooks = self._watch_gradients(live)
        size = UpdateSize(rows * work.completion_tokens, rows, work.completion_tokens)

        def loss(rollout: Rollout, student: TokenDistribution, teacher: Distribution) -> Tensor:
            weights = self._weights(rollout, student, teacher)
            weights = weights * self._module.reduction.scale(rollout, size)
            output = self._module.objective(student, teacher, rollout, weights)
            if self._module.metrics_every:
                on_policy_measures(student, teacher, rollout)
            return output.loss

        try:
            with live, self._autocast():
                # from the second micro-batch on, gradients are there from the start
                for _ in range(min(2, -(-work.update_rows // work.micro_rows))):
                    self._read_both(work, rows, loss, live).backward()
        finally:
            for hook in hooks:
                hook.remove()
            self.student.zero_grad()
        return live.peak

    def _live(self) -> LiveBytes:
        policies = [p for p in (self.student, self._decoder, self.teacher) if p is not None]
        held = [t for p in policies for t in (*p.parameters(), *p.buffers())]
        return LiveBytes(held, most_distinct=self.student.vocab_size)

    def _autocast(self) -> Any:
        if self._layout.precision == "bf16-mixed":
            return torch.autocast("cpu", torch.bfloat16)
        return nullcontext()

    def _watch_gradients(self, live: LiveBytes) -> list[Any]:
        """Count each gradient as one when it is there; a sharded layer's leaves at once."""
        layers = _parts(self.student)[1] if self._layout.kind == "fsdp" else []
        sharded = {id(p) for layer in layers for p in layer}

        def counted(parameter: Tensor) -> None:
            if id(parameter) in sharded:
                parameter.grad = None
            else:
                live.relabel(parameter.grad, "gradients")

        trained = [p for p in self.student.parameters() if p.requires_grad]
        return [p.register_post_accumulate_grad_hook(counted) for p in trained]

    def _read_both(
        self,
        work: Work,
        rows: int,
        reader: Callable[[Rollout, TokenDistribution, Distribution], Any],
        live: LiveBytes,
    ) -> Any:
        """As `OPDModule.read_both`, on rows of full length."""
        of_student = _full(rows, work.prompt_tokens, work.completion_tokens)
        of_teacher = _full(rows, work.teacher_prompt_tokens, work.completion_tokens)
        temperature = self._module.temperature or 1.0
        answers = []

        def with_teacher(teacher: Distribution) -> None:
            def with_student(student: TokenDistribution) -> None:
                with live.labelled("loss"):
                    answers.append(reader(of_student, student, teacher))

            self.student.read(of_student, with_student, temperature)

        if self.teacher is None:
            with_teacher(_served(of_teacher, self._module.objective))
        else:
            self.teacher.read(of_teacher, with_teacher, temperature)
        return answers.pop()

    def _weights(
        self, rollout: Rollout, student: TokenDistribution, teacher: Distribution
    ) -> Tensor:
        return combined_weight(self._module.token_weights, rollout, student, teacher)

    # --------------------------------------------------------------------------------- rollout

    def rollout(
        self, work: Work, sampling: SamplingConfig, max_rows: int | None, packs: bool
    ) -> Counter[str]:
        """Return what is held at the peak of a rollout by the embedded engine.

        Args:
            work: Rows and tokens.
            sampling: How tokens are drawn.
            max_rows: Rows decoded at once; None: all.
            packs: Whether the engine packs weights on a CPU.
        """
        rows = min(work.rows, max_rows or work.rows)
        prompts = min(work.prompts, -(-rows // work.group))
        held = Counter(self.static)
        if self._layout.kind == "fsdp":
            held["gathered weights"] = _bytes(self._decoder.parameters())
        if packs and not self._layout.on_gpu and self._decoder.model.dtype == torch.float32:
            linears = [m for m in self._decoder.model.modules() if type(m) is nn.Linear]
            held["packed weights"] = sum(_bytes([m.weight]) for m in linears)
        prefill = self._trace_prefill(prompts, work.prompt_tokens)
        decode = self._trace_decode(rows, work, sampling)
        return held + max(prefill, decode, key=Counter.total)

    @torch.no_grad()
    def _trace_prefill(self, prompts: int, length: int) -> Counter[str]:
        at_once = min(prompts, max(1, _PREFILL_TOKENS // length))
        cache = DynamicCache(config=self._decoder.model.config)
        with self._live() as live:
            self._forward(at_once, length, cache)
            of_cache = sum(
                value.numel() * value.element_size()
                for layer in cache.layers
                for value in vars(layer).values()
                if isinstance(value, Tensor)
            )
        # of this forward pass, and of those before it
        live.peak["activations"] -= of_cache
        live.peak["KV cache"] += of_cache * prompts // at_once
        return live.peak

    @torch.no_grad()
    def _trace_decode(self, rows: int, work: Work, sampling: SamplingConfig) -> Counter[str]:
        """Trace the last step, when the cache is full."""
        config = self._decoder.model.config
        cache = DynamicCache(config=config)
        last = work.length - 2  # the last token drawn is not read, and this step adds one
        # as much room as the cache has by then; where it cannot be joined it has none to spare
        width = grown(work.prompt_tokens, last + 1) - grown(0, 0) if can_join(cache) else last
        self._forward(rows, max(1, width), cache)
        with unset_fake_temporarily():
            every_row = torch.arange(rows)
        with self._live() as live:
            with live.labelled("KV cache"):
                cache = join_caches(config, max(1, width), [(cache, every_row)])
                drawn = [
                    torch.empty(rows, work.completion_tokens, dtype=dtype)
                    for dtype in (torch.float64, torch.long, torch.float32)
                ]
            live.forget_peak()
            logits = self._forward(rows, 1, cache, width)
            sample(logits, drawn[0][:, 0], sampling)
        return live.peak

    def _forward(self, rows: int, length: int, cache: DynamicCache, before: int = 0) -> Tensor:
        """Return the logits [rows, V] after `length` tokens that follow `before` in the cache."""
        self._decoder.eval()
        positions = torch.arange(before, before + length).expand(rows, length)
        return self._decoder.model(
            input_ids=torch.zeros(rows, length, dtype=torch.long),
            attention_mask=torch.ones(rows, before + length, dtype=torch.long),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1, : self._decoder.vocab_size]

    @torch.no_grad()
    def evaluation(self, work: Work) -> Counter[str]:
        """Return what is held at the peak of measuring a batch of held-out completions."""

        def trace(rows: int) -> Counter[str]:
            with self._live() as live:
                self._read_both(work, rows, lambda r, s, t: on_policy_measures(s, t, r), live)
            return live.peak

        held = self.static + self._on_a_line(max(1, work.rows), work, trace)
        if self._layout.kind == "fsdp":
            held["gathered weights"] = self._gathered()
        return held


class _WithoutMask(CausalPolicy):
    """As flash kernels read rows: no mask of a row's square. Here sdpa stands for them."""

    def _inputs(self, rollout: Rollout) -> tuple[dict[str, Tensor | None], Tensor]:
        inputs, predicts = super()._inputs(rollout)
        return inputs | {"attention_mask": None}, predicts


def _policy(spec: PolicySpec) -> CausalPolicy:
    flash = "flash" in (spec.attn_implementation or "")
    if flash:
        spec = replace(spec, attn_implementation="sdpa")
    model = replace(spec, compile=False).build()
    return (_WithoutMask if flash else CausalPolicy)(model, packed=False if flash else spec.packed)


def _parts(policy: CausalPolicy) -> tuple[list[nn.Parameter], list[list[nn.Parameter]]]:
    """Return the parameters outside the decoder layers, and those of each layer."""
    layers = [list(layer.parameters()) for layer in decoder_layers(policy.model)]
    inside = {id(p) for layer in layers for p in layer}
    return [p for p in policy.parameters() if id(p) not in inside], layers


def _elements(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _full(rows: int, prompt_tokens: int, completion_tokens: int) -> Rollout:
    """Return rows of one length with real masks and ids, and all that an objective may ask for."""
    with unset_fake_temporarily():
        rollout = memory.full_rows(rows, prompt_tokens + completion_tokens, 2, CPU)
        rollout.completion_mask[:, :prompt_tokens] = False
        return rollout


def _served(rollout: Rollout, objective: Objective) -> TopKDistribution:
    """Return a teacher's answer from another process."""
    n, k = rollout.num_tokens, getattr(objective, "k", 1)
    ids = torch.empty(n, k, dtype=torch.long)
    return TopKDistribution(ids, torch.empty(n, k), torch.empty(n))
