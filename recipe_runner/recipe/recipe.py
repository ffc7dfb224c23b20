"""A resolved recipe: plain values, and where each of them was written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe_runner.problems.errors import UserError
from recipe_runner.problems.problem import KeyPath, Mark, Problem


@dataclass(frozen=True)
class Recipe:
    """A recipe that passed validation, with defaults filled in and paths made absolute.

    Attributes:
        file: The recipe's file.
        text: The file's text, as given.
        values: The resolved values, section by section.
        marks: Where each key was written; keys that come from a default are absent.
        warnings: What validation warned about, as lines.
        stages: The recipes of a pipeline, in order; empty for any other stage.
    """

    file: Path
    text: str
    values: Mapping[str, Any]
    marks: Mapping[KeyPath, Mark]
    warnings: tuple[str, ...] = ()
    stages: "tuple[Recipe, ...]" = ()

    def section(self, name: str) -> dict[str, Any]:
        """A copy of a section; empty when the recipe leaves it out."""
        return dict(self.values.get(name) or {})

    def error(self, code: str, message: str, suggestion: str, *path: str | int) -> UserError:
        """An error at a key of the recipe, or at the nearest section around it that was written."""
        written = path
        while written and written not in self.marks:
            written = written[:-1]
        mark = self.marks.get(written, Mark(str(self.file)))
        return UserError([Problem(code, message, mark, path, suggestion)])
