"""How problems are written: as text for people, as JSON, as GitHub annotations, as SARIF."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from recipe_runner import __version__
from recipe_runner.problems.problem import Mark, Problem


def write_text(problems: Sequence[Problem]) -> str:
    """One line a problem, with severity and code in colour: `click.echo` leaves colour out where no terminal is."""
    lines = []
    for problem in problems:
        kind = f"{problem.severity}[{problem.code}]"
        colour = "red" if problem.severity == "error" else "yellow"
        lines.append(str(problem).replace(kind, click.style(kind, fg=colour, bold=True), 1))
    return "\n".join(lines)


def write_json(problems: Sequence[Problem]) -> str:
    """A list of objects: file, line, column, severity, code, path, message, suggestion."""
    return json.dumps([problem.as_json() for problem in problems], indent=2)


def write_github(problems: Sequence[Problem]) -> str:
    """Workflow commands, which GitHub shows at the line of the file.

    Source: GitHub's "Workflow commands for GitHub Actions", with the escapes of actions/toolkit's command.ts.
    """
    lines = []
    for problem in problems:
        mark = problem.mark or Mark("")
        place = {"file": mark.file, "line": mark.line or 1, "col": mark.column or 1, "title": problem.code}
        properties = ",".join(f"{key}={_escape(str(value), ':,')}" for key, value in place.items())
        lines.append(f"::{problem.severity} {properties}::{_escape(problem.told)}")
    return "\n".join(lines)


def write_sarif(problems: Sequence[Problem]) -> str:
    """A SARIF 2.1.0 log, which code scanning reads."""
    codes = sorted({problem.code for problem in problems})
    results: list[dict[str, Any]] = []
    for problem in problems:
        mark = problem.mark or Mark("")
        region = {"startLine": mark.line or 1, "startColumn": mark.column or 1}
        location = {"artifactLocation": {"uri": quote(Path(mark.file).as_posix())}, "region": region}
        results.append(
            {
                "ruleId": problem.code,
                "ruleIndex": codes.index(problem.code),
                "level": problem.severity,
                "message": {"text": problem.told},
                "locations": [{"physicalLocation": location}],
            }
        )
    driver = {"name": "recipe-run", "version": __version__, "rules": [{"id": code} for code in codes]}
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    log = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=2)


WRITERS: dict[str, Callable[[Sequence[Problem]], str]] = {
    "text": write_text,
    "json": write_json,
    "github": write_github,
    "sarif": write_sarif,
}


def _escape(text: str, more: str = "") -> str:
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text
