"""Rows as they are in files, in folders that datasets saved, and on the hub: all of them, or one after the other."""

import csv
import glob
import itertools
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from recipe_runner.data.damage import (
    UNREADABLE,
    explain_load_error,
    find_cut,
    find_field,
    find_wrapping,
    look_at_begin,
    reach,
)
from recipe_runner.data.look import iterate_rows, look_at
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.recipe.local import (
    BUILDERS,
    DELIMITERS,
    HUB,
    SAVED,
    TEXTS,
    Writing,
    data_files,
    find_writing,
    is_saved,
    open_text,
    split_line,
    suffix_of,
)
from recipe_runner.recipe.new import names_of
from recipe_runner.recipe.sections import SourceSection
from recipe_runner.stages import FORMATS


@dataclass(frozen=True)
class Read:
    """All rows of a source.

    Attributes:
        rows: With all their columns.
        parts: The rows of each file that has some, where it is of files.
        guessed: What was guessed of how it is written, for people.
        doubt: What of its rows may not be as they were meant, for people.
        suffix: Of its files, here or on the hub; empty where it is of none.
    """

    rows: Dataset
    parts: dict[Path, Dataset] = field(default_factory=dict)
    guessed: str = ""
    doubt: str = ""
    suffix: str = ""


def find_suffix(section: SourceSection, files: list[Path]) -> str:
    """The suffix of a source's files, here or on the hub; empty where it is of none."""
    name = section.source
    return suffix_of(files[0].name if files else name) if files or name.startswith(HUB) else ""


def load_rows(section: SourceSection, files: list[Path], form: str) -> Read:
    """All rows of a source, memory-mapped.

    Args:
        section: The source.
        files: Its files; none where it is on the hub, or a folder that datasets saved.
        form: The format of its rows, for what is said of them.

    Raises:
        UserError: It can't be read, or has no rows.
    """
    name, place = section.source, (*section.path, "source")
    suffix = find_suffix(section, files)
    parts: dict[Path, Dataset] = {}
    guesses: dict[str, None] = {}
    doubts: list[str] = []
    for file in files:
        part, guess, doubt = _read_file(file, section, form)
        parts |= {file: part} if len(part) else {}
        guesses |= {guess: None} if guess else {}
        doubts += [doubt] if doubt else []
    try:
        if files:
            rows = _take(_join_parts(parts, section), section.split) if parts else Dataset.from_dict({})
        elif is_saved(Path(name)):
            rows = load_saved(section)
        elif suffix in BUILDERS:
            rows = load_dataset(BUILDERS[suffix], data_files=[name], split=section.split, **_options(section))
        else:
            rows = load_dataset(name, section.subset, split=section.split, revision=section.revision)
    except (DatasetsError, *UNREADABLE) as error:
        raise explain_load_error(error, section, suffix) from error
    if not len(rows):
        under = f" under '{section.field}'" if section.field else ""
        raise user_error("empty-dataset", f"{name} has no rows{under}", path=place)
    if suffix == ".json" and not section.field and (way := find_wrapping(rows, section, form)):
        found, fix = f"{name} is one object; its rows are the list '{'.'.join(way)}'", reach(name, way)
        raise user_error("unreadable-data", found, fix, path=place)
    return Read(rows, parts, " or ".join(guesses), "; ".join(doubts[:1]), suffix)


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
        raise explain_load_error(error, section, suffix, reading[-1] if reading else None) from error


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
        if file.suffix.lower() == ".zst" and (found := find_cut(file)):
            raise user_error("unreadable-data", found, "get it again", path=place)
        if suffix in (".json", ".jsonl", ".txt") and (found := look_at_begin(file, suffix)):
            raise user_error("unreadable-data", found, path=place)
        if section.field and any(wrong := find_field(file, section.field)):
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
        raise explain_load_error(error, section, suffix, file) from error
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


def as_written(rows: Dataset, files: list[Path], section: SourceSection) -> Dataset:
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
