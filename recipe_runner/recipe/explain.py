"""The documentation of a recipe key or of an error code, from the schema and from docs/errors.md."""

import json
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from recipe_runner.methods import METHODS, REFUSED
from recipe_runner.problems.errors import user_error
from recipe_runner.problems.words import suggest
from recipe_runner.recipe import schema
from recipe_runner.recipe.library import shelf
from recipe_runner.stages import STAGES

_NAMES = {"null": "null", "object": "mapping", "array": "list"}


def explain(name: str) -> str:
    """Explains a key path (`training.packing_strategy`), a choice (`nf4`) or an error code (`unknown-key`).

    Raises:
        UserError: There is no such key, choice or code.
    """
    codes = _codes()
    if name == "method":
        return describe_methods()
    if name in codes:
        return f"{name}: {codes[name]}"
    path = re.sub(r"\.\d+(?=\.|$)", "", name)  # dataset.train.0.source is dataset.train.source
    kind, section, names = ("method", "peft", METHODS) if path.startswith("peft.") else ("stage", "training", STAGES)
    variants = [_keys({section: variant}) for variant in names]
    keys = {key: entry for variant in reversed(variants) for key, entry in variant.items()}
    if path not in keys and "." not in name and (told := _explain_choice(name, keys)):
        return told
    if path not in keys:
        hint = suggest(path, [*keys, *codes]) or f"sections: {', '.join(key for key in keys if '.' not in key)}"
        raise user_error("unknown-key", f"there is no key, no choice and no error code '{name}'", hint)
    found = {name: variant[path] for name, variant in zip(names, variants, strict=True) if path in variant}
    texts: dict[str, list[str]] = {}
    for name, entry in found.items():
        texts.setdefault(_describe(path, *entry), []).append(name)
    if len(texts) == 1 and len(found) == len(names):
        return next(iter(texts))
    return "\n".join(text.replace(path, f"{path} ({kind} {', '.join(of)})", 1) for text, of in texts.items())


def _explain_choice(name: str, keys: Mapping[str, tuple[dict[str, Any], str]]) -> str:
    """What is said of a value that keys take (`nf4`, `lora`), or do not take (`ppo`); empty for any other."""
    told = []
    if name in METHODS:
        told.append(f"{name} is a choice of peft.method\n  {METHODS[name].trains} ({METHODS[name].paper})")
    elif name in REFUSED:
        told.append(f"{name} is no choice of peft.method: {REFUSED[name]}")
    for key, (entry, origin) in keys.items():
        if why := entry.get("x-removed-choices", {}).get(name):
            told.append(f"{name} is no choice of {key}: {why}")
        elif name in entry.get("enum", []):
            told.append(f"{name} is a choice of {_describe(key, entry, origin)}")
    return "\n".join(told)


def describe_methods() -> str:
    """The methods of tuning a part of a model: figures and facts of each in a line, what it trains in the next."""
    text = (shelf() / "docs" / "methods.md").read_text(encoding="utf-8").partition("<!-- end of table -->")[0]
    rows = [[cell.strip(" `") for cell in row.split(" | ")] for row in re.findall(r"^\| (`.+) \|$", text, re.MULTILINE)]
    lines = ["method             part of 1B  merges  4-bit  extra latency"]
    for name, part, merges, quantized, latency, trains, source in rows:
        only = "tested for three steps only; " * ("three steps" in name)
        lines.append(f"{name.split()[0].strip('`'):<19}{part:<12}{merges:<8}{quantized:<7}{latency}")
        lines += textwrap.wrap(f"{only}{trains} ({source})", 79, initial_indent="    ", subsequent_indent="    ")
    lines.append("\nNot here, and why:")
    for name, reason in REFUSED.items():
        lines += textwrap.wrap(f"{name}: {reason}", 79, initial_indent="  ", subsequent_indent="    ")
    lines.append("\n`recipe-run explain peft.KEY` says what a key means in each method.")
    return "\n".join(lines)


def _describe(path: str, entry: dict[str, Any], origin: str) -> str:
    kinds = entry.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    facts = {
        "type": " or ".join(str(_NAMES.get(kind, kind)) for kind in kinds),
        "choices": ", ".join(json.dumps(choice).strip('"') for choice in entry.get("enum", [])),
        "default": json.dumps(entry["default"]) if "default" in entry else "",
        "bounds": ", ".join(
            f"{key} {entry[key]}" for key in entry if re.match(r"(exclusive)?(Min|Max|min|max)imum", key)
        ),
        "from": origin,
    }
    if "not" in entry and entry["not"] == {}:
        facts = {"instead": entry.get("x-replaced-by", "")}
    lines = [path, *textwrap.wrap(entry.get("description", ""), 100, initial_indent="  ", subsequent_indent="  ")]
    lines += [f"  {key + ':':<9}{text}" for key, text in facts.items() if text]
    if below := entry.get("properties"):
        valid = [key for key, value in below.items() if value.get("not") != {}]
        lines += textwrap.wrap(f"keys: {', '.join(valid)}", 100, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _keys(kinds: Mapping[str, str]) -> dict[str, tuple[dict[str, Any], str]]:
    """Every documented key path of a stage or a method, with its schema and the class that it comes from."""
    keys: dict[str, tuple[dict[str, Any], str]] = {}
    for name, entry in schema.load()["properties"].items():
        keys[name] = entry, ""
        if name in schema.SECTIONS:
            kind = kinds.get(name, "")
            section, bounds = schema.fields_of(name, kind), schema.bounds_of(name, kind)
            keys[name] = {**section, **entry, "properties": section["properties"]}, _origin(section)
            refused = [key for key, own in bounds.items() if "not" in own and key not in section["properties"]]
            for key in [*section["properties"], *refused]:
                documented = section["properties"].get(key, {})
                keys[f"{name}.{key}"] = {**documented, **bounds.get(key, {})}, _origin(section) if documented else ""
    source = schema.resolve("#/$defs/source")["properties"]
    for name in ("train", "eval"):
        keys[f"dataset.{name}"] = {**keys[f"dataset.{name}"][0], "properties": source}, ""
        for key, entry in source.items():
            keys[f"dataset.{name}.{key}"] = entry, ""
    for key, entry in source["columns"]["properties"].items():
        keys[f"dataset.train.columns.{key}"] = entry, ""
    for listed in ("rewards", "stages"):
        item = schema.resolve(schema.load()["properties"][listed]["items"]["$ref"])
        below = item.get("then", item)["properties"]  # an entry of `stages` may be a name, too
        keys[listed] = {**keys[listed][0], "properties": below}, ""
        keys |= {f"{listed}.{key}": (entry, "") for key, entry in below.items()}
    keys["dataset.eval.fraction"] = (
        schema.resolve("#/$defs/dataset")["properties"]["eval"]["then"]["properties"]["fraction"],
        "",
    )
    return keys


def _origin(section: dict[str, Any]) -> str:
    made = re.search(r"from (\S+) ([\d.]+)\. ", section.get("$comment", ""))
    return f"{section['title']}, {made[1]} {made[2]}" if made else ""


def _codes() -> dict[str, str]:
    """Error code -> what it means and what to do, from its row of docs/errors.md."""
    text = (shelf() / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.+) \| (.+) \|$", text, flags=re.MULTILINE)
    return {code: f"{meaning}\n  what to do: {fix}" for code, meaning, fix in rows}
