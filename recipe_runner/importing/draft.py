"""A recipe while it is made from another tool's values, with what became of each key."""

import copy
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe_runner.importing.tools import Tool
from recipe_runner.problems.errors import UserError, user_error

CONVERTED, NONE, IGNORED, SAME = "converted", "no counterpart", "had no effect there", "same by default"
KINDS = (CONVERTED, NONE, IGNORED, SAME)


@dataclass(frozen=True)
class Line:
    """What became of a key: which it was, which of `KINDS`, and to what or why."""

    key: str
    kind: str
    text: str


@dataclass
class Draft:
    """What is made of a file.

    Attributes:
        tool: Whose it is.
        file: It.
        values: Its values.
        recipe: What is made of them.
        launch: A launch configuration, where the file holds one.
        template: A chat template, where the file holds one.
        folder: Where the recipe will be: its paths are relative to it.
        lines: What became of its keys.
        origins: Path in the recipe -> the key that it comes from, for comments.
    """

    tool: Tool
    file: Path
    values: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)
    template: str = ""
    folder: Path = Path()
    lines: list[Line] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        """A value of the file: None for what it leaves out, or empty."""
        value = self.values.get(key)
        return None if value == "" or value == [] or value == {} else value

    def number(self, key: str) -> Any:
        """A number of the file; None for what it leaves out.

        Raises:
            UserError: It is none.
        """
        value = number(self.get(key))
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)):
            return value
        raise self.refuse(f"{key} is {show(value)}, no number")

    def place(self, name: str) -> str:
        """A path of the file as the recipe has it: in the current folder or beside the file, seen from the recipe's."""
        if Path(name).is_absolute() or "://" in name:
            return name
        found = (
            Path(name) if is_there(Path(), name) or not is_there(self.file.parent, name) else self.file.parent / name
        )
        moved = os.path.relpath(found, self.folder)
        return name if moved == os.path.normpath(name) else moved

    def place_model(self, name: str) -> str:
        """A model's folder as the recipe has it; a hub id as it is."""
        return self.place(name) if name.startswith((".", "/")) or Path(name).is_dir() else name

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping of the file; an empty one for what it leaves out.

        Raises:
            UserError: It is none.
        """
        value = self.get(key)
        if value is None or isinstance(value, dict):
            return value or {}
        raise self.refuse(f"{key} is {show(value)}, no mapping of keys")

    def names(self, key: str) -> list[str]:
        """Names of the file: a list, or a text with commas; none for what it leaves out.

        Raises:
            UserError: It is neither.
        """
        value = self.get(key)
        found = [name.strip() for name in value.split(",")] if isinstance(value, str) else value or []
        if isinstance(found, list) and all(isinstance(name, str) for name in found):
            return found
        raise self.refuse(f"{key} is {show(value)}, no list of names")

    def put(self, path: str, value: Any, key: str = "") -> None:
        """Sets a key of the recipe, and remembers of which key of the file it comes."""
        section, _, rest = path.partition(".")
        if rest:
            self.recipe.setdefault(section, {})[rest] = copy.deepcopy(value)
        else:
            self.recipe[section] = copy.deepcopy(value)
        if key:
            self.origins[path] = key

    def note(self, kind: str, text: str, *keys: str) -> None:
        """Says what became of keys, of those that the file has."""
        self.lines += [Line(key, kind, text) for key in keys if key in self.values and not self.said(key)]

    def say(self, kind: str, key: str, text: str) -> None:
        """Says what became of a part of a key's value (`datasets.path`), once."""
        if not self.said(key):
            self.lines.append(Line(key, kind, text))

    def said(self, key: str) -> bool:
        """Whether it was said what became of a key."""
        return any(line.key == key for line in self.lines)

    def convert(self, path: str, value: Any, *keys: str, note: str = "") -> None:
        """Sets a key of the recipe, and says that keys of the file became it."""
        self.put(path, value, next((key for key in keys if key in self.values), ""))
        self.note(CONVERTED, f"{path}: {show(value)}" + f" ({note})" * bool(note), *keys)

    def refuse(self, message: str, fix: str = "") -> UserError:
        """The error of a file that no recipe can be made of."""
        return user_error("import-no-counterpart", f"{self.file}: {message}", fix)


def is_there(folder: Path, name: str) -> bool:
    """Whether a file or folder of a name, or files of a pattern, are in a folder."""
    return (folder / name).exists() or (any(mark in name for mark in "*?[") and any(folder.glob(name)))


def show(value: Any) -> str:
    """A value in a line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def number(value: Any) -> Any:
    """A number that YAML 1.1 reads as a text: 2e-4."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def true(value: Any) -> bool:
    """Whether a value says yes, as the tools read it."""
    return value is True or (isinstance(value, str) and value.strip().lower() in ("true", "yes", "1"))


def as_list(value: Any) -> list[Any]:
    """A list; of one value, or of none."""
    return value if isinstance(value, list) else [] if value is None else [value]
