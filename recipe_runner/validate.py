"""Checks a recipe's values against the schema and turns what jsonschema finds into problems that name the fix."""

import difflib
from collections.abc import Callable, Iterator
from typing import Any

from recipe_runner import schema
from recipe_runner.problem import KeyPath, Mark, Problem

_SHAPES: dict[str | int, str] = {  # what people mean by a plain value
    "model": "{name_or_path: ...}",
    "train": "{source: ...}",
    "eval": "{fraction: 0.02} or {source: ...}",
    "peft": "{method: lora}",
}

Place = Callable[[KeyPath, bool], Mark]  # (path, of the key rather than the value) -> mark

_TYPES = {
    "object": "a mapping",
    "array": "a list",
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}
_BOUNDS = {"minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}


def check_values(values: dict[str, Any], place: Place) -> list[Problem]:
    """Checks values against the recipe schema.

    Args:
        values: The recipe, as plain values.
        place: Gives the mark of a key path.
    """
    errors = list(schema.validator().iter_errors(values))
    refused = {tuple(error.absolute_path) for error in errors if error.validator == "not"}
    found = [problem for error in errors for problem in _problems(error, tuple(error.absolute_path), place)]
    return [problem for problem in found if problem.code != "unknown-key" or problem.path not in refused]


def _problems(error: Any, path: KeyPath, place: Place) -> Iterator[Problem]:
    value, found = error.instance, _show(error.instance)

    def problem(code: str, message: str, suggestion: str = "", key: bool = False, at: KeyPath = path) -> Problem:
        return Problem(code, message, place(at, key), at, suggestion)

    match error.validator:
        case "additionalProperties":
            entries = error.schema.get("properties", {})
            keys = schema.section_keys(str(path[0])) if len(path) == 1 and path[0] in schema.SECTIONS else entries
            valid = [key for key in keys if entries[key].get("not") != {}]
            for key in value:
                if key not in entries:
                    hint = suggest_key(key, valid, path)
                    yield problem("unknown-key", "unknown key", hint, key=True, at=(*path, key))
        case "not" if "const" in error.validator_value:
            yield problem("out-of-bounds", f"{found} is not allowed", "leave the key out or set another value")
        case "not":
            new = error.schema.get("x-replaced-by", "")
            moved = "." in new or new in schema.SECTIONS
            code = "removed-key" if not new else "misplaced-key" if moved else "renamed-key"
            yield problem(code, error.schema["description"], f"use '{new}'" if new else "", key=True)
        case "required":
            for key in error.validator_value:
                if key not in value and f"'{key}'" in error.message:
                    yield problem("missing-key", f"the key '{key}' is missing", _example(key), key=True)
        case "type":
            kinds = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
            expected = " or ".join(_TYPES[kind] for kind in kinds)
            yield problem("wrong-type", f"expected {expected}, found {found}", _retype(value, kinds, path))
        case "enum" | "const":
            choices = error.validator_value if error.validator == "enum" else [error.validator_value]
            near = _nearest_choice(value, choices, path)
            listed = ", ".join(_show(choice) for choice in choices)
            yield problem("unknown-choice", f"{found} is not one of {listed}", near)
        case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum":
            yield problem(
                "out-of-bounds",
                f"expected a number {_BOUNDS[error.validator]} {error.validator_value:g}, found {found}",
            )
        case "minItems" | "minLength" | "minProperties":
            yield problem("empty-value", "the value is empty", "fill it in or leave the key out")
        case "maxLength":
            yield problem("out-of-bounds", f"longer than {error.validator_value} characters")
        case "pattern":
            yield problem(
                "wrong-form",
                f"{found} has the wrong form",
                error.schema.get("description", f"expected {error.validator_value}"),
            )
        case _:
            yield problem("invalid-value", error.message)


def _nearest_choice(value: Any, choices: list[Any], path: KeyPath) -> str:
    """The choice that upstream renamed this one to, or the nearest."""
    entry = schema.resolve(schema.BOUNDS["training"])["properties"].get(path[-1], {})
    if isinstance(value, str) and (new := entry.get("x-renamed-choices", {}).get(value)):
        return f"renamed to '{new}'"
    return suggest(str(value), [str(choice) for choice in choices])


def suggest(word: str, choices: list[str]) -> str:
    """`did you mean 'x'?` for the nearest choice, or nothing."""
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else ""


# Names of other tools, too far from ours for a spelling check.
_FAMILIAR = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "rank": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
}


def suggest_key(key: str, valid: list[str], path: KeyPath) -> str:
    """The nearest valid key at this place, or the section that the key belongs to."""
    if "." in key:
        return f"write it nested: {key.replace('.', ': {', 1)}: ...}}"
    homes = [section for section in schema.SECTIONS if path[:1] != (section,) and key in schema.section_keys(section)]
    if path == ("dataset",) and key in schema.resolve("#/$defs/source")["properties"]:
        homes = ["dataset.train"]
    if key in _FAMILIAR and _FAMILIAR[key] in valid:
        return f"did you mean '{_FAMILIAR[key]}'?"
    if near := suggest(key, valid):
        return near
    if homes:
        return f"it belongs to '{homes[0]}'"
    return f"valid keys: {', '.join(valid)}" if len(valid) <= 12 else ""


def _show(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {'mapping' if isinstance(value, dict) else 'list'}"
    text = {None: "null", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else None
    text = text or (f"'{value}'" if isinstance(value, str) else str(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _retype(value: Any, kinds: list[str], path: KeyPath) -> str:
    if "object" in kinds and (example := _SHAPES.get(path[-1] if path else "")):
        return f"write {example}"
    if isinstance(value, str) and "boolean" in kinds and value.lower() in ("yes", "on", "no", "off"):
        return f"write {'true' if value.lower() in ('yes', 'on') else 'false'} (YAML 1.2)"
    if isinstance(value, str) and {"number", "integer"} & set(kinds):
        return "write the number without quotes"
    if isinstance(value, float) and value.is_integer() and "integer" in kinds:
        return f"write {int(value)}"
    if "array" in kinds and isinstance(value, str):
        return f"write [{value}]"
    return ""


def _example(key: str) -> str:
    return {
        "schema_version": "add 'schema_version: 1'",
        "name": "add 'name:' with the file's name, without suffix",
        "stage": "add 'stage: sft'",
        "method": "add 'method: lora'",
        "format": "add 'format: instruction', 'chat' or 'text'",
    }.get(key, f"add '{key}:'")
