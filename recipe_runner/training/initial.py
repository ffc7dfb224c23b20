"""Adapters that take a part out of the base's weights when they are made (PiSSA, OLoRA), as they were then."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from recipe_runner.problems.errors import user_error
from recipe_runner.recipe.rules.adapter import WEIGHTS

NAME = "initial_adapter"  # in the run folder: PEFT names an adapter by its folder


def keep_initial(trainer: Any, folder: Path, resumed: bool) -> Path:
    """Saves the adapter as it was made; when a run is resumed, checks that it was made the same way again.

    Raises:
        UserError: A resumed run would go on from other weights.
    """
    initial, model = folder / NAME, trainer.accelerator.unwrap_model(trainer.model)
    if not resumed and trainer.is_world_process_zero():
        model.save_pretrained(str(initial))
    elif resumed:
        before = load_file(initial / WEIGHTS)
        now = get_peft_model_state_dict(model)
        if any(name not in before or not torch.equal(tensor.cpu(), before[name]) for name, tensor in now.items()):
            message = f"the adapter's initialisation is not the one that the run in {folder} began with"
            fix = "resume it on the machine and with the versions that it began with, or start a new run"
            raise user_error("initialisation-differs", message, fix, path=("peft", "init_lora_weights"))
    return initial


def save_converted(trained: PeftModel, result: Path, initial: Path) -> None:
    """Saves an adapter for the plain base: PEFT's conversion subtracts the initial adapter from the trained one."""
    with warnings.catch_warnings():  # PEFT warns of the second adapter that its own conversion loads
        warnings.filterwarnings("ignore", message=r"\w+ changes the base weights of the model")
        trained.save_pretrained(str(result), path_initial_model_for_weight_conversion=str(initial))
