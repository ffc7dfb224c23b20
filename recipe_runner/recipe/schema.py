"""The recipe schema, and what can be asked of it: a validator, defaults, valid keys."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.validators import extend

from recipe_runner.recipe.library import shelf

ROOT, STUDY = "recipe.schema.json", "study.schema.json"
SECTIONS = ("model", "quantization", "peft", "dataset", "training", "run")


_CONDITIONS: dict[int, Any] = {}  # validators of the conditions of loaded schemas, which stay loaded


@cache
def load(name: str = ROOT) -> dict[str, Any]:
    """Reads one schema file."""
    schema: dict[str, Any] = json.loads((shelf() / "schema" / name).read_text(encoding="utf-8"))
    schema.pop("$schema")  # jsonschema would go back to its own validator class here, and its idea of an integer
    return schema


def resolve(reference: str) -> dict[str, Any]:
    """The schema that a `$ref` of the recipe schema stands for."""
    if reference.startswith("#/$defs/"):
        found: dict[str, Any] = load()["$defs"][reference.removeprefix("#/$defs/")]
        return found
    return load(reference)


@cache
def validator(stage: str = "", method: str = "") -> Any:
    """A validator for whole recipes of a stage and a `peft.method`. An integer is written as one: 4.0 is refused.

    References are followed and conditions on the two decided once, and not for every recipe. Without a stage, it is for
    any; without a method, for none: only the schema of the method that is used is read.
    """
    return _strict()(_unfold(load(), _known(stage, method)))


@cache
def study_validator() -> Any:
    """A validator for studies."""
    return _strict()(load(STUDY))


def study_defaults(section: str = "") -> dict[str, Any]:
    """Defaults of a study's keys, or of those of a section of it."""
    properties = load(STUDY)["properties"]
    properties = properties[section]["properties"] if section else properties
    return {key: entry["default"] for key, entry in properties.items() if "default" in entry}


@cache
def quick_validator(stage: str = "", method: str = "") -> Any:
    """Says what `validator` says of whether a recipe is valid, in a third of the time, and nothing of what is wrong.

    What is put together from several parts (`allOf`) is one part here, without what only describes.
    """
    return _strict()(_flatten(load(), _known(stage, method)))


def _known(stage: str, method: str) -> dict[str, str]:
    """What conditions are decided by. Without a stage, those on it stay open; without a method, there is none."""
    return {"method": method} | ({"stage": stage} if stage else {})


@cache
def _strict() -> Any:
    strict_integers = Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    )
    return extend(Draft202012Validator, type_checker=strict_integers)  # type: ignore[no-untyped-call]


_MAPS = ("properties", "patternProperties", "dependentSchemas")  # of schemas
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SCHEMAS = ("additionalProperties", "propertyNames", "items", "contains", "not", "if", "then", "else")
_ASSERTED = {*Draft202012Validator.VALIDATORS, "then", "else"}
_ALONE = ("properties", "required")  # keywords that say the same whatever stands beside them, and can be joined


def _flatten(schema: Any, known: Mapping[str, str]) -> Any:
    """As `_unfold`, but as far as validity goes only, and with as few parts as possible."""
    if not isinstance(schema, dict):
        return schema
    own, together = _decide(schema, known)
    flat = {key: value for key, value in own.items() if key in _ASSERTED}
    if "if" not in flat or not flat.keys() & {"then", "else"}:  # each says nothing without the other
        flat = {key: value for key, value in flat.items() if key not in ("if", "then", "else")}
    for key in flat:
        if key in _MAPS:
            flat[key] = {name: _flatten(entry, known) for name, entry in flat[key].items()}
        elif key in _LISTS:
            flat[key] = [_flatten(part, known) for part in flat[key]]
        elif key in _SCHEMAS:
            flat[key] = _flatten(flat[key], known)
    apart = []
    for part in (_flatten(part, known) for part in together if part != {}):
        if not isinstance(part, dict) or not _join(flat, part):
            apart.append(part)
    return flat | ({"allOf": apart} if apart else {})


