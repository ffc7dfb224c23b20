"""A resolved recipe: plain values, and where each of them was written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe_runner.problem import KeyPath, Mark


@dataclass(frozen=True)
class Recipe:
    """A recipe that passed validation, with defaults filled in and paths made absolute.

    Attributes:
        file: The recipe's file.
        text: The file's text, as given.
        values: The resolved values, section by section.
        marks: Where each key was written; keys that come from a default are absent.
        warnings: What validation warned about, as lines.
    """

    file: Path
    text: str
    values: Mapping[str, Any]
    marks: Mapping[KeyPath, Mark]
    warnings: tuple[str, ...] = ()

    def section(self, name: str) -> dict[str, Any]:
        """A copy of a section; empty when the recipe leaves it out."""
        return dict(self.values.get(name) or {})

    def mark(self, *path: str | int) -> Mark:
        """The place of a key, or of the nearest section around it that was written."""
        while path and path not in self.marks:
            path = path[:-1]
        return self.marks.get(path, Mark(str(self.file)))
