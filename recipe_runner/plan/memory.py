"""The most memory that a run takes on a device: a step is traced, and what else is there is added."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from recipe_runner.plan import optimizer, step
from recipe_runner.plan.build import Built, build
from recipe_runner.plan.device import Device
from recipe_runner.plan.layers import Repeated, find_layers, find_repeated, repeat, shortened
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
class Model:
    """A recipe's model without data, and what does not depend on the batch.

    Attributes:
        built: The model.
        repeated: Its layers, if all are alike.
        needs: Of the optimizer.
        parameters: `total` and `trainable`, and the trainable ones by group.
        layers: What is gathered at a time, where weights are shared.
        trained_bytes: Of what is trained.
        saved_bytes: Of what a result holds.
    """

    built: Built
    repeated: Repeated | None
    needs: optimizer.Needs
    parameters: Mapping[str, int]
    layers: Layers
    trained_bytes: int
    saved_bytes: int

    def with_optimizer(self, recipe: Recipe, device: Device) -> "Model":
        """The same model, with the optimizer of another recipe."""
        return replace(self, needs=optimizer.measure(optimizer_of(recipe), self.built.model, device.gpu))


@dataclass(frozen=True)
class Traced:
    """What a step took.

    Attributes:
        model: That took it.
        peaks: Phase -> the most memory in it.
        flops: Of a batch, forward and backward.
        operations: Of a batch.
    """

    model: Model
    peaks: Mapping[str, Peak]
    flops: int
    operations: int

    @property
    def peak(self) -> Peak:
        """The highest."""
        return max(self.peaks.values(), key=lambda peak: peak.total)

    @property
    def phase(self) -> str:
        """When it comes."""
        return max(self.peaks, key=lambda name: self.peaks[name].total)


def build_model(recipe: Recipe, setting: Setting) -> Model:
    """Builds the model of a recipe.

    Raises:
        UserError: The model or its adapter can't be built.
    """
    built = build(recipe, setting.config, setting.dtype, setting.mixed is not None, setting.continued)
    _change_types(built, setting.stack)
    needs = optimizer.measure(optimizer_of(recipe), built.model, setting.device.gpu)
    trained_bytes = saved = sum(parameter.numel() * parameter.element_size() for parameter in built.trained)
    if not recipe.peft:
        saved = sum(p.numel() for p in built.model.parameters()) * (2 if setting.dtype != torch.float32 else 4)
    return Model(built, find_repeated(built), needs, count(built), measure_layers(built), trained_bytes, saved)


def trace(recipe: Recipe, setting: Setting, model: Model | None = None) -> Traced:
    """Runs a step of a recipe without data, and a batch of evaluation.

    Args:
        recipe: The recipe.
        setting: What decides the rest.
        model: Of the recipe, if it was built before.

    Raises:
        UserError: The model or its adapter can't be built.
    """
    model = model or build_model(recipe, setting)
    trained = _watch(recipe, setting, model, setting.train, evaluating=False)
    peaks = trained.find_peaks()
    if setting.held_out:
        evaluated = _watch(recipe, setting, model, setting.held_out, evaluating=True)
        peaks[step.EVALUATION] = evaluated.find_peaks()[step.EVALUATION]
    return Traced(model, peaks, trained.flops, trained.operations)


def _watch(recipe: Recipe, setting: Setting, model: Model, batch: Batch, evaluating: bool) -> Memory:
    """What a batch takes: run with few layers, where it is known what the others do; else with all."""
    if model.repeated:
        try:
            memory = _run(recipe, setting, model, batch, evaluating, model.repeated)
        except Exception:  # an architecture whose code needs all of its layers: what fails then is said
            memory = Memory()
        if repeat(memory, model.repeated):
            return memory
    return _run(recipe, setting, model, batch, evaluating, None)


def _run(
    recipe: Recipe, setting: Setting, model: Model, batch: Batch, evaluating: bool, repeated: Repeated | None
) -> Memory:
    memory, stack, built = Memory(), setting.stack, model.built
    kernels = Kernels(memory, setting.device.gpu, setting.mixed, stack.math_attention, stack.kept_inputs)
    offloads = bool(recipe.training["activation_offloading"])
    run = Step(built, memory, kernels, stack.full_logits, stack.copied_logits, stack.float32_logits, offloads)
    run.hold_model()
    memory.change(OPTIMIZER, model.needs.states)
    _add_reference(recipe, built, memory)
    trained = built.trained
    for parameter in trained:  # of a run before
        parameter.grad = None
    if recipe.training["gradient_accumulation_steps"] > 1 and not evaluating:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
            memory.hold([parameter.grad], GRADIENTS)
    with shortened(repeated, memory) if repeated else contextlib.nullcontext(), run.watched():
        if evaluating:
            step.evaluate(run, batch)
        else:
            _train(recipe, run, batch)
    if not evaluating:
        memory.phase = OPTIMIZING
        memory.change(OPTIMIZER, model.needs.scratch)
        memory.change(OPTIMIZER, -model.needs.scratch)
    return memory


def measure_layers(built: Built) -> Layers:
    """The largest layer, and what is in none."""

    def size(module: torch.nn.Module, trained: bool = False) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad or not trained)

    layers = list(find_layers(built.base) or [built.base])
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