def _join(flat: dict[str, Any], part: dict[str, Any]) -> bool:
    """Adds one flat schema to another where that leaves what both say as it is; returns whether it did.

    `additionalProperties` is about the properties beside it: on either side, the other may bring no more.
    """
    for one, other in ((flat, part), (part, flat)):
        if "additionalProperties" in one and (
            not other.get("properties", {}).keys() <= one.get("properties", {}).keys() or "patternProperties" in other
        ):
            return False
    conditions = flat.keys() & part.keys() & {"if", "then", "else"}
    differing = {key for key in flat.keys() & part.keys() - {*_ALONE} if flat[key] != part[key]}
    lists = {"items", "prefixItems", "contains", "minContains", "maxContains"}
    unevaluated = {"unevaluatedProperties", "unevaluatedItems"} & {*flat, *part}
    if conditions or differing or unevaluated or (flat.keys() & lists and part.keys() & lists):
        return False
    own = flat.get("properties", {})
    required = list(dict.fromkeys([*flat.get("required", []), *part.get("required", [])]))
    flat |= {key: value for key, value in part.items() if key not in _ALONE}
    if entries := part.get("properties", {}):
        flat["properties"] = own | {
            name: _flatten({"allOf": [own[name], entry]}, {}) if name in own else entry
            for name, entry in entries.items()
        }
    if required:
        flat["required"] = required
    return True


def _unfold(part: Any, known: Mapping[str, str]) -> Any:
    """A schema with what its references stand for, and without conditions on values that are known."""
    if isinstance(part, list):
        return [_unfold(item, known) for item in part]
    if not isinstance(part, dict):
        return part
    own, together = _decide(part, known)
    unfolded = {key: _unfold(value, known) for key, value in own.items()}
    return unfolded | ({"allOf": found} if (found := [_unfold(item, known) for item in together if item]) else {})


def _decide(part: dict[str, Any], known: Mapping[str, str]) -> tuple[dict[str, Any], list[Any]]:
    """What a schema says itself, and the other schemas that hold, too: of references, `allOf`, decided conditions."""
    own = dict(part)
    together = list(own.pop("allOf", []))
    if "$ref" in own:
        together.append(resolve(own.pop("$ref")))
    if "if" in own:
        key, wanted = _read_condition(part)
        if key in known:
            del own["if"]
            branches = {name: own.pop(name) for name in ("then", "else") if name in own}
            together.append(branches.get("then" if wanted == known[key] else "else", {}))
    return own, together


def _read_condition(part: dict[str, Any]) -> tuple[str, Any]:
    """The key and the value that a condition of the form `key: const` asks for; an empty key for any other."""
    condition: dict[str, Any] = part.get("if", {}).get("properties", {})
    key, entry = next(iter(condition.items()), ("", dict[str, Any]()))
    return (key, entry["const"]) if len(condition) == 1 and entry.keys() == {"const"} else ("", None)


def is_name(name: str) -> bool:
    """Whether the schema takes a name for a recipe."""
    entry = load()["properties"]["name"]
    return len(name) <= entry["maxLength"] and re.search(entry["pattern"], name) is not None


def choices(section: str, key: str = "") -> list[str]:
    """The choices of a key of the recipe's own: stages, formats, methods."""
    entry = resolve(f"#/$defs/{section}")["properties"][key] if key else load()["properties"][section]
    return list(entry["enum"])


def formats_of(stage: str) -> list[str]:
    """The dataset formats that a stage takes."""
    for part in load()["allOf"]:
        if part["if"]["properties"]["stage"].get("const") == stage:
            return list(part["then"]["properties"]["dataset"]["properties"]["format"]["enum"])
    return []


def is_of_pipeline(key: str) -> bool:
    """Whether a pipeline says a key (`run.output_dir`) itself; any other is said by its stages."""
    section, _, rest = key.partition(".")
    stages = load()["allOf"][0]["then"]["properties"].get(section, {})
    said_by_stages = "$ref" in stages or rest in stages.get("properties", {})
    return section in load()["properties"] and not said_by_stages


def _own(section: str, kind: str) -> dict[str, Any]:
    """Our schema of a section. One on top of an upstream class refers to that class's."""
    name = section
    if section == "peft":
        name = kind if kind in choices("peft", "method") else choices("peft", "method")[0]
    elif section == "training":
        name = f"{kind if f'{kind}_training' in load()['$defs'] else 'sft'}_training"
    return resolve(f"#/$defs/{name}")


def kinds_of(values: Mapping[str, Any]) -> dict[str, str]:
    """What decides which class is behind a section: the stage for `training`, the method for `peft`."""
    peft = values.get("peft")
    found = {"training": values.get("stage"), "peft": peft.get("method") if isinstance(peft, dict) else None}
    return {section: kind for section, kind in found.items() if isinstance(kind, str)}


