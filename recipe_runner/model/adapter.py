"""A new adapter: its PEFT configuration, and whether its targets are modules of the model."""

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.problems.words import suggest

CONFIGS: dict[str, type[PeftConfig]] = {"lora": LoraConfig}  # method -> its class


def build_peft(section: Mapping[str, Any], task: str) -> PeftConfig | None:
    """The PEFT configuration that `peft` says, with PEFT's task type; None for full fine-tuning.

    Raises:
        UserError: PEFT refuses the combination of fields.
    """
    if not section:
        return None
    fields = {key: value for key, value in section.items() if key != "method"}
    cls = CONFIGS[section["method"]]
    hints: dict[str, Any] = typing.get_type_hints(cls)
    for key, value in fields.items():
        nested: Any = next(
            (hint for hint in (hints[key], *typing.get_args(hints[key])) if dataclasses.is_dataclass(hint)), None
        )
        if nested and isinstance(value, dict):
            fields[key] = nested(**value)
    try:
        return cls(task_type=task, **fields)
    except (ValueError, TypeError, ImportError) as error:
        raise user_error("peft-refused", first_line(error), path=("peft",)) from error


def check_targets(peft_config: Any, empty: torch.nn.Module, model_type: str) -> None:
    """Checks on a model without weights that every target matches a module.

    PEFT errs only if no target at all matches: a Llama-style list silently adapts a part of Phi-3, which fuses its own.

    Args:
        peft_config: The adapter.
        empty: The base model on the meta device.
        model_type: transformers' name of the architecture.

    Raises:
        UserError: A target, or a module to save, matches nothing.
    """
    modules = dict(empty.named_modules())
    linear = sorted({name.split(".")[-1] for name, module in modules.items() if isinstance(module, torch.nn.Linear)})
    targets = peft_config.target_modules
    if targets is None and model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        message = f"PEFT has no default targets for {model_type}"
        fix = "add 'target_modules: all-linear'"
        raise user_error("target-not-found", message, fix, path=("peft", "target_modules"))
    wanted = [targets] if isinstance(targets, str) else [[name] for name in targets or ()]
    for target in wanted:
        if target == "all-linear":
            continue
        alone = LoraConfig(target_modules=target, exclude_modules=peft_config.exclude_modules)
        matches = [check_target_module_exists(alone, module) for module in modules]
        if not any(match is True or isinstance(match, re.Match) for match in matches):
            raise _no_match("target_modules", target if isinstance(target, str) else target[0], linear)
    for name in peft_config.modules_to_save or []:
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            raise _no_match("modules_to_save", name, linear)


def _no_match(key: str, name: str, linear: list[str]) -> UserError:
    message = f"'{name}' matches no module of the model; its linear modules: {', '.join(linear)}"
    return user_error("target-not-found", message, suggest(name, linear), path=("peft", key))
