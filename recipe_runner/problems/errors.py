"""Errors that end a command, and the exit status that each stands for.

    Exception
    ├── UserError      exit status 1: the recipe, the data or the environment is at fault
    └── Interrupted    exit status 130 (Ctrl-C) or 143 (SIGTERM); a checkpoint was left if training had begun

Anything else that reaches the command line is a bug in this project (exit status 3).
"""

import re
from collections.abc import Iterable
from typing import Any

from recipe_runner.problems.problem import KeyPath, Mark, Problem


class UserError(Exception):
    """The recipe, the data or the environment is at fault; `problems` is everything that was found, at least one."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems

    def __reduce__(self) -> Any:  # between processes: by the problems, not by the text
        return type(self), (self.problems,)


class Interrupted(Exception):
    """A signal interrupted the command; the message says how to go on."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
        self.status = 128 + number  # as a shell reports it


def user_error(
    code: str, message: str, suggestion: str = "", mark: Mark | None = None, path: KeyPath = ()
) -> UserError:
    """Builds the error for one problem."""
    return UserError([Problem(code, message, mark, path, suggestion)])


def refused(section: str, keys: Iterable[str], error: BaseException) -> UserError:
    """Builds the error for what an upstream class says of a section, at the key that it names first, if any."""
    message = first_line(error)
    named = next((word for word in re.findall(r"\w+", message) if word in keys), None)
    return user_error(f"{section}-refused", message, path=(section, named) if named else (section,))


def first_line(error: BaseException) -> str:
    """The first line of what upstream says (and the next, where it ends with a colon), or the error's name."""
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {more[0]}" if first.endswith(":") and more else first
