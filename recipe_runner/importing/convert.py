"""A file of another tool, converted: the recipe, what stands beside it, and what became of each key."""

import importlib
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe_runner.importing.draft import IGNORED, KINDS, NONE, SAME, Draft, Line, number
from recipe_runner.importing.tools import Tool, read_configuration, read_tool, recognise
from recipe_runner.recipe import schema
from recipe_runner.recipe.document import dump_values

MODULES = {"axolotl": "axolotl", "llamafactory": "llamafactory", "trl": "trl", "handbook": "trl"}
COMMENTED = 40  # columns before a comment


@dataclass(frozen=True)
class Imported:
    """What was made of a file.

    Attributes:
        tool: Whose it was.
        recipe: Its text.
        launch: The text of a launch configuration; empty where the file holds none.
        template: A chat template; empty where the file holds none.
        lines: What became of each key.
    """

    tool: Tool
    recipe: str
    launch: str
    template: str
    lines: tuple[Line, ...]


def convert_file(file: Path, name: str, tool_name: str | None = None, folder: Path = Path()) -> Imported:
    """Converts a file.

    Args:
        file: Of another tool.
        name: Of the recipe.
        tool_name: One of `tools.NAMES`; by its keys where there is none.
        folder: Where the recipe will be.

    Raises:
        UserError: It is of no tool, of two, or nothing here does what it does.
    """
    values = read_configuration(file)
    tool = read_tool(tool_name) if tool_name else recognise(values, file)
    draft = Draft(tool, file, values, folder=folder)
    module: Any = importlib.import_module(f"recipe_runner.importing.{MODULES[tool.name]}")
    module.convert(draft)
    _put_plain_keys(draft)
    _read_numbers(draft)
    _drop_epochs(draft)
    _drop_unfit(draft)
    recipe: dict[str, Any] = {
        "schema_version": 1,
        "name": name,
        "description": f"Converted from {file.name} ({tool.name}).",
    }
    recipe |= {key: value for key, value in draft.recipe.items() if value not in ({}, None)}
    recipe = {key: recipe[key] for key in schema.load()["properties"] if key in recipe}
    template = draft.template if "chat_template_path" in draft.recipe.get("training", {}) else ""
    if template:
        recipe["training"]["chat_template_path"] = f"{name}.jinja"
    launch = dump_values(draft.launch) if draft.launch else ""
    order = {key: place for place, key in enumerate(values)}
    lines = sorted(draft.lines, key=lambda line: order.get(line.key.partition(".")[0], len(order)))
    told = tuple(Line(line.key, line.kind, line.text.replace("NAME.", f"{name}.")) for line in lines)
    return Imported(tool, _write(recipe, draft, file), launch, template, told)


def _put_plain_keys(draft: Draft) -> None:
    """What each key that no other was needed for becomes, by the tool's file; and its defaults."""
    for key, value in draft.values.items():
        if draft.said(key):
            continue
        entry = draft.tool.keys.get(key)
        if entry is None:
            _put_unknown(draft, key, value)
        elif draft.get(key) is None:
            draft.note(SAME, "empty", key)
        elif value in entry.get("holds", ()):
            draft.note(SAME, "as it is here", key)
        elif "to" in entry:
            draft.convert(entry["to"], value, key, note=entry.get("note", ""))
        elif "ignored" in entry:
            draft.note(IGNORED, f"{draft.tool.name} {draft.tool.version}: {entry['ignored']}", key)
        elif "none" in entry:
            draft.note(NONE, entry["none"], key)
        elif "same" in entry:
            draft.note(SAME, entry["same"], key)
        else:
            draft.note(IGNORED, "with the other keys of this file nothing reads it", key)
    for key, entry in draft.tool.keys.items():
        if "default" in entry and "to" in entry and draft.get(key) is None:
            section, _, rest = entry["to"].partition(".")
            if section == "peft" and not draft.recipe.get("peft"):
                continue
            if rest not in draft.recipe.get(section, {}):
                draft.put(entry["to"], entry["default"], f"{draft.tool.name}'s default")


