"""A training step of each stage without data, in the order in which TRL 1.16 runs it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from recipe_runner.plan.build import Built
from recipe_runner.plan.trace import ACTIVATIONS, ADAPTERS, GRADIENTS, LOGITS, WEIGHTS, Kernels, Memory

WRITTEN = (
    14  # bytes for each logit of the next token: as it comes, in float32, sorted, as a share (transformers' sample)
)
LEAST_OFFLOADED = 1024  # bytes: min_offload_size of TRL's OffloadActivations
FORWARD, BACKWARD, REFERENCE, EVALUATION, GENERATION = "forward", "backward", "reference", "evaluation", "generation"


@dataclass(frozen=True)
class Batch:
    """What a device is given at a time.

    Attributes:
        rows: Sequences: of pairs twice as many as pairs.
        length: Tokens of each.
        supervised: Tokens of each that are learned.
        flat: Whether all rows are one sequence, kept apart by their positions (packing).
        padded: Whether there is padding, which a mask hides.
        answer: Tokens at the end of each that the model writes itself.
    """

    rows: int
    length: int
    supervised: int
    flat: bool = False
    padded: bool = False
    answer: int = 0

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.rows * self.length


@dataclass
class Step:
    """A model, what counts its memory, and what the machine does its own way.

    Attributes:
        built: The model.
        memory: What counts.
        kernels: What the machine does its own way.
        full_logits: See `memory.Stack`, as the two below.
        copied_logits: See there.
        float32_logits: See there.
        offloads: Whether activations leave the device until the backward pass.
    """

    built: Built
    memory: Memory
    kernels: Kernels
    full_logits: bool = False
    copied_logits: bool = False
    float32_logits: bool = True
    offloads: bool = False

    def hold_model(self) -> None:
        """Counts the model's own tensors."""
        adapter = self.built.model is not self.built.base
        self.memory.hold(self.built.trained, ADAPTERS if adapter else WEIGHTS)
        self.memory.hold(list(self.built.frozen), WEIGHTS)

    def forward(self, model: Any, batch: Batch) -> Any:
        """A forward pass: log-probabilities of the labels, or scores of the sequences."""
        ids, more = self._inputs(batch)
        self.memory.selected = batch.rows * batch.supervised
        self.kernels.casts.clear()
        self.kernels.caching = True
        if self.full_logits:
            made = self._lose(model(input_ids=ids, **more).logits)
        elif self.built.base.get_output_embeddings() is None:
            made = model(input_ids=ids, **more)
        else:
            made = model(input_ids=ids, labels=ids, fused_lm_head=True, **more)
        self.kernels.casts.clear()
        self.kernels.caching = False
        return made

    def _lose(self, given: torch.Tensor) -> torch.Tensor:
        """The loss from all logits, which are there until it is made. Source: transformers/loss/loss_utils.py."""
        logits = given.float() if self.float32_logits else given
        shifted = logits[..., :-1, :].contiguous() if self.copied_logits else logits
        labels = torch.empty(shifted.shape[:-1], dtype=torch.long, device="meta")
        return torch.nn.functional.cross_entropy(shifted.view(-1, shifted.shape[-1]), labels.view(-1))

    def _inputs(self, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
        rows, length = (1, batch.tokens) if batch.flat else (batch.rows, batch.length)
        ids = torch.empty((rows, length), dtype=torch.long, device="meta")
        more: dict[str, Any] = {}
        if (batch.padded or batch.flat) and self.masks:
            more["attention_mask"] = torch.empty((rows, 1, length, length), dtype=torch.bool, device="meta")
        if batch.flat:
            more["position_ids"] = torch.empty((rows, length), dtype=torch.long, device="meta")
        return ids, more

    @property
    def masks(self) -> bool:
        """Whether attention takes a mask at all."""
        flash = "flash" in (self.built.base.config._attn_implementation or "")
        return not flash and not getattr(self.built.model, "active_peft_config", None).__class__.__name__.startswith(
            ("Prefix", "Prompt")
        )

    def backward(self, loss: torch.Tensor) -> None:
        """The backward pass; what is left in the end are gradients."""
        self.memory.phase, self.memory.kind = BACKWARD, LOGITS
        loss.backward()  # type: ignore[no-untyped-call]
        self.memory.begin_layer(None)
        self.memory.kind = ACTIVATIONS

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Tells the memory where logits begin and end, and what is a gradient."""
        hooks: list[Any] = []
        backbone = self.built.base.base_model

        head = self.built.base.get_output_embeddings()
        trains_head = head is not None and any(head.weight is one for one in self.built.trained)

        def begin(*args: Any) -> None:
            if self.memory.phase == BACKWARD and trains_head:  # its gradient is there, among the logits'
                self.memory.rename(head.weight.numel() * head.weight.element_size(), LOGITS, GRADIENTS)
            self.memory.kind = ACTIVATIONS

        def end(module: Any, args: Any, made: Any) -> None:
            self.memory.kind = LOGITS
            hidden = made[0]
            if hidden.requires_grad:
                hidden.register_hook(begin)

        def note(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                self.memory.mark(parameter.grad, GRADIENTS)

        hooks += [backbone.register_forward_pre_hook(begin), backbone.register_forward_hook(end)]
        trained: list[Any] = self.built.trained
        hooks += [parameter.register_post_accumulate_grad_hook(note) for parameter in trained]
        moved = offload(self.built) if self.offloads else contextlib.nullcontext()
        try:
            with self.kernels.in_place(), self.memory, moved:
                yield
        finally:
            for hook in hooks:
                hook.remove()


def offload(built: Built) -> Any:
    """While it lasts, activations leave the device, and come back for the backward pass.

    Source: trl/models/activation_offloading.py 1.16, OffloadActivations: all but parameters and small tensors. The five
    that it holds back for a while are not counted.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*built.model.parameters(), *built.frozen)}

    def leave(tensor: torch.Tensor) -> Any:
        size = tensor.numel() * tensor.element_size()
        if size < LEAST_OFFLOADED or tensor.untyped_storage()._cdata in own:
            return tensor
        return tensor.shape, tensor.stride(), tensor.dtype

    def come_back(left: Any) -> torch.Tensor:
        if isinstance(left, torch.Tensor):
            return left
        return torch.empty_strided(left[0], left[1], dtype=left[2], device="meta")

    return torch.autograd.graph.saved_tensors_hooks(leave, come_back)


