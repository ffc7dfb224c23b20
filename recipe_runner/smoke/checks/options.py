"""Checks of the options: every key of the recipe has reached what it configures, optimizer and schedule included."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer, get_scheduler
from transformers.activations import ACT2FN

from recipe_runner.smoke.checks.done import Done, Found, is_of_base, is_same, list_names

RISE = 1.001  # times the learning rate that a recipe says: no schedule goes above it
# Keys that the runner reads itself, or that have a check of their own.
OWN_CHECK = ("chat_template_path", "peft_optimizer", "report_to", "gradient_accumulation_steps", "save_total_limit")
# Fields of TRL's configuration that the runner fills, from other sections of the recipe or from the machine.
FILLED = (
    *("output_dir", "run_name", "logging_dir", "seed", "data_seed", "model_init_kwargs", "trust_remote_code"),
    *("bf16", "fp16", "tf32", "dataset_kwargs", "do_train", "do_eval", "gradient_checkpointing", "report_to"),
    *("activation_checkpointing", "logging_nan_inf_filter", "accelerator_config", "dataloader_pin_memory"),
    *("pad_to_multiple_of", "reward_weights", "generation_batch_size", "steps_per_generation"),
    *("metric_for_best_model", "greater_is_better"),  # where a recipe asks for the best, and does not say by what
)
# Those that it fills where rows have images; the last one is TRL's for every vision model.
FILLED_FOR_IMAGES = (
    "remove_unused_columns",
    "assistant_only_loss",
    "completion_only_loss",
    "ddp_find_unused_parameters",
)
# What TRL's trainers keep beside their configuration.
HELD = ("beta", "loss_type", "temperature", "num_generations", "num_iterations", "max_completion_length")
# Keys of `peft` that PEFT spells out in its configuration: `check_targets` looks at what they do.
SPELT_OUT = ("target_modules", "modules_to_save", "exclude_modules", "init_lora_weights")
# Fields of PEFT's configurations that name the base, or that PEFT fills.
FILLED_BY_PEFT = (
    *SPELT_OUT,
    *("base_model_name_or_path", "revision", "task_type", "peft_type", "peft_version", "auto_mapping"),
    "inference_mode",
    *("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "encoder_hidden_size"),
    *("total_step", "rank_pattern", "tokenizer_name_or_path", "tokenizer_kwargs"),
)


def check_options(done: Done) -> Found:
    """Every key of the recipe reached the object that it configures, with that value."""
    config, small = done.seen.trainer.args, done.small.recipe
    for key, value in small.training.said.items():
        if key in OWN_CHECK:
            continue
        found = getattr(config, key, None)
        if not is_same(found, value):
            yield f"training.{key} is {value!r}, and the trainer has {found!r}"
    filled = (*FILLED, *(FILLED_FOR_IMAGES if done.recipe.dataset.images else ()))
    for key, found, default in _find_changed(config, small.training.said, small.training.defaults, filled):
        yield f"the recipe does not say training.{key}: it is {default!r} then, and the trainer has {found!r}"
    for key in HELD:  # what TRL's trainers keep apart from their configuration
        held = getattr(done.seen.trainer, {"loss_type": "loss_types"}.get(key, key), None)
        if held is not None and hasattr(config, key) and not is_same(held, getattr(config, key)):
            yield f"training.{key} is {getattr(config, key)!r}, and the trainer computes with {held!r}"
    batches = done.recipe.training["gradient_accumulation_steps"]
    if not done.recipe.run.global_batch_size and config.gradient_accumulation_steps != batches:
        found = config.gradient_accumulation_steps
        yield f"training.gradient_accumulation_steps is {batches}, and the trainer has {found}"
    if (config.seed, config.data_seed) != (done.recipe.run.seed, done.recipe.run.seed):
        yield f"run.seed is {done.recipe.run.seed}, and the trainer has {config.seed} and {config.data_seed}"
    if done.seen.resting:
        yield "layers are not in training mode while batches are learned: nothing is dropped"
    yield from _check_peft(done)
    yield from _check_model(done)
    yield from _check_quantization(done)


def _find_changed(
    config: Any, said: Mapping[str, Any], defaults: Mapping[str, Any], filled: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Fields that a recipe does not name, and that are not as upstream's class has them: name, value, default."""
    for field in fields(config):
        if field.name in said or field.name in filled:
            continue
        own = field.default if field.default_factory is MISSING else field.default_factory()
        default, found = defaults.get(field.name, own), getattr(config, field.name)
        if not is_same(found, default):
            yield field.name, found, default


