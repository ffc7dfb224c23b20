"""The plan that is printed before the first step: what will be trained, on what, how long, and where."""

import math
from pathlib import Path

from trl import SFTConfig, SFTTrainer

from recipe_runner.launch.processes import describe_launcher
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.training.environment import describe_device, describe_processes
from recipe_runner.training.prepare import Prepared


def describe_plan(recipe: Recipe, trainer: SFTTrainer, prepared: Prepared, folder: Path) -> str:
    """Describes a run that is about to begin, one fact a line."""
    config, values = trainer.args, recipe.values
    packed = (
        f" packed into {len(prepared.train.dataset):,} rows of up to {config.max_length} tokens"
        if getattr(config, "packing", False)
        else ""
    )
    unpaged = "; no GPU: states are not paged" if "paged" in config.optim.value and config.device.type == "cpu" else ""
    lines = {
        "model": f"{values['model']['name_or_path']} ({describe_method(recipe)})",
        "adapter": f"continued from {values['model']['adapter']}" if prepared.adapter else "",
        "reference": describe_reference(recipe),
        "trainable": describe_trainable(trainer),
        "data": f"{prepared.train.accounting}{packed}",
        "lengths": prepared.train.accounting.describe_lengths(),
        "batches": prepared.train.accounting.describe_batches(),
        "sources": prepared.train.accounting.describe_sources(),
        "eval data": str(prepared.evaluation.accounting) if prepared.evaluation else "none",
        "steps": describe_steps(config, len(trainer.train_dataset)),
        "optimizer": f"{config.optim.value}, learning rate {config.learning_rate:g},"
        f" {config.lr_scheduler_type.value}{unpaged}",
        "precision": str(prepared.precision),
        "device": describe_device(config),
        "launcher": describe_launcher(),
        "timeout": f"a process that hangs ends the run after {config.ddp_timeout:,} s (training.ddp_timeout)"
        * (config.world_size > 1),
        "run folder": str(folder),
    }
    return "\n".join(f"  {key:<11}{text}" for key, text in lines.items() if text)


def describe_steps(config: SFTConfig, rows: int) -> str:
    """Steps, epochs and batch size, in a line."""
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    steps = count_steps(config, rows)
    return (
        f"{steps:,} of {batch} rows: {config.per_device_train_batch_size} per device"
        f" x {config.gradient_accumulation_steps} accumulated x {describe_processes(config)};"
        f" {steps / _steps_per_epoch(config, rows):.3g} epochs"
    )


def count_steps(config: SFTConfig, rows: int) -> int:
    """Optimizer steps of the run. Source: transformers/trainer.py 5.23, Trainer.set_initial_training_values."""
    steps = math.ceil(config.num_train_epochs * _steps_per_epoch(config, rows))
    return config.max_steps if config.max_steps > 0 else steps


def _steps_per_epoch(config: SFTConfig, rows: int) -> int:
    round_ = math.floor if config.dataloader_drop_last else math.ceil
    batches = round_(rows / (config.per_device_train_batch_size * config.world_size))
    return max(math.ceil(batches / config.gradient_accumulation_steps), 1)


def describe_method(recipe: Recipe) -> str:
    """How the model is adapted, in a few words."""
    peft, quantization = recipe.section("peft"), recipe.section("quantization")
    if not peft:
        return "full fine-tuning"
    if not quantization:
        return f"{peft['method']} adapter"
    bits = "8-bit" if quantization.get("load_in_8bit") else f"4-bit {quantization.get('bnb_4bit_quant_type', 'fp4')}"
    return f"{peft['method']} adapter on a {bits} base"


def describe_reference(recipe: Recipe) -> str:
    """What DPO compares the trained model with. Source: trl/trainer/dpo_trainer.py 1.16.0, DPOTrainer.__init__."""
    if recipe.values["stage"] != "dpo":
        return ""
    if "adapter" in recipe.values["model"]:
        which = "a frozen copy of the adapter"
    else:
        which = "the base model, the adapter disabled" if recipe.section("peft") else "a second copy of the model"
    return which + (
        ", computed once before training" * bool(recipe.section("training").get("precompute_ref_log_probs"))
    )


def describe_trainable(trainer: SFTTrainer) -> str:
    """Trainable parameters of the total; 4-bit weights count as the parameters they stand for."""
    model = trainer.model
    if hasattr(model, "get_nb_trainable_parameters"):
        trainable, total = model.get_nb_trainable_parameters()
    else:
        trainable, total = model.num_parameters(only_trainable=True), model.num_parameters()
    return f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})"
