"""Why data can't be read, and what to do: files that are cut off, in another encoding, of another layout."""

import codecs
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.config import HF_DATASETS_CACHE

from recipe_runner.data.turns import describe_value, read_json
from recipe_runner.files import FULL, disk_full
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.problems.problem import KeyPath
from recipe_runner.recipe.document import write_scalar
from recipe_runner.recipe.local import BUILDERS, TEXTS, UNPACKED, is_file_source, open_bytes, open_text, suffix_of
from recipe_runner.recipe.sections import SourceSection
from recipe_runner.stages import FORMATS

PACKED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}  # how such files begin
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


def explain_load_error(error: Exception, section: SourceSection, suffix: str, file: Path | None = None) -> UserError:
    """Says which line of a local file is at fault, or why a hub dataset can't be loaded."""
    name, place = str(file or section.source), (*section.path, "source")
    if isinstance(error, UserError):
        return error
    if any(isinstance(cause, ImportError) for cause in _causes(error)):
        return user_error("missing-package", f"{name} is compressed by zstandard", "pip install zstandard", path=place)
    if file:
        if found := find_cut(file):
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


def find_cut(file: Path) -> str:
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


def find_field(file: Path, field: str) -> tuple[str, str]:
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
    fix = reach(str(file), keys) if keys else "write its rows as a list: [{...}, {...}]"
    return f"{file} has no list '{field}'{what}", fix


def find_wrapping(rows: Dataset, section: SourceSection, form: str) -> list[str]:
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


def reach(name: str, keys: Sequence[str]) -> str:
    """How the rows under some keys of a JSON file are reached."""
    if len(keys) == 1:
        return f"set field: {write_scalar(keys[0])}"
    return (
        f"`field` reaches one key deep: write the list as a file of its own (jq '.{'.'.join(keys)}' {name} > rows.json)"
    )


def look_at_begin(file: Path, suffix: str) -> str:
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
