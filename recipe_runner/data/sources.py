"""Data sources: opening them, choosing columns, the order of rows. The rows' layout is made by `formats`."""

import codecs
import csv
import glob
import hashlib
import itertools
import json
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    ReadInstruction,
    Value,
    concatenate_datasets,
    disable_progress_bars,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetsError
from datasets.utils import logging

from recipe_runner.data.formats import normalise_row
from recipe_runner.data.images import locate
from recipe_runner.data.look import iterate_rows, look_at
from recipe_runner.data.pictures import keep_encoded
from recipe_runner.data.place import store_folder
from recipe_runner.data.turns import KNOWN_KEYS, SEGMENT_KEYS, RowError, describe_value, read_json, says_something
from recipe_runner.files import FULL, disk_full, write_text
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.problems.problem import KeyPath
from recipe_runner.problems.words import misspelt, nearest, suggest
from recipe_runner.recipe.document import write_scalar
from recipe_runner.recipe.local import (
    BUILDERS,
    DELIMITERS,
    HUB,
    SAVED,
    TEXTS,
    UNPACKED,
    Writing,
    data_files,
    find_writing,
    is_file_source,
    is_saved,
    open_bytes,
    open_text,
    split_line,
    suffix_of,
)
from recipe_runner.recipe.new import MEANINGS, OTHER_NAMES, Columns, find_columns, guess_format, names_of
from recipe_runner.recipe.schema import formats_of
from recipe_runner.recipe.sections import DatasetSection, SourceSection
from recipe_runner.stages import FORMATS, STAGES

MOST_REPEATS = 100  # times all rows, that a mixture may have
PACKED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}  # how such files begin
HEAD = 1_000  # rows of what is streamed that are looked at before the first step
FEW_ROWS = 20  # that say what a column holds
# What a file that can't be read raises, in the libraries that read it.
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    StopIteration,
    EOFError,
    ImportError,
    zlib.error,
)


# What libraries say of a file -> what to do.
REMEDIES = {
    "EOF inside string": "a quote is not closed: double the quotes of texts, or write the rows as json",
    "Not a gzipped file": "its content is not packed: name it without .gz, or get it again",
    "Unknown split": "set split to one of these",
}


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
    if dataset.streaming and section in dataset.train:
        return _open_stream(section, dataset)
    return _open(section, dataset, data_files(section.source))


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


