"""The most memory that a run takes on a device: a step is traced, and what else is there is added."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from recipe_runner.plan import optimizer, step
from recipe_runner.plan.build import Built, build
from recipe_runner.plan.device import Device
from recipe_runner.plan.sharding import OPTIMIZING, Layers
from recipe_runner.plan.step import Batch, Step
from recipe_runner.plan.trace import GRADIENTS, OPTIMIZER, WEIGHTS, Kernels, Memory, Peak
from recipe_runner.recipe.recipe import Recipe


@dataclass(frozen=True)
class Stack:
    """What other training code does otherwise than TRL 1.16, for holding published figures against a plan.

    Attributes:
        full_logits: Whether the loss is made from all logits, as transformers' own is.
        float32_logits: Whether in float32.
        copied_logits: Whether those are copied when they are shifted (transformers before 4.50).
        float32_casts: Whether weights that are not quantized are float32 (PEFT's prepare_model_for_kbit_training).
        math_attention: Whether attention keeps its weights, one for each pair of tokens.
        kept_inputs: Whether 4-bit layers keep what they are given (bitsandbytes before 0.43).
        adapter_dtype: Of the adapter; None for what PEFT and TRL do today.
    """

    full_logits: bool = False
    float32_logits: bool = True
    copied_logits: bool = False
    float32_casts: bool = False
    math_attention: bool = False
    kept_inputs: bool = False
    adapter_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Setting:
    """What decides the memory of a run beside its recipe.

    Attributes:
        config: Of the base model.
        device: What it is trained on.
        dtype: Of the weights.
        mixed: Data type of mixed precision; None without.
        train: A batch of training.
        held_out: A batch of evaluation; None without.
        continued: Whether the adapter was trained before.
        stack: What is done otherwise than by TRL.
    """

    config: PretrainedConfig
    device: Device
    dtype: torch.dtype
    mixed: torch.dtype | None
    train: Batch
    held_out: Batch | None = None
    continued: bool = False
    stack: Stack = Stack()


@dataclass(frozen=True)
class Traced:
    """What a step took.

    Attributes:
        parameters: `total` and `trainable`, and the trainable ones by group.
        peaks: Phase -> the most memory in it.
        flops: Of a batch, forward and backward.
        operations: Of a batch.
        paged: Bytes of optimizer states that may leave the device.
        state_bytes: Of the optimizer's states on the device.
        trained_bytes: Of what is trained.
        saved_bytes: Of what a result holds.
        layers: What is gathered at a time, where weights are shared.
    """

    parameters: Mapping[str, int]
    peaks: Mapping[str, Peak]
    flops: int
    operations: int
    paged: int
    state_bytes: int
    trained_bytes: int
    saved_bytes: int
    layers: Layers

    @property
    def peak(self) -> Peak:
        """The highest."""
        return max(self.peaks.values(), key=lambda peak: peak.total)

    @property
    def phase(self) -> str:
        """When it comes."""
        return max(self.peaks, key=lambda name: self.peaks[name].total)


def trace(recipe: Recipe, setting: Setting) -> Traced:
    """Runs a step of a recipe without data.

    Raises:
        UserError: The model or its adapter can't be built.
    """
    built = build(recipe, setting.config, setting.dtype, setting.mixed is not None, setting.continued)
    memory, stack = Memory(), setting.stack
    _change_types(built, stack)
    kernels = Kernels(memory, setting.device.gpu, setting.mixed, stack.math_attention, stack.kept_inputs)
    offloads = bool(recipe.training["activation_offloading"])
    run = Step(built, memory, kernels, stack.full_logits, stack.copied_logits, stack.float32_logits, offloads)
    run.hold_model()
    name = optimizer_of(recipe)
    needs = optimizer.measure(name, built.model, setting.device.gpu)
    memory.change(OPTIMIZER, needs.states)
    if recipe.training["gradient_accumulation_steps"] > 1:
        for parameter in built.trained:
            parameter.grad = torch.empty_like(parameter)
            memory.hold([parameter.grad], GRADIENTS)
    _add_reference(recipe, built, memory)
    with run.watched():
        _train(recipe, run, setting.train)
        flops, operations = memory.flops, memory.operations
        memory.phase = OPTIMIZING
        memory.change(OPTIMIZER, needs.scratch)
        memory.change(OPTIMIZER, -needs.scratch)
        if setting.held_out:
            for parameter in built.trained:
                parameter.grad = None
            step.evaluate(run, setting.held_out)
    saved = sum(parameter.numel() * parameter.element_size() for parameter in built.trained)
    if not recipe.peft:
        saved = sum(p.numel() for p in built.model.parameters()) * (2 if setting.dtype != torch.float32 else 4)
    trained_bytes = sum(parameter.numel() * parameter.element_size() for parameter in built.trained)
    layers = measure_layers(built)
    figures = (flops, operations, needs.paged, needs.states, trained_bytes, saved, layers)
    return Traced(count(built), memory.peaks, *figures)


def measure_layers(built: Built) -> Layers:
    """The largest layer, and what is in none."""

    def size(module: torch.nn.Module, trained: bool = False) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad or not trained)

    number = built.base.config.get_text_config().num_hidden_layers
    lists = [m for m in built.base.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == number]
    layers = list(lists[0]) if lists else [built.base]
    root = max(0, size(built.base) - sum(size(layer) for layer in layers))
    return Layers(max(map(size, layers)), root, max(size(layer, True) for layer in layers))


def _change_types(built: Built, stack: Stack) -> None:
    """Data types that other code gives to what is trained, and to what is not quantized."""
    for parameter in built.model.parameters():
        if stack.adapter_dtype and parameter.requires_grad:
            parameter.data = parameter.data.to(stack.adapter_dtype)
        elif stack.float32_casts and not parameter.requires_grad and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.float()


def optimizer_of(recipe: Recipe) -> str:
    """Transformers' name of the optimizer."""
    return str(recipe.training["optim"] or "adamw_torch_fused")


def count(built: Built) -> dict[str, int]:
    """Parameters: all, those that are trained, and these by group; 4-bit ones as the numbers that they stand for."""
    groups: dict[str, int] = {"total": 0, "trainable": 0}
    for name, parameter in built.model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        numbers = state.shape.numel() if state is not None else parameter.numel()
        groups["total"] += numbers
        if parameter.requires_grad:
            groups["trainable"] += numbers
            groups[_group(name)] = groups.get(_group(name), 0) + numbers
    return groups


def _group(name: str) -> str:
    """What a trained parameter is a part of: the module that it is in, without numbers of layers."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    known = [part for part in parts if part.endswith(("_proj", "embed_tokens", "lm_head", "norm", "score"))]
    return known[-1] if known else parts[-2] if len(parts) > 1 else parts[0]


def _add_reference(recipe: Recipe, built: Built, memory: Memory) -> None:
    """The second model that full fine-tuning is compared with."""
    compared = recipe.stage.reference and not recipe.peft
    if compared and recipe.stage.rewarded:
        compared = bool(recipe.training["beta"])
    if compared and not recipe.training["precompute_ref_log_probs"]:
        memory.change(WEIGHTS, sum(p.numel() * p.element_size() for p in built.model.parameters()))


def _train(recipe: Recipe, run: Step, batch: Batch) -> None:
    training, name = recipe.training, recipe.stage.shape.removeprefix("image_")
    if name == "pairs":
        step.prefer(run, batch, bool(training["precompute_ref_log_probs"]))
    elif name == "unpaired":
        step.judge(
            run, batch, training["loss_type"] in recipe.stage.first_loss, bool(training["precompute_ref_log_probs"])
        )
    elif name == "scored_pairs":
        step.rank(run, batch)
    elif recipe.stage.generates:
        more = training["steps_per_generation"] or training["gradient_accumulation_steps"]
        refers = recipe.stage.taught or bool(training["beta"])
        step.reinforce(run, batch, batch.rows * int(more), refers)
    else:
        step.learn(run, batch)
