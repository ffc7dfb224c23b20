"""Strict YAML: a recipe's values together with the line and column of every key and value.

The rules are those of YAML 1.2's core schema: `2e-4` is a number, `no` is a string, `010` is 10. Duplicate keys, tags,
keys that are not strings and values that are not finite are errors. libyaml (through PyYAML) does the parsing; what is
built here, from its events, is what PyYAML's constructors cannot give: marks, and YAML 1.2.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipe_runner.errors import UserError, user_error
from recipe_runner.problem import KeyPath, Mark, Problem, join_path

MAX_BYTES = 1_000_000  # a recipe is a page of text; more is a mistaken path
MAX_DEPTH = 50
MAX_VALUES = 20_000  # aliases are expanded: this is what stops an alias bomb

# Source: YAML 1.2.2, section 10.3.2 (core schema).
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,300}|0o[0-7]{1,300}|0x[0-9a-fA-F]{1,300}")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Document:
    """One parsed file.

    Attributes:
        file: Name for messages.
        text: The text that was parsed.
        values: The root mapping.
        key_marks: Place of each key (of each item, in a list).
        value_marks: Place of each value.
        problems: What is wrong with the YAML itself, short of making it unreadable.
    """

    file: str
    text: str
    values: dict[str, Any] = field(default_factory=dict)
    key_marks: dict[KeyPath, Mark] = field(default_factory=dict)
    value_marks: dict[KeyPath, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_document(path: Path, name: str | None = None) -> Document:
    """Reads and parses a recipe file.

    Raises:
        UserError: The file cannot be read, is not UTF-8 or is not one YAML mapping.
    """
    name = name or str(path)
    mark = Mark(name)
    try:
        if not path.is_file():
            what = (
                "is a folder"
                if path.is_dir()
                else "is no regular file"
                if path.exists()
                else "does not exist"
            )
            raise user_error("unreadable-file", f"the file {what}", "name a recipe file (.yaml)", mark)
        if path.stat().st_size > MAX_BYTES:
            raise user_error(
                "file-too-large", f"a recipe of more than {MAX_BYTES:,} bytes", "is it a recipe?", mark
            )
        data = path.read_bytes()
    except OSError as error:
        raise user_error("unreadable-file", f"cannot read the file ({error.strerror})", "", mark) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"byte 0x{data[error.start]:02x} is not UTF-8"
        raise user_error("wrong-encoding", message, "save the file as UTF-8", Mark(name, line, 1)) from error
    return parse_document(text, name)


def parse_document(text: str, name: str) -> Document:
    """Parses the text of a recipe.

    Raises:
        UserError: The text is not one YAML mapping.
    """
    document = Document(name, text)
    try:
        events = [
            event
            for event in yaml.parse(text, Loader=_Loader)
            if isinstance(event, yaml.NodeEvent | yaml.CollectionEndEvent | yaml.DocumentStartEvent)
        ]
    except yaml.MarkedYAMLError as error:
        raise UserError([_explain_syntax_error(error, name)]) from error
    except yaml.YAMLError as error:  # ReaderError: control characters
        raise user_error(
            "yaml-syntax", str(error).splitlines()[0], "remove the control character", Mark(name)
        ) from error
    starts = [event for event in events if isinstance(event, yaml.DocumentStartEvent)]
    if len(starts) > 1:
        raise user_error(
            "several-documents",
            "the file holds several YAML documents",
            "one recipe a file",
            _mark(name, starts[1].start_mark),
        )
    if len(events) < 2 or (isinstance(events[1], yaml.ScalarEvent) and not events[1].value):
        raise user_error(
            "empty-recipe",
            "the file holds no recipe",
            "see `recipe-run show phi3_chat_qlora`",
            Mark(name, 1, 1),
        )
    if not isinstance(events[1], yaml.MappingStartEvent):
        raise user_error(
            "not-a-recipe",
            "the file holds no mapping of keys to values",
            "",
            _mark(name, events[1].start_mark),
        )
    document.values = _Builder(document, iter(events[1:])).build(())
    return document


def parse_scalar(text: str) -> Any:
    """Reads a plain scalar by the rules of YAML 1.2's core schema."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text[0] in "tT"
    if _INT.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(
            text.replace(".inf", "inf")
            .replace(".Inf", "inf")
            .replace(".INF", "inf")
            .replace(".nan", "nan")
            .replace(".NaN", "nan")
            .replace(".NAN", "nan")
        )
    return text


