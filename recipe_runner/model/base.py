"""The base model before its weights: its configuration, and its modules on the meta device."""

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.recipe.sections import ModelSection

PLACE = ("model", "name_or_path")


def load_model_config(model: ModelSection) -> PretrainedConfig:
    """Loads the configuration of the base model.

    Raises:
        UserError: It can't be read, or the architecture is unknown.
    """
    try:
        return AutoConfig.from_pretrained(model.name_or_path, **model.location)
    except (OSError, ValueError, KeyError) as error:
        raise user_error("model-config", first_line(error), path=PLACE) from error


def build_empty(model_config: PretrainedConfig, trust_remote_code: bool = False) -> Any:
    """The base model without weights, on the meta device.

    Raises:
        UserError: transformers can't build it.
    """
    architecture = getattr(transformers, (model_config.architectures or [""])[0], None)
    try:
        with torch.device("meta"):
            if architecture:
                return architecture(model_config)  # not _from_config, which with ZeRO-3 wants to fill the weights
            return AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise user_error("model-config", first_line(error), path=PLACE) from error
