"""Data sources, opened: their rows, and which column has which role. The rows' layout is made by `formats`."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, disable_progress_bars
from datasets.utils import logging

from recipe_runner.data.columns import (
    choose_columns,
    hand_on,
    list_turn_keys,
    refuse_lost_columns,
    refuse_parts_without,
)
from recipe_runner.data.formats import normalise_row
from recipe_runner.data.images import locate
from recipe_runner.data.pictures import keep_encoded
from recipe_runner.data.place import store_folder
from recipe_runner.data.reading import Read, as_written, find_suffix, load_rows, stream_rows
from recipe_runner.data.turns import KNOWN_KEYS, SEGMENT_KEYS, RowError
from recipe_runner.files import write_text
from recipe_runner.problems.errors import user_error
from recipe_runner.problems.problem import KeyPath
from recipe_runner.problems.words import suggest
from recipe_runner.recipe.local import TEXTS, data_files, suffix_of
from recipe_runner.recipe.sections import DatasetSection, SourceSection

HEAD = 1_000  # rows of what is streamed that are looked at before the first step
FEW_ROWS = 20  # that say what a column holds


@dataclass(frozen=True)
class Source:
    """One source of a recipe, opened.

    Attributes:
        section: What the recipe says of it.
        rows: Its rows, with the columns that are used, memory-mapped.
        columns: Role of a column -> its name in the data.
        unused: Columns that no role takes.
        names: All names that the data has: of columns, and of keys of turns.
        filled: Columns whose objects have each other's keys, as null.
        guessed: What was guessed of how it is written, for people.
        doubt: What of its rows may not be as they were meant, for people.
        numbered: What each row is called, where it is not its number.
    """

    section: SourceSection
    rows: Any
    columns: dict[str, str]
    unused: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()
    filled: frozenset[str] = frozenset()
    guessed: str = ""
    doubt: str = ""
    numbered: Sequence[str] = ()

    def call_row(self, row: int) -> str:
        """What a row is called in messages."""
        return self.numbered[row] if self.numbered else f"row {row + 1}"

    @property
    def name(self) -> str:
        """The file or hub id."""
        return self.section.source

    @property
    def path(self) -> KeyPath:
        """Where the recipe names it."""
        return (*self.section.path, "source")


def name_sources(sections: Sequence[SourceSection]) -> list[str]:
    """Short names of sources: of files without folder and suffix, of the hub's without owner.

    The same data has the same name, in training and in evaluation; other data of that name has a number.
    """
    found: dict[tuple[str, str | None, str | None], str] = {}
    for section in sections:
        name, data = section.source, (section.source, section.subset, section.field)
        short = Path(name.rstrip("/")).name.partition(".")[0] or name
        same = len({other for other in found.values() if other.partition("#")[0] == short})
        found.setdefault(data, f"{short}#{same + 1}" if same else short)
    return [found[section.source, section.subset, section.field] for section in sections]


def open_sources(dataset: DatasetSection) -> list[Source]:
    """Opens every source of a recipe, without reading its rows.

    Raises:
        UserError: A source can't be read, has no rows, or lacks a column.
    """
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)  # what it says of a file that can't be read, we say with the line
    sources = [open_source(source, dataset) for source in dataset.sources]
    used = {column: role for source in reversed(sources) for role, column in reversed(source.columns.items())}
    there = {key for source in sources for key in source.names}
    for number, name in enumerate(dataset.ignore):
        place = ("dataset", "ignore", number)
        if name in used:
            message = f"the column '{name}' is used, for the role '{used[name]}'"
            raise user_error("wrong-column-role", message, path=place)
        if name not in there and not dataset.streaming:  # of what is streamed, it may come later
            message = f"no source has a column or a key of a turn '{name}'"
            raise user_error("missing-column", message, suggest(name, there) or "remove it", path=place)
    return sources


def open_source(section: SourceSection, dataset: DatasetSection) -> Source:
    """Opens one source and chooses its columns for the format; of one that is streamed, its first rows."""
    dataset, streamed = dataset.of(section), dataset.streaming and section in dataset.train
    return _open_stream(section, dataset) if streamed else _open(section, dataset, data_files(section.source))


def _open_stream(section: SourceSection, dataset: DatasetSection) -> Source:
    head = [row for _, row in itertools.islice(stream_rows(section), HEAD)]
    if not head:
        raise user_error("empty-dataset", f"{section.source} has no rows", path=(*section.path, "source"))
    plain = replace(section, split="train", field=None, sample_by=None, delimiter=None, encoding=None)
    if suffix_of(section.source) in TEXTS or data_files(section.source):
        text = "".join(json.dumps(row, default=str) + "\n" for row in head)
        file = store_folder() / f"head-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
        made = _open(plain, dataset, [file])
    else:
        made = _open(plain, dataset, [], Dataset.from_list(head))
    return replace(made, section=section)


def _open(
    section: SourceSection, dataset: DatasetSection, files: list[Path], streamed: Dataset | None = None
) -> Source:
    read = (
        load_rows(section, files, dataset.format)
        if streamed is None
        else Read(streamed, suffix=find_suffix(section, files))
    )
    rows = read.rows
    columns = choose_columns(section, dataset.format, rows[:FEW_ROWS])
    refuse_parts_without(section, dataset.format, columns, read.parts)
    if not dataset.images and "images" not in section.columns:
        columns.pop("images", None)
    columns |= hand_on(section, dataset.reward_columns, columns, rows.column_names)
    unused = [column for column in rows.column_names if column not in (*columns.values(), *dataset.ignore)]
    refuse_lost_columns(section, dataset.format, rows.select_columns(unused))
    used = rows.select_columns(list(dict.fromkeys(columns.values())))
    if "images" in columns:
        used = keep_encoded(used, columns["images"])
    is_json = read.suffix in (".json", ".jsonl")
    if files and is_json:
        used = as_written(used, files, section)
    keys = {column: list_turn_keys(used, column) for column in used.column_names}
    unused += [
        f"{column}.{key}"
        for column in keys
        for key in keys[column]
        if column not in (columns.get("tools"), columns.get("images"), *dataset.reward_columns)
        and key not in (*KNOWN_KEYS, *(SEGMENT_KEYS if column == columns.get("segments") else ()), *dataset.ignore)
    ]
    names = frozenset((*rows.column_names, *(key for column in keys.values() for key in column)))
    # datasets 5.2 reads JSON without giving an object keys that it has not
    filled = [] if is_json else [name for name in used.column_names if _has_objects(used.data.schema.field(name).type)]
    return Source(section, used, columns, tuple(unused), names, frozenset(filled), read.guessed, read.doubt)


def _has_objects(kind: pa.DataType, depth: int = 0) -> bool:
    """Whether a column has objects in objects: calls of tools in turns, schemas of tools."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _has_objects(kind.value_type, depth)
    if pa.types.is_struct(kind):
        return depth > 0 or any(_has_objects(field.type, depth + 1) for field in kind)
    return False