class _Builder:
    """Builds values and marks from libyaml's events."""

    def __init__(self, document: Document, events: Iterator[Any]) -> None:
        self.document, self.events = document, events
        self.anchors: dict[str, list[Any]] = {}
        self.count = 0

    def build(self, path: KeyPath) -> Any:
        return self.value(next(self.events), path)

    def value(self, event: Any, path: KeyPath) -> Any:
        mark = _mark(self.document.file, event.start_mark)
        self.count += 1
        if len(path) > MAX_DEPTH or self.count > MAX_VALUES:
            what = (
                f"nested deeper than {MAX_DEPTH} levels"
                if len(path) > MAX_DEPTH
                else f"more than {MAX_VALUES:,} values once aliases are expanded"
            )
            raise user_error("yaml-too-large", what, "", mark)
        self.document.value_marks[path] = mark
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event.anchor, path, mark)
        if event.tag not in (None, "!", "tag:yaml.org,2002:str"):
            self.problem(
                "yaml-tag",
                f"the tag '{event.tag.replace('tag:yaml.org,2002:', '!!')}'",
                "write the value without a tag",
                mark,
                path,
            )
        if event.anchor:
            recorder = _Recorder(event, self.events)
            self.events = recorder
            value = self.content(event, path, mark)
            self.events = recorder.events
            self.anchors[event.anchor] = recorder.seen
            return value
        return self.content(event, path, mark)

    def content(self, event: Any, path: KeyPath, mark: Mark) -> Any:
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(path)
        value = parse_scalar(event.value) if not event.style and event.tag is None else event.value
        if isinstance(value, float) and not math.isfinite(value):
            self.problem("not-finite", f"{event.value} is not a finite number", "write a number", mark, path)
        return value

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            mark = _mark(self.document.file, event.start_mark)
            key = self.value(event, (*path, "?"))
            self.document.value_marks.pop((*path, "?"), None)
            if not isinstance(key, str):
                self.problem(
                    "non-string-key", f"the key {key!r} is not a string", "put it in quotes", mark, path
                )
                key = str(key)
            elif key in values:
                first = self.document.key_marks[(*path, key)].line
                self.problem(
                    "duplicate-key",
                    f"the key is on line {first} already",
                    "keep one of them",
                    mark,
                    (*path, key),
                )
            self.document.key_marks[(*path, key)] = mark
            values[key] = self.build((*path, key))
        return values

    def sequence(self, path: KeyPath) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            item = (*path, len(values))
            self.document.key_marks[item] = _mark(self.document.file, event.start_mark)
            values.append(self.value(event, item))
        return values

    def alias(self, anchor: str, path: KeyPath, mark: Mark) -> Any:
        if anchor not in self.anchors:  # inside its own definition, or never defined
            raise user_error(
                "yaml-alias",
                f"the alias '*{anchor}' stands for nothing, or for itself",
                "write the value out",
                mark,
            )
        outer, self.events = self.events, iter(self.anchors[anchor])
        value = self.build(path)
        self.events = outer
        return value

    def problem(self, code: str, message: str, suggestion: str, mark: Mark, path: KeyPath) -> None:
        self.document.problems.append(Problem(code, message, mark, join_path(path), suggestion))


class _Recorder:
    """Passes events on and keeps them, so that an alias can play them again."""

    def __init__(self, first: Any, events: Iterator[Any]) -> None:
        plain = type(first)
        # Played again, the first event must not define its anchor a second time.
        again = (
            plain(None, first.tag, first.implicit, first.value, first.start_mark, first.end_mark, first.style)
            if plain is yaml.ScalarEvent
            else plain(None, first.tag, first.implicit, first.start_mark, first.end_mark, first.flow_style)
        )
        self.seen, self.events = [again], events

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        event = next(self.events)
        self.seen.append(event)
        return event


def _mark(file: str, mark: Any) -> Mark:
    return Mark(file, mark.line + 1, mark.column + 1)


# libyaml's message -> what it usually means, in plain English.
_SYNTAX = {
    "found character that cannot start any token": "a tab, or one of @ ` % at the start of a value; indent with spaces, put the value in quotes",
    "mapping values are not allowed in this context": "a ':' inside a value, or a wrong indentation; put the value in quotes",
    "did not find expected key": "a key is indented differently from its neighbours, or a quote is missing",
    "could not find expected ':'": "a key without ':'",
    "did not find expected '-' indicator": "a list item is indented differently from its neighbours",
    "found unexpected end of stream": "a quote that is never closed",
    "did not find expected ',' or ']'": "a '[' that is never closed, or a missing comma",
    "did not find expected ',' or '}'": "a '{' that is never closed, or a missing comma",
    "found undefined tag handle": "a value that starts with '!'; put it in quotes",
}


def _explain_syntax_error(error: yaml.MarkedYAMLError, name: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    problem = error.problem or "the text is not YAML"
    if problem == "found unexpected end of stream" and error.context_mark:
        mark = error.context_mark  # where the quote opens says more than the end of the file
    return Problem(
        "yaml-syntax", problem, _mark(name, mark) if mark else Mark(name), "", _SYNTAX.get(problem, "")
    )