def _check_peft(done: Done) -> Found:
    if not done.recipe.peft:
        if isinstance(done.model, PeftModel):
            yield "there is an adapter, and the recipe has none"
        return
    if not isinstance(done.model, PeftModel):
        yield "there is no adapter, and the recipe has one"
        return
    config = done.model.active_peft_config
    method = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    if method != done.recipe.peft["method"]:
        yield f"peft.method is {done.recipe.peft['method']}, and the adapter is {method}"
    for key, value in done.small.recipe.peft.said.items():
        if key in ("method", *SPELT_OUT):
            continue
        found = getattr(config, key, None)
        if not is_same(found, value) and not hasattr(found, "__dataclass_fields__"):
            yield f"peft.{key} is {value!r}, and the adapter has {found!r}"
    for key, found, default in _find_changed(config, done.recipe.peft.said, done.recipe.peft.defaults, FILLED_BY_PEFT):
        if not hasattr(found, "__dataclass_fields__"):
            yield f"the recipe does not say peft.{key}: it is {default!r} then, and the adapter has {found!r}"
    if method == "bottleneck":
        wanted = type(ACT2FN[done.recipe.peft["non_linearity"]])
        kinds = {type(of) for m in done.model.modules() for of in (getattr(m, "activations", None) or {}).values()}
        if kinds != {wanted}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            yield f"peft.non_linearity is {done.recipe.peft['non_linearity']}, and the adapters have {names or 'none'}"
    if method == "adalora" and config.total_step != done.small.recipe.training["max_steps"]:
        steps = done.small.recipe.training["max_steps"]
        yield f"AdaLoRA plans its ranks for {config.total_step} steps, and {steps} are taken"
    if method == "lora":
        yield from _check_lora(done)


def _check_lora(done: Done) -> Found:
    """Dropout and scaling of LoRA's layers, as they compute."""
    rates = {
        module.p
        for name, module in done.model.named_modules()
        if "lora_dropout" in name and isinstance(module, torch.nn.Dropout)
    }
    dropout = 0.0 if done.recipe.training["disable_dropout"] else done.recipe.peft["lora_dropout"] or 0.0
    if (rates or {0.0}) != {dropout}:
        yield f"peft.lora_dropout is {done.recipe.peft['lora_dropout']}, and the layers drop {sorted(rates)}"
    rank, alpha = done.recipe.peft["r"], done.recipe.peft["lora_alpha"]
    patterns = done.recipe.peft["rank_pattern"] or done.recipe.peft["alpha_pattern"]
    wanted = alpha / math.sqrt(rank) if done.recipe.peft["use_rslora"] else alpha / rank
    scales = {
        float(of)
        for m in done.model.modules()
        if isinstance(m, BaseTunerLayer)
        for of in getattr(m, "scaling", {}).values()
    }
    if not patterns and any(not math.isclose(scale, wanted, rel_tol=1e-6) for scale in scales):
        yield f"what LoRA adds is scaled by {sorted(scales)}, not by {wanted:g} (lora_alpha, r)"


def _check_model(done: Done) -> Found:
    section = done.small.recipe.model
    attention = section.attn_implementation
    if attention and done.model.config.get_text_config()._attn_implementation != attention:
        yield f"model.attn_implementation is {attention}, and the model has {done.model.config._attn_implementation}"
    wanted = done.seen.prepared.precision.dtype
    if section.dtype and wanted != section.dtype:
        yield f"model.dtype is {section.dtype}, and {wanted} was chosen"
    plain = {
        str(p.dtype).removeprefix("torch.")
        for name, p in done.model.named_parameters()
        if is_of_base(name) and not p.requires_grad and p.is_floating_point() and "norm" not in name
    }
    if section.dtype and plain and plain != {section.dtype}:
        yield f"model.dtype is {section.dtype}, and the weights are {', '.join(sorted(plain))}"
    whole = not done.recipe.peft and section.dtype  # the weights themselves, in the precision that the recipe asks for
    learned = {
        str(p.dtype).removeprefix("torch.")
        for name, p in done.model.named_parameters()
        if p.requires_grad and (not done.recipe.peft or not (is_of_base(name) or "modules_to_save" in name))
    }
    if not whole and not done.recipe.quantization and learned != {"float32"}:  # TRL's QLoRA is in bfloat16
        yield f"what is trained is in {', '.join(sorted(learned))}, and not in float32"
    checkpointing = done.small.recipe.training["activation_checkpointing"]
    if checkpointing is not None and bool(done.model.is_gradient_checkpointing) != bool(checkpointing):
        yield f"training.activation_checkpointing is {checkpointing}, and the model does otherwise"


