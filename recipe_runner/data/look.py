"""A look at local data without the training stack: its columns, how many rows there are, the first of them."""

import csv
import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe_runner.recipe.local import find_writing, iterate_csv, open_text, suffix_of

FIRST = 100  # rows that are looked at


@dataclass(frozen=True)
class Look:
    """What is found in a file.

    Attributes:
        columns: Name -> its cells in the first rows.
        rows: Number of rows.
        options: Keys of a source that say how it is written, as a recipe has them: what is not the usual.
        characters: Of text in a row, which 99 of 100 of the first rows don't go beyond.
    """

    columns: dict[str, list[Any]]
    rows: int
    options: dict[str, str] = field(default_factory=dict)
    characters: int = 0


def look_at(files: Sequence[Path]) -> Look | None:
    """Looks into the files of a source; None where they can't be read: training says why.

    Every row is read once, and only the first are kept.
    """
    try:
        suffix = suffix_of(files[0].name)
        if suffix in (".parquet", ".arrow"):
            return _look_at_arrow(files, suffix)
        options = _find_options(files[0], suffix)
        rows = itertools.chain.from_iterable(iterate_rows(file, **options) for file in files)
        first = list(itertools.islice(rows, FIRST))
        if not all(isinstance(row, dict) for row in first):
            return None
        names = dict.fromkeys(key for row in first for key in row)
        columns = {name: [row.get(name) for row in first] for name in names}
        return Look(columns, len(first) + sum(1 for _ in rows), options, _measure(first))
    except (OSError, ValueError, AttributeError, EOFError, ImportError, LookupError, csv.Error, RecursionError):
        return None


def _find_options(file: Path, suffix: str) -> dict[str, str]:
    """How a file is written, where that is not the usual: its delimiter and encoding, the key of its rows."""
    if suffix in (".csv", ".tsv"):
        writing = find_writing(file, None, None)
        usual = "\t" if suffix == ".tsv" else ","
        options = {"delimiter": writing.delimiter} if writing.delimiter != usual else {}
        return options | ({"encoding": writing.encoding} if writing.encoding != "utf-8-sig" else {})
    if suffix != ".json":
        return {}
    with open_text(file) as stream:
        begin = stream.read(1 << 10)
        if begin.lstrip()[:1] != "{":
            return {}
        try:
            whole = json.loads(begin + stream.read())
        except ValueError:
            return {}  # a row a line
    lists = [key for key, value in whole.items() if isinstance(value, list) and isinstance((value or [0])[0], dict)]
    turns = {"messages", "conversations"} & set(whole)  # one row
    return {"field": lists[0]} if lists and not turns else {}


def _measure(rows: Sequence[Mapping[str, Any]]) -> int:
    """Characters of text in a row, which 99 of 100 don't go beyond."""
    lengths = sorted(sum(map(_count, row.values())) for row in rows)
    return lengths[math.ceil(len(lengths) * 0.99) - 1] if lengths else 0


def _count(value: Any) -> int:
    """Characters that a cell has in a prompt: of turns their texts; of calls and declared tools, the JSON of them."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping) and {"role", "from"} & set(value):
        return sum(map(_count, value.values()))
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        return sum(map(_count, value))
    return len(json.dumps(value, ensure_ascii=False, default=str)) if isinstance(value, Mapping | list) else 0


def texts_of(value: Any) -> Iterator[str]:
    """All texts in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from texts_of(entry)
    elif isinstance(value, Sequence):
        for entry in value:
            yield from texts_of(entry)


def iterate_rows(
    file: Path, field: str | None = None, delimiter: str | None = None, encoding: str | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a json, jsonl, csv, tsv or txt file, also of a compressed one.

    Args:
        file: Where they are.
        field: Of a json file of one object, the key under which they are.
        delimiter: Of a csv or tsv file; see `local.find_writing`, as for the encoding. Other files are in UTF-8.
        encoding: See delimiter.

    Raises:
        OSError: It can't be read.
        ValueError: It is not UTF-8, or not JSON, or has no such field.
    """
    suffix = suffix_of(file.name)
    if suffix in (".csv", ".tsv"):
        yield from iterate_csv(file, delimiter, encoding)
        return
    with open_text(file) as stream:
        if suffix == ".txt":
            yield from ({"text": line} for line in stream if line.strip())
        elif field is not None:
            rows = json.load(stream)
            if not isinstance(rows, dict) or not isinstance(rows.get(field), list):
                raise ValueError(f"no list '{field}'")
            yield from rows[field]
        elif (begin := stream.read(1 << 10)).lstrip()[:1] == "[":  # one list of rows
            yield from json.loads(begin + stream.read())
        else:
            lines = itertools.chain(io.StringIO(begin + stream.readline()), stream)
            yield from (json.loads(line) for line in lines if line.strip())


def _look_at_arrow(files: Sequence[Path], suffix: str) -> Look | None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return None  # a light install
    try:
        if suffix == ".parquet":
            opened = [pq.ParquetFile(file) for file in files]
            first = next(opened[0].iter_batches(FIRST)).to_pylist()
            count = sum(file.metadata.num_rows for file in opened)
        else:
            tables = [pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files]
            first, count = tables[0].slice(0, FIRST).to_pylist(), sum(map(len, tables))
    except (pa.ArrowException, OSError, StopIteration):
        return None
    columns = {name: [row[name] for row in first] for name in (first[0] if first else ())}
    return Look(columns, count, {}, _measure(first))
