"""Strict YAML: a recipe's values together with the line and column of every key and value.

The rules are those of YAML 1.2's core schema: `2e-4` is a number, `no` is a string, `010` is 10. Duplicate keys, tags,
keys that are not strings and values that are not finite are errors. libyaml (through PyYAML) does the parsing; what is
built here, from its events, is what PyYAML's constructors cannot give: marks, and YAML 1.2.
"""

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipe_runner.files import read_begin
from recipe_runner.problems.errors import UserError, user_error
from recipe_runner.problems.problem import KeyPath, Mark, Problem

MAX_BYTES = 1_000_000  # a recipe is a page of text; more is a mistaken path
MAX_DEPTH = 50
MAX_VALUES = 20_000  # aliases are expanded: this is what stops an alias bomb
MAX_TEXT = 100_000  # characters of one value

# Source: YAML 1.2.2, section 10.3.2 (core schema).
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,300}|0o[0-7]{1,300}|0x[0-9a-fA-F]{1,300}")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_FIRST = {"", *"nN~tTfF0123456789+-."}  # characters of null, true, false and numbers

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
            what = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
            if path.is_symlink() and not path.exists():
                what = "is a link that leads to nothing, or to itself"
            raise user_error("unreadable-file", f"the file {what}", "name a recipe file (.yaml)", mark)
        data = read_begin(path, MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise user_error("file-too-large", f"a recipe of more than {MAX_BYTES:,} bytes", "is it a recipe?", mark)
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
        events = list(_parse_events(text, name))
    except yaml.MarkedYAMLError as error:
        raise UserError([_explain_syntax_error(error, name)]) from error
    except UnicodeEncodeError as error:  # bytes of a command line that are no text
        raise user_error("wrong-encoding", "the text is not UTF-8", "write it in UTF-8", Mark(name)) from error
    except yaml.YAMLError as error:  # ReaderError
        raise user_error("yaml-syntax", str(error).splitlines()[0], "remove the character", Mark(name)) from error
    if not events or (isinstance(events[0], yaml.ScalarEvent) and not events[0].value):
        place = Mark(name, 1, 1)
        raise user_error("empty-recipe", "the file is empty", "see `recipe-run show phi3_chat_qlora`", place)
    if not isinstance(events[0], yaml.MappingStartEvent):
        raise user_error("not-a-recipe", "the file holds no mapping", "", _mark(name, events[0].start_mark))
    document.values = _Builder(document, iter(events)).build(())
    return document


def _parse_events(text: str, name: str) -> Iterator[Any]:
    """The events of values. Bounds hold while libyaml reads: for deep nesting, its time grows with the square."""
    depth = count = documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
        if documents > 1:
            place = _mark(name, event.start_mark)
            raise user_error("several-documents", "the file holds several YAML documents", "one recipe a file", place)
        if isinstance(event, yaml.ScalarEvent):
            count += 1
            if len(event.value) > MAX_TEXT:
                message = f"a value of {len(event.value):,} characters; {MAX_TEXT:,} are allowed"
                raise user_error("yaml-too-large", message, "", _mark(name, event.start_mark))
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            depth += isinstance(event, yaml.CollectionStartEvent)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        else:
            continue
        if depth > MAX_DEPTH or count > MAX_VALUES:
            _check_size(depth, count, _mark(name, event.start_mark))
        yield event


def _check_size(depth: int, count: int, mark: Mark) -> None:
    if depth > MAX_DEPTH:
        raise user_error("yaml-too-large", f"nested deeper than {MAX_DEPTH} levels", "", mark)
    if count > MAX_VALUES:
        raise user_error("yaml-too-large", f"more than {MAX_VALUES:,} values, with aliases expanded", "", mark)


def parse_scalar(text: str) -> Any:
    """Reads a plain scalar by the rules of YAML 1.2's core schema."""
    if text[:1] not in _FIRST:  # most words: nothing but a string begins so
        return text
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text[0] in "tT"
    if _INT.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def paths_below(value: Any) -> Iterator[KeyPath]:
    """The key paths of everything inside a value, from the outside to the inside."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (key,)
        yield from ((key, *below) for below in paths_below(entry))


class _Builder:
    """Builds values and marks from libyaml's events. Aliases are copied; their number of values counts."""

    def __init__(self, document: Document, events: Iterator[Any]) -> None:
        self.document, self.events = document, events
        self.anchors: dict[str, tuple[KeyPath, Any, int]] = {}  # name -> where it is, its value, number of values in it
        self.count = 0

    def build(self, path: KeyPath) -> Any:
        return self.value(next(self.events), path)

    def value(self, event: Any, path: KeyPath) -> Any:
        mark, before = _mark(self.document.file, event.start_mark), self.count
        self.document.value_marks[path] = mark
        self.count += 1
        if isinstance(event, yaml.AliasEvent):
            return self.alias(str(event.anchor), path, mark)
        if len(path) > MAX_DEPTH or self.count > MAX_VALUES:
            _check_size(len(path), self.count, mark)
        if event.tag not in (None, "!", "tag:yaml.org,2002:str"):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.problem("yaml-tag", f"the tag '{tag}'", "write the value without a tag", mark, path)
        if isinstance(event, yaml.ScalarEvent):
            if "\0" in event.value:  # no path, no name and no text of a recipe has one, and the system refuses it
                raise user_error("yaml-syntax", "the value holds a NUL character", "remove it", mark, path)
            value: Any = parse_scalar(event.value) if not event.style and event.tag is None else event.value
        else:
            value = self.mapping(path) if isinstance(event, yaml.MappingStartEvent) else self.sequence(path)
        if isinstance(value, float) and not math.isfinite(value):
            self.problem("not-finite", f"{event.value} is not a finite number", "write a number", mark, path)
        if event.anchor:
            self.anchors[event.anchor] = path, value, self.count - before
        return value

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            mark = _mark(self.document.file, event.start_mark)
            key = self.value(event, (*path, "?"))
            self.document.value_marks.pop((*path, "?"), None)
            if isinstance(key, dict | list):
                raise user_error("non-string-key", "the key is a mapping or a list", "write a word", mark, path)
            if not isinstance(key, str):
                self.problem("non-string-key", f"the key {key!r} is not a string", "put it in quotes", mark, path)
                key = str(key)
            elif key in values:
                first = self.document.key_marks[(*path, key)].line
                self.problem("duplicate-key", f"the key is on line {first} already", "keep one", mark, (*path, key))
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
            message = f"the alias '*{anchor}' stands for nothing, or for itself"
            raise user_error("yaml-alias", message, "write the value out", mark)
        source, value, size = self.anchors[anchor]
        self.count += size
        for below in paths_below(value):
            _check_size(len(path) + len(below), self.count, mark)
            for marks in (self.document.key_marks, self.document.value_marks):
                marks[(*path, *below)] = marks[(*source, *below)]
        return copy.deepcopy(value)

    def problem(self, code: str, message: str, suggestion: str, mark: Mark, path: KeyPath) -> None:
        self.document.problems.append(Problem(code, message, mark, path, suggestion))


def _mark(file: str, mark: Any) -> Mark:
    return Mark(file, mark.line + 1, mark.column + 1)


# libyaml's message -> what it usually means, in plain English.
_SYNTAX = {
    "found a tab character that violates indentation": "indent with spaces",
    "found character that cannot start any token": "indent with spaces; quote values that begin with @ or `",
    "mapping values are not allowed in this context": "quote a value that contains ':', or fix the indentation",
    "did not find expected key": "a key is indented unlike its neighbours, or a quote is missing",
    "could not find expected ':'": "a key without ':'",
    "did not find expected '-' indicator": "a list item is indented unlike its neighbours",
    "found unexpected end of stream": "a quote is never closed",
    "did not find expected ',' or ']'": "a '[' is never closed, or a comma is missing",
    "did not find expected ',' or '}'": "a '{' is never closed, or a comma is missing",
    "found undefined tag handle": "quote a value that begins with '!'",
}


def _explain_syntax_error(error: yaml.MarkedYAMLError, name: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    problem = error.problem or "the text is not YAML"
    if problem == "found unexpected end of stream" and error.context_mark:
        mark = error.context_mark  # where the quote opens says more than the end of the file
    return Problem("yaml-syntax", problem, _mark(name, mark) if mark else Mark(name), (), _SYNTAX.get(problem, ""))


def dump_values(values: Any) -> str:
    """Writes resolved values as YAML that reads back the same by the strict rules."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def write_scalar(text: str) -> str:
    """Writes a text as it stands behind a key: as it is where it reads back the same, else in quotes."""
    plain = re.fullmatch(r"[\w./~][\w./~ -]*(?<! )", text) and text.isprintable()
    if plain and parse_scalar(text) == text:
        return text
    return yaml.dump(text, default_style='"', allow_unicode=True, width=10**9).strip()


class _Dumper(yaml.SafeDumper):
    """Writes aliases out, and quotes what YAML 1.2 would not read as a string (PyYAML thinks in YAML 1.1)."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        unusual = not text.replace("\n", "").isprintable() or not text.strip()
        style = '"' if unusual else "'" if parse_scalar(text) != text else "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)