def fields_of(section: str, kind: str = "") -> dict[str, Any]:
    """The schema of the class behind a section: for `training` the one of a stage, for `peft` of a method."""
    own = _own(section, kind)
    return resolve(own["$ref"]) if "$ref" in own else own


def bounds_of(section: str, kind: str = "") -> dict[str, Any]:
    """Our entries on top of an upstream class's: bounds, old names, keys that are refused."""
    own = _own(section, kind)
    if "$ref" not in own:
        return {}
    shared = [part for entry in own.get("allOf", []) for part in _properties(resolve(entry["$ref"]))]
    merged: dict[str, Any] = {}
    for part in (*shared, own.get("properties", {})):
        for key, entry in part.items():
            merged[key] = {**merged.get(key, {}), **entry}
    return merged


@cache
def defaults_of(section: str, kind: str) -> dict[str, Any]:
    """What upstream's class takes for each field that is left out."""
    fields = fields_of(section, kind)["properties"].items()
    return {key: entry["default"] for key, entry in fields if "default" in entry}


def _properties(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a schema, and those that hold on its condition."""
    return [part["properties"] for part in (schema, schema.get("then", {})) if "properties" in part]


def section_keys(section: str, kind: str = "") -> dict[str, Any]:
    """The keys of a section that a recipe may set, with their schemas."""
    narrowed = bounds_of(section, kind)
    keys = fields_of(section, kind)["properties"].items()
    return {key: entry for key, entry in keys if {**entry, **narrowed.get(key, {})}.get("not") != {}}


def fill_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Fills in the defaults of the recipe's own sections. Upstream's defaults are left to upstream's classes."""
    kinds = kinds_of(values)
    return _fill(values, _defaults(kinds.get("training", ""), kinds.get("peft", "")))


def _fill(values: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    for part in _applicable(schema, values):
        for key, entry in part.get("properties", {}).items():
            if "default" in entry and key not in values:
                values[key] = json.loads(json.dumps(entry["default"]))
            if isinstance(values.get(key), dict):
                _fill(values[key], entry)
            elif isinstance(values.get(key), list):
                for item in values[key]:
                    if isinstance(item, dict):
                        _fill(item, entry)
    return values


@cache
def _defaults(stage: str, method: str) -> dict[str, Any]:
    """What of the schema brings defaults of the recipe's own, for recipes of a stage and a method."""
    return _with_defaults(load(), {key: value for key, value in (("stage", stage), ("method", method)) if value})


def _with_defaults(schema: Any, known: Mapping[str, str]) -> dict[str, Any]:
    """The parts of a schema that bring defaults; empty where none does."""
    if not isinstance(schema, dict) or "not" in schema:
        return {}
    if schema.get("$ref", "").startswith("upstream/"):
        schema = {key: value for key, value in schema.items() if key != "$ref"}
    own, together = _decide(schema, known)
    together += [own["items"]] if "items" in own else []  # `_fill` fills the items of a list
    kept = {"default": own["default"]} if "default" in own else {}
    entries = {key: _with_defaults(entry, known) for key, entry in own.get("properties", {}).items()}
    if entries := {key: entry for key, entry in entries.items() if entry}:
        kept["properties"] = entries
    if parts := [part for part in (_with_defaults(part, known) for part in together) if part]:
        kept["allOf"] = parts
    branches = {name: _with_defaults(own.get(name), known) for name in ("then", "else")}
    if "if" in own and any(branches.values()):
        kept |= {"if": own["if"], **branches}
    return kept


def _applicable(schema: dict[str, Any], values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and the parts of it that hold for these values: `if`/`then`, `allOf`."""
    yield schema
    for part in schema.get("allOf", []):
        yield from _applicable(part, values)
    if "if" in schema:
        key, wanted = _read_condition(schema)
        if key:
            holds = values[key] == wanted if key in values else "required" not in schema["if"]
        else:
            if id(schema["if"]) not in _CONDITIONS:
                _CONDITIONS[id(schema["if"])] = Draft202012Validator(schema["if"])
            holds = _CONDITIONS[id(schema["if"])].is_valid(values)
        yield from _applicable(schema.get("then" if holds else "else", {}), values)
