"""The trainer's configuration: the recipe's `training` section, and what other sections own."""

import math
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.integrations import get_available_reporting_integrations

from recipe_runner.model.precision import Precision
from recipe_runner.problems.errors import refused, user_error
from recipe_runner.recipe.sections import ModelSection
from recipe_runner.stages import Stage, load_class

OURS = ("chat_template_path", "peft_optimizer")  # read by model/tokenizer.py and training/optimizer.py


def build_config(
    stage: Stage, training: Mapping[str, Any], model: ModelSection, seed: int, precision: Precision
) -> Any:
    """An instance of the stage's configuration class. Joins no processes: see `launch/processes.py`.

    Raises:
        UserError: TRL or transformers refuses the combination of fields, or a tracker is not installed.
    """
    cls = load_class(stage.config)
    init = {"revision": model.revision, "use_safetensors": model.use_safetensors, "dtype": precision.dtype}
    if model.attn_implementation:
        init["attn_implementation"] = model.attn_implementation
    if model.experts_implementation:
        init["experts_implementation"] = model.experts_implementation
    if model.use_kernels:
        init["use_kernels"] = True
    section = {key: value for key, value in training.items() if key not in OURS}
    owned = {
        "output_dir": os.devnull,  # replaced once the run folder exists
        "seed": seed,
        "data_seed": seed,
        "bf16": precision.bf16,
        "fp16": precision.fp16,
        "trust_remote_code": model.trust_remote_code,
        "model_init_kwargs": init,
    }
    if "dataset_kwargs" in {field.name for field in fields(cls)}:
        owned["dataset_kwargs"] = {"skip_prepare_dataset": True}  # prepared before the weights are loaded
    chosen = (
        "load_best_model_at_end" in section and "metric_for_best_model" not in section
    )  # early stopping says it, too
    if stage.rewarded and chosen:
        owned |= {"metric_for_best_model": "eval_reward", "greater_is_better": True}  # their loss is near 0 always
    try:
        config = cls(**{**section, **owned})
    except (ValueError, ImportError, TypeError) as error:
        raise refused("training", section, error) from error
    trackers = get_available_reporting_integrations()
    for tracker in set(config.report_to) - set(trackers):
        known = f"installed trackers: {', '.join(sorted(trackers)) or 'none'}"
        raise user_error("tracker-missing", f"'{tracker}' is not installed", known, path=("training", "report_to"))
    return config


def count_steps(config: Any, rows: int, processes: int) -> int:
    """Optimizer steps of the run. Source: transformers/trainer.py 5.23, Trainer.set_initial_training_values."""
    steps = math.ceil(config.num_train_epochs * steps_per_epoch(config, rows, processes))
    return config.max_steps if config.max_steps > 0 else steps


def steps_per_epoch(config: Any, rows: int, processes: int) -> int:
    """Optimizer steps in which every row is seen once.

    Trainers that generate take whole batches of prompts, and leave out what is left over (TRL 1.16, RepeatSampler).
    """
    if prompts := count_prompts(config, processes):
        batches = rows // prompts * getattr(config, "steps_per_generation", config.gradient_accumulation_steps)
        batches *= getattr(config, "num_iterations", 1)
        return max(math.ceil(batches / config.gradient_accumulation_steps), 1)
    round_ = math.floor if config.dataloader_drop_last else math.ceil
    batches = round_(rows / (config.per_device_train_batch_size * processes))
    return max(math.ceil(batches / config.gradient_accumulation_steps), 1)


def count_prompts(config: Any, processes: int) -> int:
    """Prompts that are answered at a time by all processes together, where the trainer generates; else 0."""
    if not hasattr(config, "max_completion_length"):
        return 0
    answers = getattr(config, "generation_batch_size", None)
    if answers is None:
        answers = config.per_device_train_batch_size * processes * config.gradient_accumulation_steps
    return int(answers // getattr(config, "num_generations", 1))
