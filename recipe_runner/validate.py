"""Checks a recipe's values against the schema and turns what jsonschema finds into problems that name the fix."""

import difflib
from collections.abc import Callable, Iterator
from typing import Any

from recipe_runner import schema
from recipe_runner.problem import KeyPath, Mark, Problem, join_path

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
    problems = []
    for error in errors:
        for problem, path in _problems(error, tuple(error.absolute_path), place):
            if problem.code != "unknown-key" or path not in refused:
                problems.append(problem)
    return problems


def _problems(error: Any, path: KeyPath, place: Place) -> Iterator[tuple[Problem, KeyPath]]:
    value, found = error.instance, _show(error.instance)

    def problem(
        code: str, message: str, suggestion: str = "", key: bool = False, at: KeyPath = path
    ) -> tuple[Problem, KeyPath]:
        return Problem(code, message, place(at, key), join_path(at), suggestion), at

    match error.validator:
        case "additionalProperties":
            valid = [
                key
                for key, entry in error.schema.get("properties", {}).items()
                if entry != {"not": {}} and "not" not in entry
            ]
            for key in value:
                if key not in error.schema.get("properties", {}):
                    yield problem(
                        "unknown-key", "unknown key", suggest_key(key, valid, path), key=True, at=(*path, key)
                    )
        case "not" if "const" in error.validator_value:
            yield problem("out-of-bounds", f"{found} is not allowed", "leave the key out or set another value")
        case "not":
            new = error.schema.get("x-replaced-by", "")
            code = (
                "removed-key" if not new else "misplaced-key" if "." in new or new in schema.SECTIONS else "renamed-key"
            )
            yield problem(code, error.schema["description"], f"use '{new}'" if new else "", key=True)
        case "required":
            for key in error.validator_value:
                if key not in value and f"'{key}'" in error.message:
                    yield problem("missing-key", f"the key '{key}' is missing", _example(key), key=True)
        case "type":
            kinds = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
            expected = " or ".join(_TYPES[kind] for kind in kinds)
            yield problem("wrong-type", f"expected {expected}, found {found}", _retype(value, kinds))
        case "enum" | "const":
            choices = error.validator_value if error.validator == "enum" else [error.validator_value]
            near = suggest(str(value), [str(choice) for choice in choices])
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


def suggest(word: str, choices: list[str]) -> str:
    """`did you mean 'x'?` for the nearest choice, or nothing."""
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else ""


def suggest_key(key: str, valid: list[str], path: KeyPath) -> str:
    """The nearest valid key at this place, or the section that the key belongs to."""
    homes = [section for section in schema.SECTIONS if path[:1] != (section,) and key in schema.section_keys(section)]
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


def _retype(value: Any, kinds: list[str]) -> str:
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