def _check_quantization(done: Done) -> Found:
    asked = done.recipe.quantization.said
    layers = [m for m in done.model.modules() if isinstance(m, Linear4bit | Linear8bitLt)]
    if not asked:
        if layers:
            yield "the base is quantized, and the recipe does not say so"
        return
    if not layers:
        yield "no layer of the base is quantized"
        return
    if asked.get("load_in_8bit") and not all(isinstance(layer, Linear8bitLt) for layer in layers):
        yield "the base is not in 8 bits"
    if not asked.get("load_in_4bit"):
        return
    weights: list[Any] = [layer.weight for layer in layers if isinstance(layer, Linear4bit)]
    states = [weight.quant_state for weight in weights]
    if len(states) != len(layers):
        yield "the base is not in 4 bits"
        return
    skipped = asked.get("llm_int8_skip_modules") or ()
    if isinstance(done.model.get_output_embeddings(), Linear4bit) and not skipped:
        yield "the head is quantized, too"
    plain = [
        name
        for name, module in done.model.named_modules()
        if type(module) is torch.nn.Linear and ".layers." in name and is_of_base(name)
    ]
    if plain and not skipped:
        yield f"{len(plain)} linear layers of the base are not quantized: {list_names(plain)}"
    section = done.recipe.quantization
    kinds, nested = {state.quant_type for state in states}, {bool(state.nested) for state in states}
    computed = {str(layer.compute_dtype).removeprefix("torch.") for layer in layers}
    if kinds != {section["bnb_4bit_quant_type"]}:
        yield f"quantization.bnb_4bit_quant_type is {section['bnb_4bit_quant_type']}, and the weights are {kinds}"
    if nested != {bool(section["bnb_4bit_use_double_quant"])}:
        said = section["bnb_4bit_use_double_quant"]
        yield f"quantization.bnb_4bit_use_double_quant is {said}, and the weights differ"
    if (dtype := asked.get("bnb_4bit_compute_dtype")) and computed != {dtype}:
        yield f"quantization.bnb_4bit_compute_dtype is {dtype}, and layers compute in {', '.join(sorted(computed))}"
    stored = {str(layer.weight.dtype).removeprefix("torch.") for layer in layers}
    if (dtype := asked.get("bnb_4bit_quant_storage")) and stored != {dtype}:
        yield f"quantization.bnb_4bit_quant_storage is {dtype}, and weights are stored as {', '.join(sorted(stored))}"


def check_optimizer(done: Done) -> Found:
    """The optimizer is the one that the recipe names, with its options."""
    trainer = done.seen.trainer
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if (done.recipe.training["peft_optimizer"] or {}).get("name"):
        return  # PEFT's: made by PEFT
    cls, options = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    wanted = done.recipe.training["optim"]
    if type(optimizer) is not cls:
        yield f"training.optim is {wanted}, and the optimizer is {type(optimizer).__name__}, not {cls.__name__}"
        return
    named = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}
    for key in ("betas", "eps"):
        if key in options and key in optimizer.param_groups[0]:
            found = optimizer.param_groups[0][key]
            if not is_same(found, options[key]):
                said = [name for name, of in named.items() if of == key]
                yield f"training.{' and '.join(said)}: the optimizer has {key} {found}, not {options[key]}"
    decay = done.recipe.training["weight_decay"]
    decays = {group.get("weight_decay", 0) for group in optimizer.param_groups if group["params"]}
    if decay is not None and not decays <= {decay, 0.0}:
        yield f"training.weight_decay is {decay}, and the optimizer has {sorted(decays)}"
    if decay and decay not in decays:
        yield f"training.weight_decay is {decay}, and no group of parameters has it"
    spared = {
        id(p)
        for name, p in done.model.named_parameters()
        if p.requires_grad and (name.endswith("bias") or "norm" in name)
    }
    if decay and any(
        id(p) in spared for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    ):
        yield "weight decay is put on norms or biases, which transformers spares"
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in done.model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        yield f"{len(missing)} trainable tensors are not the optimizer's: {list_names(missing)}"


def check_schedule(done: Done) -> Found:
    """The rate of each step is what rate, schedule and warm-up give; gradients are clipped; batches counted."""
    training, config = done.small.recipe.training, done.seen.trainer.args
    rate = training["learning_rate"]
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    warmup, steps = training["warmup_steps"] or 0, training["max_steps"]
    warmup = math.ceil(steps * warmup) if warmup < 1 else int(warmup)
    options = dict(training["lr_scheduler_kwargs"] or {})
    kind = str(getattr(training["lr_scheduler_type"], "value", training["lr_scheduler_type"]))
    schedule: Any = get_scheduler(kind, dummy, warmup, steps, scheduler_specific_kwargs=options)
    ratio = (done.recipe.training["peft_optimizer"] or {}).get("name")
    for step, found in enumerate(done.seen.rates, 1):
        wanted = dummy.param_groups[0]["lr"]
        if max(found) > rate * RISE and not ratio:
            yield f"the learning rate of step {step} is {max(found):.3g}: training.learning_rate is {rate:g}"
            break
        if not ratio and any(not math.isclose(of, wanted, rel_tol=1e-6, abs_tol=1e-12) for of in found):
            given = f"{rate:g} with {kind} and {warmup} steps of warm-up gives {wanted:.3g}"
            yield f"the learning rate of step {step} is {found[0]:.3g}: {given}"
            break
        dummy.step()
        if kind not in ("reduce_lr_on_plateau", "greedy"):
            schedule.step()
    if len(done.seen.rates) != steps:
        yield f"{len(done.seen.rates)} steps were taken, not {steps}"
    bound = training["max_grad_norm"]
    if bound and any(norm > bound * 1.05 for norm in done.seen.norms):
        yield f"training.max_grad_norm is {bound:g}, and a gradient was {max(done.seen.norms):.3g} long"
    rows, size = len(done.seen.trainer.train_dataset), config.per_device_train_batch_size
    expected = min(config.gradient_accumulation_steps, math.ceil(rows / size))
    if done.seen.counts and max(done.seen.counts.values()) != expected:
        most = max(done.seen.counts.values())
        yield f"a step took {most} batches, not {expected} (training.gradient_accumulation_steps)"
