"""A look at local data without the training stack: its columns, how many rows there are, the first of them."""

import csv
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIRST = 100  # rows that are looked at


@dataclass(frozen=True)
class Look:
    """What is found in a file.

    Attributes:
        columns: Name -> its cells in the first rows.
        rows: Number of rows.
    """

    columns: dict[str, list[Any]]
    rows: int


def look_at(file: Path) -> Look | None:
    """Looks into a data file; None where it can't be read: training says why.

    Every row is read once, and only the first are kept.
    """
    try:
        if file.suffix == ".parquet":
            return _look_at_parquet(file)
        rows = iterate_rows(file)
        first = list(itertools.islice(rows, FIRST))
        if not all(isinstance(row, dict) for row in first):
            return None
        names = dict.fromkeys(key for row in first for key in row)
        columns = {name: [row.get(name) for row in first] for name in names}
        return Look(columns, len(first) + sum(1 for _ in rows))
    except (OSError, ValueError, AttributeError, csv.Error, RecursionError):
        return None


def iterate_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a json, jsonl, csv or txt file in UTF-8.

    Raises:
        OSError: It can't be read.
        ValueError: It is not UTF-8, or not JSON.
    """
    with file.open(encoding="utf-8-sig", newline="" if file.suffix == ".csv" else None) as stream:
        if file.suffix == ".csv":
            csv.field_size_limit(sys.maxsize)
            yield from csv.DictReader(stream)
        elif file.suffix == ".txt":
            yield from ({"text": line} for line in stream if line.strip())
        elif stream.read(1 << 10).lstrip()[:1] == "[":  # one list of rows
            stream.seek(0)
            yield from json.load(stream)
        else:
            stream.seek(0)
            yield from (json.loads(line) for line in stream if line.strip())


def _look_at_parquet(file: Path) -> Look | None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return None  # a light install
    try:
        parquet = pq.ParquetFile(file)
        columns = next(parquet.iter_batches(FIRST)).to_pydict()
    except (pa.ArrowException, StopIteration):
        return None
    return Look(columns, parquet.metadata.num_rows)