def stream_rows(
    section: SourceSection, reader: int = 0, readers: int = 1, skip: int = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a source, one after the other, none of which is kept: what each is called, and its cells.

    Args:
        section: The source.
        reader: Which of the readers this is, from 0 on.
        readers: Among how many the rows are shared: whole parts of the data where their number can be divided, else
            one row after the other in turn.
        skip: How many of its rows the reader had already.

    Raises:
        UserError: It can't be read.
    """
    name, suffix = section.source, ""
    reading: list[Path] = []
    try:
        if files := data_files(name):
            suffix = suffix_of(files[0].name)
            if suffix in TEXTS:
                rows: Any = itertools.chain.from_iterable(_iterate_files(section, suffix, files, reading))
                for number, row in itertools.islice(enumerate(rows), reader + skip * readers, None, readers):
                    yield f"row {number + 1}", row
                return
            paths = [glob.escape(str(file)) for file in files]
            stream = load_dataset(BUILDERS[suffix], data_files=paths, split=section.split, streaming=True)
        elif is_saved(Path(name)):
            stream = load_saved(section).to_iterable_dataset()
        elif (suffix := suffix_of(name) if name.startswith(HUB) else "") in BUILDERS:
            data = {"data_files": [name], "split": section.split, **_options(section)}
            stream = load_dataset(BUILDERS[suffix], streaming=True, **data)
        else:
            stream = load_dataset(name, section.subset, split=section.split, revision=section.revision, streaming=True)
        if readers > 1 and stream.num_shards % readers == 0:
            part = f" of part {reader + 1} of {readers}"
            for number, row in enumerate(stream.shard(readers, reader).skip(skip), skip):
                yield f"row {number + 1}{part}", row
            return
        begin = reader + skip * readers
        for number, row in itertools.islice(enumerate(stream.skip(begin), begin), 0, None, readers):
            yield f"row {number + 1}", row
    except (DatasetsError, *UNREADABLE) as error:
        if isinstance(error, UserError):
            raise
        raise _explain_load_error(error, section, suffix, reading[-1] if reading else None) from error


def _iterate_files(
    section: SourceSection, suffix: str, files: list[Path], reading: list[Path]
) -> Iterator[Iterator[dict[str, Any]]]:
    """The rows of each file; adds the file that is read to `reading`."""
    options = (section.field, section.delimiter, section.encoding)
    for file in files:
        reading.append(file)
        yield _iterate_lines(file) if suffix == ".txt" else iterate_rows(file, *options)


def _iterate_lines(file: Path) -> Iterator[dict[str, Any]]:
    with open_text(file) as stream:
        yield from ({"text": line.rstrip("\r\n")} for line in stream)


def _open(
    section: SourceSection, dataset: DatasetSection, files: list[Path], streamed: Dataset | None = None
) -> Source:
    name, place = section.source, (*section.path, "source")
    suffix = suffix_of(files[0].name if files else name) if files or name.startswith(HUB) else ""
    parts: dict[Path, Dataset] = {}
    guesses: dict[str, None] = {}
    doubts: list[str] = []
    for file in files:
        part, guess, doubt = _read_file(file, section, dataset.format)
        parts |= {file: part} if len(part) else {}
        guesses |= {guess: None} if guess else {}
        doubts += [doubt] if doubt else []
    try:
        if streamed is not None:
            rows = streamed
        elif files:
            rows = _take(_join_parts(parts, section), section.split) if parts else Dataset.from_dict({})
        elif is_saved(Path(name)):
            rows = load_saved(section)
        elif suffix in BUILDERS:
            rows = load_dataset(BUILDERS[suffix], data_files=[name], split=section.split, **_options(section))
        else:
            rows = load_dataset(name, section.subset, split=section.split, revision=section.revision)
    except (DatasetsError, *UNREADABLE) as error:
        raise _explain_load_error(error, section, suffix) from error
    if not len(rows):
        under = f" under '{section.field}'" if section.field else ""
        raise user_error("empty-dataset", f"{name} has no rows{under}", path=place)
    if suffix == ".json" and not section.field and (way := _find_wrapping(rows, section, dataset.format)):
        found, fix = f"{name} is one object; its rows are the list '{'.'.join(way)}'", _reach(name, way)
        raise user_error("unreadable-data", found, fix, path=place)
    columns = choose_columns(section, dataset.format, rows[:FEW_ROWS])
    for file, part in parts.items():
        for role in FORMATS[dataset.format].required:
            if columns[role] not in part.column_names:
                found = (
                    f"{file} has no column '{columns[role]}' for the role '{role}', which other files of {name} have"
                )
                fix = f"its columns: {', '.join(part.column_names)}; name it as a source of its own, with columns"
                raise user_error("missing-column", found, fix, path=place)
    if not dataset.images and "images" not in section.columns:
        columns.pop("images", None)
    columns |= _hand_on(section, dataset.reward_columns, columns, rows.column_names)
    unused = [column for column in rows.column_names if column not in (*columns.values(), *dataset.ignore)]
    _refuse_lost_columns(section, dataset.format, rows.select_columns(unused))
    used = rows.select_columns(list(dict.fromkeys(columns.values())))
    if "images" in columns:
        used = keep_encoded(used, columns["images"])
    if files and suffix in (".json", ".jsonl"):
        used = _as_written(used, files, section)
    keys = {column: _turn_keys(used, column) for column in used.column_names}
    unused += [
        f"{column}.{key}"
        for column in keys
        for key in keys[column]
        if column not in (columns.get("tools"), columns.get("images"), *dataset.reward_columns)
        and key not in (*KNOWN_KEYS, *(SEGMENT_KEYS if column == columns.get("segments") else ()), *dataset.ignore)
    ]
    names = frozenset((*rows.column_names, *(key for column in keys.values() for key in column)))
    is_json = suffix in (".json", ".jsonl")  # which datasets 5.2 reads without giving an object keys that it has not
    filled = [] if is_json else [name for name in used.column_names if _has_objects(used.data.schema.field(name).type)]
    told = " or ".join(guesses)
    return Source(section, used, columns, tuple(unused), names, frozenset(filled), told, "; ".join(doubts[:1]))


def _options(section: SourceSection) -> dict[str, Any]:
    """What a source says of how its files are written, as datasets' builders take it."""
    said = {"sample_by": section.sample_by, "field": section.field}
    said |= {"sep": section.delimiter, "encoding": section.encoding}
    return {key: value for key, value in said.items() if value is not None}


def _read_file(file: Path, section: SourceSection, form: str) -> tuple[Dataset, str, str]:
    """The rows of a file, all of them; what was guessed of how it is written; and what of it is doubtful.

    Raises:
        UserError: It can't be read.
    """
    place, suffix = (*section.path, "source"), suffix_of(file.name)
    options, guessed, doubt = _options(section), "", ""
    try:
        # datasets takes what is left of a file of zstandard's for all of it
        if file.suffix.lower() == ".zst" and (found := _find_cut(file)):
            raise user_error("unreadable-data", found, "get it again", path=place)
        if suffix in (".json", ".jsonl", ".txt") and (found := _look_at_begin(file, suffix)):
            raise user_error("unreadable-data", found, path=place)
        if section.field and any(wrong := _find_field(file, section.field)):
            raise user_error("unreadable-data", *wrong, path=(*section.path, "field"))
        with warnings.catch_warnings():  # pandas has another reader for delimiters that are not ASCII, and says so
            warnings.filterwarnings("ignore", "Falling back to the 'python' engine")
            if BUILDERS[suffix] == "csv":  # every cell is a text, as it is written: 01000, 1.50, NA, true
                features, writing = _csv_features(file, section, form)
                options |= {"features": features, "na_filter": False}
                options |= {"sep": writing.delimiter, "encoding": writing.encoding}
                guessed, doubt = writing.guessed, _find_odd_quotes(file, writing, len(features))
            rows = load_dataset(BUILDERS[suffix], data_files=[glob.escape(str(file))], split="train", **options)
        rows.data.table.validate(full=True)  # pyarrow reads JSON without looking at its bytes
    except (DatasetsError, *UNREADABLE) as error:
        if not isinstance(error, UserError) and _is_without_rows(file, section):
            return Dataset.from_dict({}), "", ""
        raise _explain_load_error(error, section, suffix, file) from error
    return rows, guessed, doubt


def _is_without_rows(file: Path, section: SourceSection) -> bool:
    """Whether a file that can't be loaded is one without rows: libraries say this in many words."""
    try:
        if suffix_of(file.name) in TEXTS:
            return next(iterate_rows(file, section.field, section.delimiter, section.encoding), None) is None
        look = look_at([file])
    except (*UNREADABLE, csv.Error):
        return False
    return look is not None and not look.rows


def _join_parts(parts: dict[Path, Dataset], section: SourceSection) -> Dataset:
    """The rows of several files. A column that a file lacks is null there.

    Raises:
        UserError: A column has one type in one file, and another in another.
    """
    kinds: dict[str, dict[str, Path]] = {}  # column -> its types, and the first file that has each
    for file, part in parts.items():
        for name, kind in part.features.items():
            kinds.setdefault(name, {}).setdefault(str(kind), file)
    several = [name for name, found in kinds.items() if len(found.keys() - {str(Value("null"))}) > 1]
    if not several:
        return concatenate_datasets(list(parts.values()))
    if suffix_of(next(iter(parts)).name) in (".json", ".jsonl"):
        return concatenate_datasets([_as_json(part, several, file, section.field) for file, part in parts.items()])
    types: dict[str, Any] = {}
    for name in several:
        fields = [pa.schema([part.data.schema.field(name)]) for part in parts.values() if name in part.column_names]
        try:  # objects that have other keys get each other's, as null
            types[name] = pa.unify_schemas(fields, promote_options="permissive").field(name).type
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            (kind, first), (other, file), *_ = kinds[name].items()
            found = f"the column '{name}' of {file} is {other}, and that of {first} is {kind}"
            fix = "make them alike, or name the files as sources of a mixture"
            raise user_error("unreadable-data", found, fix, path=(*section.path, "source")) from error
    merged = Features.from_arrow_schema(pa.schema(list(types.items())))
    alike = [
        part.cast(Features({name: merged.get(name, kind) for name, kind in part.features.items()}))
        for part in parts.values()
    ]
    return concatenate_datasets(alike)


def _as_json(part: Dataset, names: list[str], file: Path, field: str | None) -> Dataset:
    """Rows of a JSON file whose columns of some names may hold anything, as they do within one file."""
    cells: dict[str, list[str | None]] = {name: [] for name in names if name in part.column_names}
    for row in iterate_rows(file, field):
        for name, column in cells.items():
            column.append(None if row.get(name) is None else json.dumps(row[name]))
    made = Dataset(pa.table({name: pa.array(column, pa.json_()) for name, column in cells.items()}))
    kept = part.select_columns([name for name in part.column_names if name not in cells])
    return concatenate_datasets([kept, made] if kept.column_names else [made], axis=1) if cells else part


def _take(rows: Dataset, split: str) -> Dataset:
    """The rows of a slice: `train[:5%]`.

    Raises:
        ValueError: It is none.
    """
    if split == "train":
        return rows
    parts = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    return concatenate_datasets([rows.select(range(part.from_, part.to)) for part in parts])


def load_saved(section: SourceSection) -> Dataset:
    """A folder that datasets saved: one split, or several, of which the recipe names one.

    Raises:
        UserError: One of its files is missing or cut off.
        ValueError: There is no such split.
    """
    if found := _find_lost_shard(Path(section.source)):
        raise user_error("unreadable-data", found, "get it again", path=(*section.path, "source"))
    loaded = load_from_disk(section.source)
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
    parts = ReadInstruction.from_spec(section.split).to_absolute({name: len(rows) for name, rows in splits.items()})
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _find_lost_shard(folder: Path) -> str:
    """Which file of a folder that datasets saved is not there, or not whole; empty when all are."""
    for state in sorted(folder.rglob(SAVED[0])):
        try:
            names = [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
        except (ValueError, LookupError, TypeError) as error:
            return f"{state} is not as datasets writes it: {type(error).__name__}: {first_line(error)}"
        for file in (state.parent / name for name in names):
            if not file.is_file():
                return f"{file} is missing: {state} lists it"
            try:
                with pa.memory_map(str(file)) as stream:
                    pa.ipc.open_stream(stream).read_all()
                    ended = stream.read_at(4, stream.size() - 4) == bytes(4)
            except (pa.ArrowException, OSError) as error:
                return f"{file} is cut off, or damaged: {first_line(error)}"
            if not ended:
                return f"{file} is cut off: the mark of its end is missing"
    return ""


def _csv_features(file: Path, section: SourceSection, form: str) -> tuple[Features, Writing]:
    """A text for each column of the header, and how the file is written.

    pandas takes the first column for an index where rows have one field more.

    Raises:
        UserError: The first row has more fields than the header, or the delimiter is another.
    """
    writing = find_writing(file, section.delimiter, section.encoding)
    with open_text(file, writing.encoding, newline="") as stream:
        line = stream.readline().rstrip("\r\n")
    if line.startswith("sep=") and len(line) < len("sep=") + 3:
        found, fix = f"{file} begins with '{line}', a line that only Excel knows", "remove the line"
        raise user_error("unreadable-data", found, fix, path=(*section.path, "source"))
    columns = split_line(line, writing.delimiter)
    if other := _find_delimiter(line, writing.delimiter, section, form):
        what = "one column" if len(columns) == 1 else f"the columns {', '.join(columns)}"
        shown, names = "\\t" if other == "\t" else other, ", ".join(split_line(line, other))
        raise user_error(
            "unreadable-data",
            f"{file} has {what}, read with the delimiter '{writing.delimiter}'",
            f'set delimiter: "{shown}", which gives {names}',
            path=(*section.path, "delimiter"),
        )
    with open_text(file, writing.encoding, newline="") as stream:
        head = pd.read_csv(stream, nrows=1, dtype=str, sep=writing.delimiter)
    if not isinstance(head.index, pd.RangeIndex):
        fields = len(head.columns) + head.index.nlevels
        message = f"{file}: row 1 has {fields} fields, the header has {len(head.columns)}"
        fix = "quote texts with commas, or add the header's names"
        raise user_error("unreadable-data", message, fix, path=(*section.path, "source"))
    return Features({str(column): Value("string") for column in head.columns}), writing


def _find_odd_quotes(file: Path, writing: Writing, width: int) -> str:
    """Where a quote of a csv file seems to be meant as text, and takes rows into a cell; empty where none does.

    A cell that swallowed rows has, in each of its lines, as many delimiters as its column and the number of columns ask
    for; after a comma of a text there is a space, mostly.
    """
    csv.field_size_limit(sys.maxsize)
    mark, begin = writing.delimiter, 1
    try:
        with open_text(file, writing.encoding, newline="") as stream:
            reader = csv.reader(stream, delimiter=mark, strict=True)
            for row in reader:
                for column, cell in enumerate(row) if "\n" in "".join(row) else ():
                    marks = [line.count(mark) for line in cell.split("\n")]
                    of_rows = [width - 1 - column, *[width - 1] * (len(marks) - 2), column]
                    if len(marks) > 1 and any(marks) and marks == of_rows and f"{mark} " not in cell:
                        lines = f"lines {begin} to {reader.line_num}"
                        return f"{file}: a quote makes one cell of {lines}, which look like {len(marks)} rows"
                begin = reader.line_num + 1
    except csv.Error as error:
        if "expected after" in str(error):
            return f"{file}: line {reader.line_num}: text follows a closing quote, and the quotes are left out"
    except (TypeError, ValueError):
        pass  # a delimiter of several characters; bytes that are no text: said where rows are read
    return ""


def _find_delimiter(line: str, used: str, section: SourceSection, form: str) -> str | None:
    """The delimiter that gives a header the columns of the format, where the one that was used does not.

    That may be any character of the header. Else, of a header that is one column, the usual one that gives it most, if
    these look like names.
    """
    wanted = [
        {section.columns.get(role)} if role in section.columns else {*names_of(role)} for role in FORMATS[form].required
    ]
    others = sorted({mark for mark in line if not mark.isalnum() and mark.isprintable() and mark not in "_\"'"})
    cells = {mark: split_line(line, mark) for mark in (used, *DELIMITERS, *others)}
    fitting = [mark for mark in cells if all(names & set(cells[mark]) for names in wanted)]
    if fitting:
        return None if used in fitting else fitting[0]
    strange = {*DELIMITERS, '"', "'", "\ufeff"}
    clean = [
        mark
        for mark in DELIMITERS
        if mark != used and all(cell.strip() and not strange & set(cell) for cell in cells[mark])
    ]
    most = max(clean, key=lambda mark: len(cells[mark]), default=used)
    return most if len(cells[used]) == 1 < len(cells[most]) else None


def _as_written(rows: Dataset, files: list[Path], section: SourceSection) -> Dataset:
    """Columns of JSON files without what pyarrow makes of them: texts that look like dates, 1 beside 2.5 as 1.0."""
    changed = [name for name in rows.column_names if _retypes(rows.data.schema.field(name).type)]
    if not changed:
        return rows
    cells: dict[str, list[Any]] = {name: [] for name in changed}
    for row in itertools.chain.from_iterable(iterate_rows(file, section.field) for file in files):
        for name in changed:
            value = row.get(name)
            cells[name].append(json.dumps(value) if isinstance(value, int | float) else value)
    written = _take(Dataset.from_dict(cells), section.split)
    kept = [name for name in rows.column_names if name not in changed]
    return concatenate_datasets([rows.select_columns(kept), written], axis=1) if kept else written


def _retypes(kind: pa.DataType) -> bool:
    """Whether pyarrow's JSON reader may have made something else of what was written, somewhere in a column."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _retypes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(pa.types.is_temporal(field.type) or _retypes(field.type) for field in kind)
    return bool(pa.types.is_temporal(kind) or pa.types.is_floating(kind))


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


def _turn_keys(rows: Dataset, column: str) -> list[str]:
    """Keys of the turns of a column of turns: of all rows where the column has one type, else of the first thousand."""
    turns = getattr(rows.features[column], "feature", rows.features[column])
    if isinstance(turns, dict):
        return list(turns)
    if isinstance(turns, Value):
        return []
    cells = [cell for cell in rows[:1000][column] if isinstance(cell, list)]
    return list(dict.fromkeys(key for cell in cells for turn in cell if isinstance(turn, dict) for key in turn))


def order_rows(
    dataset: DatasetSection, sources: list[Source], seed: int, lengths: Sequence[float] = ()
) -> dict[str, np.ndarray]:
    """Which rows are trained on and which are held out, in which order, by the recipe's seed.

    Only numbers are shuffled, split and mixed here (by `datasets`' own functions), so that the first rows are known
    without reading all.

    Args:
        dataset: For weights, epochs and what is held out.
        sources: Opened, those of the training data first.
        seed: Of shuffles and splits.
        lengths: Mean tokens of a row of each training source, where weights are shares of tokens.

    Returns:
        `train` and, when the recipe evaluates, `eval`: arrays `(rows, 2)` of source and row in it.

    Raises:
        UserError: A source is too small to be split.
    """
    indices = []
    for number, source in enumerate(sources):
        rows = Dataset.from_dict({"source": np.full(len(source.rows), number), "row": np.arange(len(source.rows))})
        if limit := source.section.limit:
            rows = rows.shuffle(seed=seed).select(range(min(limit, len(rows))))
        indices.append(rows)
    train, evaluation = indices[: len(dataset.train)], indices[len(dataset.train) :]
    if dataset.fraction is not None:
        # Split before mixing: mixing repeats rows, and a repeated row may not be on both sides.
        if min(len(rows) for rows in train) < 2:
            raise user_error("empty-dataset", "a source has one row: none can be held out", path=("dataset", "eval"))
        sizes = [max(1, round(len(rows) * dataset.fraction)) for rows in train]
        if any(size >= len(rows) for size, rows in zip(sizes, train, strict=True)):
            message = f"{dataset.fraction:g} of {min(map(len, train))} rows are all of them: none is left to train on"
            raise user_error("empty-dataset", message, "hold out less", path=("dataset", "eval"))
        parts = [rows.train_test_split(size, seed=seed) for rows, size in zip(train, sizes, strict=True)]
        train, evaluation = [part["train"] for part in parts], [part["test"] for part in parts]
    weights = [source.weight for source in dataset.train if source.weight is not None]
    if len(train) > 1 and weights:
        weights = [weight / length for weight, length in zip(weights, lengths or [1.0] * len(weights), strict=True)]
        shares = [weight / sum(weights) for weight in weights]
        needed, there = max(len(rows) / share for rows, share in zip(train, shares, strict=True)), sum(map(len, train))
        if needed > MOST_REPEATS * there:
            message = f"with these weights, {needed:,.0f} rows are drawn until each of {there:,} was seen"
            raise user_error("mixture-weight", message, "take weights that differ less", path=("dataset", "train"))
        mixed = interleave_datasets(train, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    else:
        taken = zip(train, dataset.train, strict=True)
        mixed = concatenate_datasets([_repeat(rows, source.epochs, seed) for rows, source in taken])
    orders = {"train": mixed} | ({"eval": concatenate_datasets(evaluation)} if evaluation else {})
    return {split: _as_array(rows) for split, rows in orders.items()}


def _repeat(rows: Dataset, epochs: float | None, seed: int) -> Dataset:
    """Rows as often as a source says: `2.5` is twice all, and half of them once more."""
    if epochs is None:
        return rows
    whole, rest = divmod(epochs, 1)
    if not round(epochs * len(rows)):
        message = f"{epochs:g} epochs of {len(rows)} rows are none"
        raise user_error("mixture-weight", message, "take more, or leave the source out", path=("dataset", "train"))
    more = rows.shuffle(seed=seed).select(range(round(rest * len(rows))))
    return concatenate_datasets([*[rows] * int(whole), more])


def _as_array(rows: Dataset) -> np.ndarray:
    columns = rows.with_format("numpy")[:]
    return np.stack([columns["source"], columns["row"]], axis=1)


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
        batch = source.rows[order[places, 1].tolist()]
        cells = {role: batch[column] for role, column in source.columns.items()}
        cells |= {role: _drop_nulls(cells[role]) for role, column in source.columns.items() if column in source.filled}
        if suffix_of(source.name) in (".csv", ".tsv") and "label" in cells:  # whose cells are texts
            cells["label"] = [{"true": True, "false": False}.get(cell.lower(), cell) for cell in cells["label"]]
        for place, *values in zip(places.tolist(), *cells.values(), strict=True):
            row = dict(zip(cells, values, strict=True))
            try:
                rows[place] = normalise_row(row, dataset, f"{source.name}: {source.call_row(order[place, 1])}")
                if pictures := rows[place].get("images"):
                    rows[place]["images"] = locate(pictures, source.name, dataset.image_folder)
            except RowError as error:
                raise user_error("wrong-row-shape", str(error), path=source.path) from error
    return rows


def _find_wrapping(rows: Dataset, section: SourceSection, form: str) -> list[str]:
    """The keys under which a JSON file of one object has its rows; none where it is no such file."""
    roles = FORMATS[form].roles
    if len(rows) > 1 or {*roles, *section.columns.values(), "conversations"} & set(rows.column_names):
        return []
    return _find_rows(rows[0])


def _find_rows(value: Any) -> list[str]:
    """The keys under which an object has a list of objects, the fewest; none where it has none."""
    if not isinstance(value, dict):
        return []
    for key, entry in value.items():
        if isinstance(entry, list) and entry and isinstance(entry[0], dict):
            return [key]
    return next(([key, *keys] for key, entry in value.items() if (keys := _find_rows(entry))), [])


def _reach(name: str, keys: Sequence[str]) -> str:
    """How the rows under some keys of a JSON file are reached."""
    if len(keys) == 1:
        return f"set field: {write_scalar(keys[0])}"
    return (
        f"`field` reaches one key deep: write the list as a file of its own (jq '.{'.'.join(keys)}' {name} > rows.json)"
    )


def choose_columns(section: SourceSection, form: str, head: Columns) -> dict[str, str]:
    """Maps each role of the format to a column that the data has.

    Args:
        section: The source.
        form: The format.
        head: Column -> its cells in the first rows.

    Raises:
        UserError: Columns are missing; the message lists those there are, and says which may be meant.
    """
    given, available = section.columns, list(head)
    taken = set(given.values())
    columns = {}
    for role in FORMATS[form].roles:
        names = (role, *OTHER_NAMES.get(role, ()))
        found = (name for name in names if name in available and name not in taken)
        column = given.get(role, next(found, role if role in FORMATS[form].required else None))
        if column or role in FORMATS[form].required:
            columns[role] = column or role
            taken.add(columns[role])
    answers = head.get(columns.get("completion", ""), ())
    if form == "unpaired_preference" and "prompt" not in columns and not any(isinstance(of, list) for of in answers):
        columns["prompt"] = "prompt"  # which only whole conversations do without
    if missing := [role for role, column in columns.items() if column not in available]:
        there = f"its columns: {', '.join(available)}"
        told = " and ".join(f"no column '{columns[role]}' for the role '{role}'" for role in missing)
        right = {role: column for role, column in columns.items() if role not in missing and role in given}
        meant = find_columns(form, head, right)[0]
        meant |= {role: near[0] for role in missing if (near := nearest(columns[role], available))}
        wanted = ", ".join(f"{role}: {write_scalar(meant.get(role, 'NAME'))}" for role in missing)
        at: KeyPath = (*section.path, "columns", missing[0])
        message, fix = f"{section.source} has {told}; {there}", f"set columns: {{{wanted}}}"
        other = guess_format(head)
        if other in JUDGED and form in JUDGED and other != form and set(FORMATS[str(other)].required) <= set(available):
            stages = [stage for stage in STAGES if other in formats_of(stage)]
            fix = f"its rows are of format: {other}, for stage {' or '.join(stages)}"
        raise user_error("missing-column", message, fix, path=at)
    for role, column in columns.items():
        if shared := next((other for other in columns if other != role and columns[other] == column), None):
            message = f"the roles '{role}' and '{shared}' have the same column '{column}'"
            place = ("columns", role if role in given else shared)
            raise user_error("wrong-column-role", message, "name another column", path=(*section.path, *place))
    return columns


JUDGED = ("preference", "unpaired_preference")  # formats that are taken for each other

# What a reward function is given by the trainer itself. Source: TRL 1.16, GRPOTrainer._calculate_rewards.
GIVEN = ("prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def _hand_on(
    section: SourceSection, wanted: Sequence[str], columns: dict[str, str], available: Sequence[str]
) -> dict[str, str]:
    """The columns that rewards are given, each by its own name.

    Raises:
        UserError: The source does not have one, or its name is taken.
    """
    for number, name in enumerate(wanted):
        place: KeyPath = ("dataset", "reward_columns", number)
        if name not in available:
            fix = suggest(name, available) or f"its columns: {', '.join(available)}"
            raise user_error("missing-column", f"{section.source} has no column '{name}'", fix, path=place)
        if name in (*columns, *GIVEN, "dropped", "noted", "tools"):
            what = f"a role of this format (columns: {{{name}: {columns[name]}}})" if name in columns else "taken"
            raise user_error("wrong-column-role", f"the name '{name}' is {what}", "rename the column", path=place)
    return {name: name for name in wanted}


def _refuse_lost_columns(section: SourceSection, form: str, unused: Dataset) -> None:
    """Refuses to leave out a column of known meaning that says something.

    Raises:
        UserError: There is one that is neither used nor, in `columns` or `dataset.ignore`, said to be left out.
    """
    roles = FORMATS[form].roles
    for name in unused.column_names:
        known = name if name in MEANINGS else misspelt(name, tuple(MEANINGS))
        if not known or (name in section.columns and section.columns[name] is None):
            continue
        if known == "label" and getattr(unused.features[name], "dtype", "") != "bool":
            continue  # a class, of data for a classifier
        values = unused.data.column(name)
        texts = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
        if any(says_something(value) for value in (values.unique() if texts else values).to_pylist()):
            role = MEANINGS[known] or known
            message = f"{section.source} has a column '{name}', which format {form} does not use: it would be lost"
            fix = f"set columns: {{{role}: {name}}}, or" if name != role and role in roles else "remove it, or"
            if known in ("image", "images") and "images" in roles:
                fix = "set dataset.images: marked (or first) to train on them, or"
            path = (*section.path, "columns") if section.columns else (*section.path, "source")
            raise user_error("unused-column", message, f"{fix} list it in dataset.ignore: [{name}]", path=path)


def check_streamed_row(
    dataset: DatasetSection, source: Source, known: frozenset[str], row: Mapping[str, Any], called: str
) -> None:
    """Checks the columns of a row that came after those by which the source's columns were chosen.

    Args:
        dataset: The section.
        source: The source, with its first rows.
        known: The columns of these.
        row: The row, by column.
        called: What the row is called.

    Raises:
        UserError: It lacks a column that is needed, or has one that says something and would be lost.
    """
    roles = FORMATS[dataset.format].roles
    for role in FORMATS[dataset.format].required:
        if source.columns.get(role) not in (None, *row):
            message = f"{source.name}: {called} has no column '{source.columns[role]}'; its columns: {', '.join(row)}"
            raise user_error("missing-column", message, "fix the file, or leave it out", path=source.path)
    for name in row.keys() - known:
        meant = name in MEANINGS or any(name in (role, *OTHER_NAMES.get(role, ())) for role in roles)
        given = source.section.columns
        left_out = name in dataset.ignore or (name in given and given[name] is None)
        if meant and not left_out and says_something(row[name]):
            message = (
                f"{source.name}: {called} has a column '{name}', which none of the first rows has: it would be lost"
            )
            fix = "bring such rows among the first 1,000, or list the column in dataset.ignore"
            raise user_error("unused-column", message, fix, path=source.path)


def _explain_load_error(error: Exception, section: SourceSection, suffix: str, file: Path | None = None) -> UserError:
    """Says which line of a local file is at fault, or why a hub dataset can't be loaded."""
    name, place = str(file or section.source), (*section.path, "source")
    if isinstance(error, UserError):
        return error
    if any(isinstance(cause, ImportError) for cause in _causes(error)):
        return user_error("missing-package", f"{name} is compressed by zstandard", "pip install zstandard", path=place)
    if file:
        if found := _find_cut(file):
            return user_error("unreadable-data", found, "get it again", path=place)
        if suffix in TEXTS and not isinstance(error, OSError):
            found, fix = _find_bad_bytes(file, section.encoding)
            at: KeyPath = (*section.path, "encoding") if section.encoding else place
            if found:
                return user_error("unreadable-data", found, fix, path=at)
        if suffix in (".json", ".jsonl") and not section.field and (found := _find_bad_json(file)):
            return user_error("unreadable-data", found, "fix the file", path=place)
    root = _causes(error)[-1] if suffix in BUILDERS else error
    if (
        isinstance(root, OSError)
        and root.errno not in FULL
        and root.filename
        and Path(str(root.filename)) not in (Path(name), file)
    ):
        message = f"{root.filename}: {root.strerror}"
        raise user_error("input-output", message, "prepared data and Hugging Face's caches are kept there (HF_HOME)")
    if isinstance(root, OSError) and root.errno in FULL:
        return disk_full(root.errno, Path(root.filename or HF_DATASETS_CACHE), "prepared data is kept there (HF_HOME)")
    what = first_line(root)
    if file or is_file_source(name):
        if what.startswith("Unknown split"):
            place = (*section.path, "split")
        fix = next((fix for said, fix in REMEDIES.items() if said in what), "")
        if suffix in (".parquet", ".arrow"):
            fix = f"it is cut off, or no {suffix.removeprefix('.')} file: get it again"
        return user_error("unreadable-data", f"cannot read {name}: {what}", fix, path=place)
    hint = "check the id, subset and split, and the network; or use a local file"
    return user_error("dataset-unavailable", f"cannot load the dataset '{name}': {what}", hint, path=place)


def _causes(error: BaseException) -> list[BaseException]:
    """An error, and those that it came from."""
    found = [error]
    while cause := found[-1].__cause__ or found[-1].__context__:
        found.append(cause)
    return found


def _find_cut(file: Path) -> str:
    """What is wrong with a compressed file; empty when nothing is."""
    if file.suffix.lower() not in UNPACKED:
        return ""
    size = 0
    try:
        with open_bytes(file) as stream:
            while part := stream.read(1 << 16):
                size += len(part)
    except EOFError:
        return f"{file} is cut off: {size:,} bytes can be unpacked, and its end is missing"
    except (OSError, zlib.error) as error:
        return f"{file} can't be unpacked: {first_line(error)}"
    return ""


def _find_field(file: Path, field: str) -> tuple[str, str]:
    """Why a json file has no rows under a key, and what to do; empty when it has."""
    try:
        with open_text(file) as stream:
            whole = json.load(stream)
    except json.JSONDecodeError as error:
        return f"{file}: line {error.lineno}, column {error.colno}: {error.msg}", "fix the file"
    except (*UNREADABLE, RecursionError):
        return "", ""  # said where it is read
    if isinstance(whole, list):
        return f"{file} is a list of rows, and no object with a key '{field}'", "leave field out"
    if not isinstance(whole, dict):
        return f"{file} is no object with a key '{field}', but a value", "fix the file"
    if isinstance(whole.get(field), list):
        return "", ""
    keys = _find_rows(whole)
    what = f": it is {describe_value(whole[field])}" if field in whole else ""
    lists = ", ".join(key for key, value in whole.items() if isinstance(value, list))
    what += f"; its lists: {lists}" * bool(lists) + f"; its rows are deeper, in '{'.'.join(keys)}'" * (len(keys) > 1)
    fix = _reach(str(file), keys) if keys else "write its rows as a list: [{...}, {...}]"
    return f"{file} has no list '{field}'{what}", fix


def _look_at_begin(file: Path, suffix: str) -> str:
    """What keeps a file from being read at all; empty when nothing does.

    pyarrow 25 ends the process (segmentation fault) where the first row of a JSON file is null.
    """
    try:
        with open_bytes(file) as stream:
            begin = stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        found = f"cannot read {file}: {error.strerror or first_line(error)}"
        return found + f"; {REMEDIES['Not a gzipped file']}" * ("Not a gzipped file" in found)
    except (EOFError, ImportError):
        return ""  # said where it is read
    if begin[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return f"{file} is UTF-16; save it as UTF-8"
    packed = next((suffix for suffix, mark in PACKED.items() if begin.startswith(mark)), "")
    if packed and file.suffix.lower() not in UNPACKED:
        return f"{file} is compressed; rename it to {file.name}{packed}"
    row = begin.lstrip()
    row = row[1:].lstrip() if row[:1] == b"[" else row  # one list of rows
    if suffix in (".json", ".jsonl") and row and row[:1] not in (b"{", b"]"):
        return f"{file}: the first row is not a JSON object; fix the file"
    return ""


def _find_bad_bytes(file: Path, encoding: str | None) -> tuple[str, str]:
    """Where a text file is not in its encoding, and what to do; empty where it is."""
    try:
        known = codecs.lookup(encoding or "utf-8").name
    except LookupError:
        return f"there is no encoding '{encoding}'", "set encoding to a name that Python knows (utf-8, cp1252, ...)"
    with open_bytes(file) as stream:
        content = stream.read()
    try:
        content.decode(known)
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, f"byte 0x{content[error.start]:02x}"
        found = f"{file}: line {line}: {byte} is not {known.upper()}{' (Latin-1 or cp1252?)' * (encoding is None)}"
        if suffix_of(file.name) not in (".csv", ".tsv"):
            return found, "save the file as UTF-8"
        return found, "set encoding in the source to what it is (utf-8, cp1252, cp1251, shift_jis, gb18030, ...)"
    return "", ""


def _find_bad_json(file: Path) -> str:
    """Where a JSON or JSON-lines file stops being one; empty when every row is an object."""
    with open_text(file, "utf-8") as stream:
        whole = stream.read(1) == "["
        stream.seek(0)
        number = 0
        try:
            if whole:
                wrong = [at for at, row in enumerate(read_json(stream.read()), 1) if not isinstance(row, dict)]
                return f"{file}: item {wrong[0]} is not a JSON object" if wrong else ""
            for number, line in enumerate(stream, 1):
                if line.strip() and not isinstance(read_json(line.rstrip()), dict):
                    return f"{file}: line {number} is not a JSON object"
        except json.JSONDecodeError as error:
            return f"{file}: line {error.lineno if whole else number}, column {error.colno}: {error.msg}"
        except ValueError as error:
            return f"{file}: {'' if whole else f'line {number}: '}{error}"
    return ""