def _drop_nulls(value: Any) -> Any:
    """An object without the keys that are null."""
    if isinstance(value, dict):
        return {key: _drop_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_drop_nulls(entry) for entry in value] if isinstance(value, list) else value


def read_rows(dataset: DatasetSection, sources: list[Source], order: np.ndarray) -> list[dict[str, Any]]:
    """Reads some rows, `(rows, 2)` of source and row in it, and brings them to a layout of TRL's: see `formats`.

    Returns:
        `messages`, or `prompt` and `completion`, or `text`; and `dropped`, why a row can't be trained on, or ''.

    Raises:
        UserError: A row has the wrong shape.
    """
    rows: list[dict[str, Any]] = [{}] * len(order)
    for number in np.unique(order[:, 0]):
        source, places = sources[number], np.flatnonzero(order[:, 0] == number)
        section = dataset.of(source.section)
        batch = source.rows[order[places, 1].tolist()]
        cells = {role: batch[column] for role, column in source.columns.items()}
        cells |= {role: _drop_nulls(cells[role]) for role, column in source.columns.items() if column in source.filled}
        if suffix_of(source.name) in (".csv", ".tsv") and "label" in cells:  # whose cells are texts
            cells["label"] = [{"true": True, "false": False}.get(cell.lower(), cell) for cell in cells["label"]]
        for place, *values in zip(places.tolist(), *cells.values(), strict=True):
            row = dict(zip(cells, values, strict=True))
            try:
                rows[place] = normalise_row(row, section, f"{source.name}: {source.call_row(order[place, 1])}")
                if pictures := rows[place].get("images"):
                    rows[place]["images"] = locate(pictures, source.name, dataset.image_folder)
            except RowError as error:
                raise user_error("wrong-row-shape", str(error), path=source.path) from error
    return rows
