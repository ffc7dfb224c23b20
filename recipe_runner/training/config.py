"""The trainer's configuration: the recipe's `training` section, and what other sections own."""

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.integrations import get_available_reporting_integrations

from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.recipe.sections import ModelSection
from recipe_runner.stages import Stage, load_class
from recipe_runner.training.environment import Precision


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
    section = {key: value for key, value in training.items() if key != "chat_template_path"}  # is the tokenizer's
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
    try:
        config = cls(**{**section, **owned})
    except (ValueError, ImportError, TypeError) as error:
        raise user_error("training-refused", first_line(error), path=("training",)) from error
    trackers = get_available_reporting_integrations()
    for tracker in set(config.report_to) - set(trackers):
        known = f"installed trackers: {', '.join(sorted(trackers)) or 'none'}"
        raise user_error("tracker-missing", f"'{tracker}' is not installed", known, path=("training", "report_to"))
    return config
