"""Names in a recipe that must match modules or parameters of the model: targets, patterns, layers."""

import re
from typing import Any

from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.problems.limits import TooSlow, time_limit
from recipe_runner.problems.problem import KeyPath
from recipe_runner.problems.words import suggest

PATTERN_SECONDS = 5  # of a regular expression on all names of a model: usual ones take some milliseconds
PATTERNS = ("rank_pattern", "alpha_pattern", "block_size_pattern", "lambda_pattern", "n_frequency_pattern")


def check_named(peft_config: Any, modules: list[str], usual: list[str]) -> None:
    """Names of modules that exist, whatever the other fields say."""
    for key in ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules"):
        names = getattr(peft_config, key, None) or []
        if names == "all-linear":
            continue
        for name in [names] if isinstance(names, str) else sorted(names):
            if not (
                match_names(name, modules, ("peft", key))
                if isinstance(names, str)
                else any(is_called(module, name) for module in modules)
            ):
                raise _no_match(key, name, usual)
    there = sorted({int(part) for module in modules for part in module.split(".") if part.isdigit()})
    layers = getattr(peft_config, "layers_to_transform", None)
    for layer in [layers] if isinstance(layers, int) else layers or []:
        if layer not in there:
            message = f"there is no layer {layer}; the model has layers {there[0]} to {there[-1]}"
            raise user_error("target-not-found", message, path=("peft", "layers_to_transform"))
    for first, last in getattr(peft_config, "layer_replication", None) or []:
        if not there[0] <= first < last <= there[-1] + 1:
            message = (
                f"there are no layers {first} to {last} (excluded); the model has layers {there[0]} to {there[-1]}"
            )
            raise user_error("target-not-found", message, path=("peft", "layer_replication"))
    lists = sorted({part[1] for module in modules if (part := re.search(r"(\w+)\.\d+(\.|$)", module))})
    layer_lists = getattr(peft_config, "layers_pattern", None) or []
    for pattern in [layer_lists] if isinstance(layer_lists, str) else layer_lists:
        if pattern.rpartition(".")[2] not in lists:
            raise _no_match("layers_pattern", pattern, lists, "of the model")
    for key in PATTERNS:
        for pattern in getattr(peft_config, key, None) or {}:
            match_names(rf"(.*\.)?({pattern})", modules, ("peft", key))  # is it one, and does it end?


def is_called(full: str, name: str) -> bool:
    """Whether a name is that of a module or parameter, or its end."""
    return full == name or full.endswith(f".{name}")


def check_adapted(peft_config: Any, adapted: list[str], parameters: list[str], usual: list[str]) -> None:
    """Names in fields that work together: each must match something that all of them leave."""
    names = sorted({module.split(".")[-1] for module in adapted})
    targets = getattr(peft_config, "target_modules", None) or []
    for name in [] if isinstance(targets, str) else sorted(targets):
        if not any(is_called(module, name) for module in adapted):
            raise _no_match(
                "target_modules", name, usual, "that exclude_modules, layers_to_transform and modules_to_save leave"
            )
    for key in PATTERNS:
        values: dict[str, tuple[str, float]] = {}  # module -> the pattern that matches it, and its value
        for pattern, value in (getattr(peft_config, key, None) or {}).items():
            matched = match_names(rf"(.*\.)?({pattern})", adapted, ("peft", key))
            if not matched:
                raise _no_match(key, pattern, names, "that is adapted")
            for module in matched:
                other, before = values.setdefault(module, (pattern, value))
                if before != value:  # PEFT 0.21 takes the first, and sorts them when it saves the adapter
                    message = f"'{other}' and '{pattern}' both match {module}, with {before} and {value}"
                    raise user_error("wrong-form", message, "let one of them match it", path=("peft", key))
    for name in getattr(peft_config, "target_parameters", None) or []:
        if not any(is_called(parameter, name) for parameter in parameters):
            ends = sorted({".".join(parameter.split(".")[-2:]) for parameter in parameters})
            raise _no_match("target_parameters", name, ends, "of the model")


def match_names(pattern: str, names: list[str], path: KeyPath, whole: bool = True) -> list[str]:
    """The names that a regular expression matches: as a whole, as PEFT takes it, or anywhere in them.

    Raises:
        UserError: It is not a regular expression, or one that does not end.
    """
    match = re.fullmatch if whole else re.search
    try:
        with time_limit(PATTERN_SECONDS):
            return [name for name in names if match(pattern, name)]
    except (re.error, TooSlow, RecursionError, OverflowError) as error:
        what = "can't be used" if isinstance(error, TooSlow) else "is not a regular expression"
        message = f"'{pattern}' {what}: {first_line(error)}"
        raise user_error("wrong-form", message, "fix it", path=path) from error


def _no_match(key: str, name: str, choices: list[str], which: str = "") -> UserError:
    kind = "parameter" if key == "target_parameters" else "module"
    there = (
        "there are" if which else "its norms" if any("norm" in choice for choice in choices) else "its linear modules"
    )
    message = f"'{name}' matches no {kind} {which or 'of the model'}; {there}: {', '.join(choices)}"
    fix = "remove it from one of them" if which and name in choices else suggest(name, choices)
    return user_error("target-not-found", message, fix, path=("peft", key))