def learn(step: Step, batch: Batch) -> None:
    """SFT and continued pre-training."""
    step.memory.phase = FORWARD
    made = step.forward(step.built.model, batch)
    loss = made if step.full_logits else -made.log_probs.sum()
    del made  # what else the loss computed is only logged
    step.backward(loss)


def prefer(step: Step, batch: Batch, precomputed: bool) -> None:
    """DPO: both answers of all pairs at once, then by the reference. Source: trl/trainer/dpo_trainer.py 1.16."""
    step.memory.phase = FORWARD
    scores = step.forward(step.built.model, batch).log_probs.sum(dim=1)
    known = torch.empty_like(scores) if precomputed else _refer(step, batch)
    chosen, rejected = (scores - known).chunk(2)
    step.backward(-torch.nn.functional.logsigmoid(chosen - rejected).mean())


def judge(step: Step, batch: Batch, estimated: bool, precomputed: bool) -> None:
    """KTO: with an estimate of the KL term on other rows. Source: trl/trainer/kto_trainer.py 1.16."""
    step.memory.phase = REFERENCE
    if estimated:
        with torch.no_grad():
            step.forward(step.built.model, batch)
    step.memory.phase = FORWARD
    scores = step.forward(step.built.model, batch).log_probs.sum(dim=1)
    known = torch.empty_like(scores)
    if not precomputed:
        if estimated:
            _refer(step, batch)
        known = _refer(step, batch)
    step.backward((1 - torch.sigmoid(scores - known)).mean())


def rank(step: Step, batch: Batch) -> None:
    """A reward model. Source: trl/trainer/reward_trainer.py 1.16."""
    step.memory.phase = FORWARD
    chosen, rejected = step.forward(step.built.model, batch).logits.squeeze(-1).chunk(2)
    step.backward(-torch.nn.functional.logsigmoid(chosen - rejected).mean())


def _refer(step: Step, batch: Batch) -> torch.Tensor:
    """What the reference gives: the base without its adapter; of full fine-tuning a second model."""
    before, step.memory.phase = step.memory.phase, REFERENCE
    model = step.built.model
    off = model.disable_adapter() if step.built.model is not step.built.base else contextlib.nullcontext()
    with torch.no_grad(), off:
        known: torch.Tensor = step.forward(model, batch).log_probs.sum(dim=1)
    step.memory.phase = before
    return known


def evaluate(step: Step, batch: Batch) -> None:
    """A forward pass without gradients and dropout."""
    step.memory.phase = EVALUATION
    step.built.model.eval()
    with torch.no_grad():
        step.forward(step.built.model, batch)
    step.built.model.train()


def reinforce(step: Step, batch: Batch, answers: int, refers: bool) -> None:
    """RLOO, GRPO and distillation: answers are written, compared by a reference or teacher, and learned.

    Source: trl/trainer/{rloo,grpo,distillation}_trainer.py 1.16: all answers of a step are written at once.

    Args:
        step: The step.
        batch: Of training: prompts with their answers.
        answers: That are written at a time.
        refers: Whether a reference or a teacher looks at them.
    """
    memory, base = step.memory, step.built.base
    text = base.config.get_text_config()
    memory.phase = GENERATION
    kept = measure_cache(text, step.built.number, step.kernels.autocast or step.built.dtype) * answers * batch.length
    memory.change(ACTIVATIONS, kept)
    numbers = answers * text.vocab_size
    memory.change(LOGITS, numbers * WRITTEN)
    with torch.no_grad():
        ids, more = step._inputs(Batch(answers, batch.length - batch.answer, 0, padded=True))
        base.base_model(input_ids=ids, **more)
    memory.kind = ACTIVATIONS
    memory.change(LOGITS, -numbers * WRITTEN)
    memory.change(ACTIVATIONS, -kept)
    if refers:
        _refer(step, batch)
    learn(step, batch)


def measure_cache(text: Any, layers: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of a token in so many layers."""
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(2 * layers * heads * size * dtype.itemsize)
