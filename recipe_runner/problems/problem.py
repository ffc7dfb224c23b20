"""A problem in a recipe, in the data or in the environment, and how it is written down."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from recipe_runner.problems.words import make_visible

KeyPath = tuple[str | int, ...]
MOST_TOLD = 100  # problems of one kind at one place: nobody reads more
MOST_CHARACTERS = 1000  # of a part of a message: what a recipe says may be a megabyte

Found = Iterator[tuple[KeyPath, str, str]]  # what a rule yields: keys, what was found there, and what to do


@dataclass(frozen=True, order=True)
class Mark:
    """A place in a file. Lines and columns count from 1; 0 means that the place has none (a command line option)."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Problem:
    """One problem: where it is, what it is (a stable code), what was found and what to do.

    Attributes:
        code: Stable kebab-case identifier, for example `unknown-key`.
        message: What was found, in one line.
        mark: Where it was found; None for a problem of the environment.
        path: Keys that lead to it in the recipe, for example `("training", "learning_rate")`.
        suggestion: What to write or do instead.
        severity: `error` or `warning`.
        meant: The key or value that was meant, where there is one: what `--fix` and the rules go by.
    """

    code: str
    message: str
    mark: Mark | None = None
    path: KeyPath = ()
    suggestion: str = ""
    severity: str = "error"
    meant: Any = field(default=None, compare=False)

    def __str__(self) -> str:
        where = f"{printable(str(self.mark))}: " if self.mark else ""
        return f"{where}{self.severity}[{self.code}] {self.told}"

    @property
    def told(self) -> str:
        """Key, message and suggestion, in one line that a terminal can print."""
        key = f"{printable(join_path(self.path))}: " if self.path else ""
        hint = f"; {printable(self.suggestion)}" if self.suggestion else ""
        return f"{key}{printable(self.message)}{hint}"

    def as_json(self) -> dict[str, Any]:
        """The problem as a JSON object: file, line, column, severity, code, path, message, suggestion."""
        mark = self.mark or Mark("")
        return {
            "file": mark.file,
            "line": mark.line,
            "column": mark.column,
            "severity": self.severity,
            "code": self.code,
            "path": join_path(self.path),
            "message": self.message,
            "suggestion": self.suggestion,
        }


def printable(text: str) -> str:
    """A text for one line of a terminal, cut where it is very long."""
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]}... ({len(text):,} characters)"
    return make_visible(text.replace("\n", " "))


def at_most(problems: Iterable[Problem], most: int = MOST_TOLD) -> list[Problem]:
    """The first problems of a kind, the last of them saying that there are more."""
    first = list(itertools.islice(problems, most + 1))
    if len(first) > most:
        last = first[most - 1]
        first[most - 1 :] = [replace(last, message=f"{last.message} (the first {most} of this kind; there are more)")]
    return first


def sort_problems(problems: list[Problem]) -> list[Problem]:
    """Orders problems by file, line and column, and drops exact repetitions."""
    return sorted(dict.fromkeys(problems), key=lambda p: (p.mark or Mark(""), p.code, join_path(p.path)))


def as_warning(problem: Problem) -> Problem:
    """The same problem, as a warning."""
    return replace(problem, severity="warning")


def value_at(values: Any, path: KeyPath) -> Any:
    """The value that a key path leads to."""
    for part in path:
        values = values[part]
    return values


def join_path(path: KeyPath) -> str:
    """Writes a key path as people type it: `('dataset', 'train', 0, 'source')` -> `dataset.train.0.source`."""
    return ".".join(str(part) for part in path)
