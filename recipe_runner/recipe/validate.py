"""Checks a recipe's values against the schema and turns what jsonschema finds into problems that name the fix."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from recipe_runner.methods import METHODS, REFUSED
from recipe_runner.problems.problem import KeyPath, Mark, Problem, at_most, join_path
from recipe_runner.problems.words import ask, nearest
from recipe_runner.recipe import schema
from recipe_runner.recipe.document import parse_scalar

_SHAPES: dict[str | int, str] = {  # what people mean by a plain value
    "model": "{name_or_path: ...}",
    "train": "{source: ...}",
    "eval": "{fraction: 0.02} or {source: ...}",
    "peft": "{method: lora}",
}

MOST_ERRORS = 1000  # of one recipe: nobody reads more, and each takes time

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
_LONG = 300
_ESCAPES = ("\\t", "\\n")  # which YAML reads in double quotes only
_BOUNDS = {"minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}


def check_values(values: dict[str, Any], place: Place) -> list[Problem]:
    """Checks the plain values of a recipe against its schema; `place` gives the mark of a key path."""
    kinds = schema.kinds_of(values)
    stage = kinds.get("training") if kinds.get("training") in schema.choices("stage") else ""
    method = kinds.get("peft", schema.choices("peft", "method")[0])  # what a method that is left out may be
    method = method if method in METHODS else ""
    if schema.quick_validator(stage, method).is_valid(values):
        return []
    errors = list(itertools.islice(schema.validator(stage, method).iter_errors(values), MOST_ERRORS))
    refused = {tuple(error.absolute_path) for error in errors if error.validator == "not"}
    found: list[Problem] = []
    for error in errors:
        found += at_most(_problems(error, tuple(error.absolute_path), place, kinds))
    return [problem for problem in found if problem.code != "unknown-key" or problem.path not in refused]


def check_study(values: dict[str, Any], place: Place) -> list[Problem]:
    """Checks the plain values of a study against its schema."""
    errors = itertools.islice(schema.study_validator().iter_errors(values), MOST_ERRORS)
    return [problem for error in errors for problem in _problems(error, tuple(error.absolute_path), place, {})]


def _problems(error: Any, path: KeyPath, place: Place, kinds: Mapping[str, str]) -> Iterator[Problem]:
    value, found = error.instance, _show(error.instance)

    def problem(
        code: str, message: str, suggestion: str = "", key: bool = False, at: KeyPath = path, meant: Any = None
    ) -> Problem:
        return Problem(code, message, place(at, key), at, suggestion, meant=meant)

    match error.validator:
        case "additionalProperties":
            entries = error.schema.get("properties", {})
            whole = len(path) == 1 and path[0] in schema.SECTIONS
            keys = schema.section_keys(str(path[0]), kinds.get(str(path[0]), "")) if whole else entries
            valid = [key for key in keys if entries[key].get("not") != {}]
            for key in value:
                if key not in entries:
                    hint, meant = suggest_key(key, valid, path, kinds)
                    yield problem("unknown-key", "unknown key", hint, key=True, at=(*path, key), meant=meant)
        case "not" if "const" in error.validator_value:
            yield problem("out-of-bounds", f"{found} is not allowed", "leave the key out or set another value")
        case "not":
            new = error.schema.get("x-replaced-by", "")
            moved = "." in new or new in schema.SECTIONS
            code = "removed-key" if not new else "misplaced-key" if moved else "renamed-key"
            code = error.schema.get("x-code", code)
            meant = new if code == "renamed-key" and "x-other-values" not in error.schema else None
            yield problem(code, error.schema["description"], f"use '{new}'" if new else "", key=True, meant=meant)
        case "required":
            for key in error.validator_value:
                if key not in value and f"'{key}'" in error.message:
                    example = f"add '{key}:'" if path else _example(key)
                    example = _example(key) if path == ("peft",) else example
                    yield problem("missing-key", f"the key '{key}' is missing", example, key=True)
        case "type":
            types = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
            expected = " or ".join(_TYPES[kind] for kind in types)
            hint, meant = _retype(value, types, path)
            yield problem("wrong-type", f"expected {expected}, found {found}", hint, meant=meant)
        case "enum" | "const":
            yield from _choice_problems(error, path, kinds, problem)
        case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum":
            yield problem(
                "out-of-bounds",
                f"expected a number {_BOUNDS[error.validator]} {error.validator_value:g}, found {found}",
            )
        case "minItems" | "minLength" | "minProperties":
            yield problem("empty-value", "the value is empty", "fill it in or leave the key out")
        case "maxItems":
            yield problem("out-of-bounds", f"{len(value)} items, at most {error.validator_value} are allowed")
        case "maxLength":
            most = error.validator_value
            hint = f'write "{value}" in double quotes: elsewhere it is two characters' if value in _ESCAPES else ""
            yield problem("out-of-bounds", f"longer than {most} character{'s' * (most != 1)}", hint)
        case "pattern":
            forms = f"expected {error.validator_value.strip('^$()').replace('|', ', ')}"
            described = error.schema.get("description", forms)
            hint = described if len(described) < _LONG else forms  # upstream's may be pages long
            yield problem("wrong-form", f"{found} has the wrong form", hint)
        case _:
            yield problem("invalid-value", error.message)


def _choice_problems(
    error: Any, path: KeyPath, kinds: Mapping[str, str], problem: Callable[..., Problem]
) -> Iterator[Problem]:
    """A value that is not one of the choices: renamed, ruled out by another key, or unknown."""
    value, found = error.instance, _show(error.instance)
    choices = error.validator_value if error.validator == "enum" else [error.validator_value]
    listed = ", ".join(_show(choice) for choice in choices)
    if len(choices) > 12:
        listed = f"its {len(choices)} choices (`recipe-run explain {join_path(path)}` lists them)"
    message = f"{found} is not one of {listed}"
    section = str(path[0]) if path else ""
    bounds = schema.bounds_of("training", kinds.get("training", "")).get(str(path[-1]) if path else "", {})
    if path == ("peft", "method") and isinstance(value, str) and value in REFUSED:
        yield problem("method-refused", f"'{value}' can't be trained here: {REFUSED[value]}")
    elif "x-code" in error.schema:  # another key rules this choice out
        if value in schema.section_keys(section, kinds.get(section, ""))[str(path[1])].get("enum", [value]):
            meant = error.schema.get("default")
            yield problem(error.schema["x-code"], message, error.schema["description"], meant=meant)
    elif isinstance(value, str) and value in (renamed := bounds.get("x-renamed-choices", {})):
        new, since = renamed[value]
        yield problem("renamed-choice", f"'{value}': {since}", f"use '{new}'", meant=new)
    elif isinstance(value, str) and value in (removed := error.schema.get("x-removed-choices", {})):
        found, _, fix = removed[value].partition("; ")
        yield problem("removed-choice", f"'{value}': {found}", fix)
    else:
        near = nearest(str(value), [choice for choice in choices if isinstance(choice, str)])
        yield problem("unknown-choice", message, ask(near), meant=near[0] if len(near) == 1 else None)


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


def suggest_key(key: str, valid: list[str], path: KeyPath, kinds: Mapping[str, str]) -> tuple[str, str | None]:
    """What to write instead: the nearest valid key at this place (which is also returned), or where the key belongs."""
    if "." in key:
        return f"write it nested: {key.replace('.', ': {', 1)}: ...}}", None
    others = [section for section in schema.SECTIONS if path[:1] != (section,)]
    homes = [section for section in others if key in schema.section_keys(section, kinds.get(section, ""))]
    if path == ("dataset",) and key in schema.resolve("#/$defs/source")["properties"]:
        homes = ["dataset.train"]
    if path == ("peft",) and (methods := [name for name in METHODS if key in schema.section_keys("peft", name)]):
        few = f"{', '.join(methods[:3])}{', ...' * (len(methods) > 3)}"
        names = ", ".join(name for name in valid if name != "method")
        own = f"; {kinds['peft']} has: {names}" if "peft" in kinds else ""
        return f"it is a key of {few}{own}", None
    near = [_FAMILIAR[key]] if _FAMILIAR.get(key) in valid else nearest(key, valid)
    if near:
        return ask(near), near[0] if len(near) == 1 else None
    if homes:
        return f"it belongs to '{homes[0]}'", None
    return f"valid keys: {', '.join(valid)}" if len(valid) <= 12 else "", None


def _show(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {'mapping' if isinstance(value, dict) else 'list'}"
    text = {None: "null", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else None
    text = text or (f"'{value}'" if isinstance(value, str) else str(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _retype(value: Any, kinds: list[str], path: KeyPath) -> tuple[str, Any]:
    """What to write instead of a value of the wrong type, and that value."""
    if "object" in kinds and (example := _SHAPES.get(path[-1] if path else "")):
        return f"write {example}", None
    if isinstance(value, str) and "boolean" in kinds and value.lower() in ("yes", "on", "no", "off"):
        meant = value.lower() in ("yes", "on")
        return f"write {'true' if meant else 'false'} (YAML 1.2)", meant
    if isinstance(value, str) and {"number", "integer", "boolean"} & set(kinds):
        number = parse_scalar(value.strip())
        kind = {bool: "boolean", int: "integer", float: "number"}.get(type(number), "")
        if kind in kinds or (kind == "integer" and "number" in kinds):
            return f"write {value.strip()} without quotes", number
        return ("write a number" if "boolean" not in kinds else ""), None
    if isinstance(value, float) and value.is_integer() and "integer" in kinds:
        return f"write {int(value)}", int(value)
    if "array" in kinds and isinstance(value, str):
        return f"write [{value}]", [value]
    return "", None


def _example(key: str) -> str:
    examples = {
        "schema_version": "add 'schema_version: 1'",
        "name": "add 'name:' with the file's name, without suffix",
        "stage": f"add 'stage: {_list(schema.choices('stage'))}",
        "method": f"add 'method: {schema.choices('peft', 'method')[0]}'",
        "format": f"add 'format: {_list(schema.choices('dataset', 'format'))}",
    }
    return examples.get(key, f"add '{key}:'")


def _list(choices: list[str]) -> str:
    """Choices as words: `a', 'b' or 'c'`."""
    first, *between, last = choices
    return f"{first}', " + "".join(f"'{choice}', " for choice in between)[:-2] + f" or '{last}'"