def _put_unknown(draft: Draft, key: str, value: Any) -> None:
    """A key that the tool's file does not name: of TRL, a field of the stage's configuration."""
    known = schema.section_keys("training", draft.recipe["stage"])
    if draft.tool.name in ("trl", "handbook", "llamafactory") and key in known:
        if value is None:
            draft.note(SAME, "empty", key)
        else:
            draft.convert(f"training.{key}", value, key)
    elif draft.tool.unknown:
        draft.note(IGNORED if value is not None else SAME, draft.tool.unknown, key)
    else:
        fix = schema.bounds_of("training", draft.recipe["stage"]).get(key, {}).get("x-replaced-by", "")
        draft.note(NONE, fix or f"no key of {draft.tool.name} {draft.tool.version} that is known here", key)


def _read_numbers(draft: Draft) -> None:
    """Numbers that were written as texts, where the recipe's key is a number: `2e-4` is a text in YAML 1.1."""
    stage, method = draft.recipe["stage"], draft.recipe.get("peft", {}).get("method", "")
    for section, kind in (("training", stage), ("peft", method), ("run", stage)):
        known = schema.section_keys(section, kind) if draft.recipe.get(section) else {}
        for key, value in draft.recipe.get(section, {}).items():
            types = known.get(key, {}).get("type", ())
            types = [types] if isinstance(types, str) else types
            if isinstance(value, str) and "string" not in types and {"number", "integer"} & {*types}:
                draft.recipe[section][key] = number(value)


def _drop_epochs(draft: Draft) -> None:
    """Leaves epochs out where steps are counted: these go before them."""
    steps = draft.recipe.get("training", {}).get("max_steps")
    if isinstance(steps, int | float) and steps > 0:
        _drop(draft, "training", "num_train_epochs", "max_steps goes before it", IGNORED)


def _drop_unfit(draft: Draft) -> None:
    """Leaves out what the stage's configuration, or the adapter's, has no field for, or a stream has no use for."""
    if draft.recipe.get("dataset", {}).get("streaming"):
        for key in ("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers"):
            _drop(draft, "training", key, "a stream has one reader a process, the process itself")
    for section, kind in (
        ("training", draft.recipe["stage"]),
        ("peft", draft.recipe.get("peft", {}).get("method", "")),
    ):
        known = schema.section_keys(section, kind) if draft.recipe.get(section) else {}
        for key in list(draft.recipe.get(section, {})):
            if key not in known and key != "method":
                _drop(draft, section, key, f"stage {kind} has no {section}.{key}")


def _drop(draft: Draft, section: str, key: str, why: str, kind: str = NONE) -> None:
    """Takes a key out of the recipe again, and says so of the key that it comes from."""
    if draft.recipe[section].pop(key, None) is not None:
        origin = draft.origins.pop(f"{section}.{key}", "")
        draft.lines = [line for line in draft.lines if line.key != origin]
        draft.note(kind, why, origin)


def _write(recipe: dict[str, Any], draft: Draft, file: Path) -> str:
    """The recipe's text, each key with where it comes from."""
    head = [
        f"# Converted from {file.name} ({draft.tool.name} {draft.tool.version}) by recipe-run import.",
        f"# Look at its rows: recipe-run preview {recipe['name']}.yaml",
    ]
    lines, section = [], ""
    for line in dump_values(recipe).splitlines():
        indent = len(line) - len(line.lstrip())
        key = line.strip().partition(":")[0]
        if indent == 0 and key in recipe:
            section = key
        path = f"{section}.{key}" if indent else key
        origin = draft.origins.get(path) if indent in (0, 2) else None
        plain = origin and not line.rstrip().endswith(("|", "|-", ">", ":"))
        lines.append(f"{line.ljust(COMMENTED)} # {origin}" if plain else line)
    return "\n".join([*head, *lines]) + "\n"


def summarize(lines: tuple[Line, ...]) -> Iterator[str]:
    """The report, kind by kind."""
    for kind in KINDS:
        own = [line for line in lines if line.kind == kind]
        if own:
            yield f"{kind} ({len(own)})"
            width = min(38, max(len(line.key) for line in own))
            for line in own:
                begin = f"  {line.key:<{width}}  "
                yield from textwrap.wrap(line.text, 79, initial_indent=begin, subsequent_indent=" " * len(begin))
