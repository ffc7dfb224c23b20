"""Local data: which files a source names, and how each is read. Nothing of the training stack is imported."""

import codecs
import csv
import glob
import gzip
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

# Suffix of a local data file -> the builder of `datasets` that reads it.
BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
TEXTS = (".json", ".jsonl", ".csv", ".tsv", ".txt")
UNPACKED = (".gz", ".zst")  # compressed texts that are read as they are
COMPRESSED = {".zip": "unzip", ".xz": "unxz", ".bz2": "bunzip2"}  # and what unpacks others
MARKS = "*?["  # of a pattern
SAVED = ("state.json", "dataset_dict.json")  # in a folder that `Dataset.save_to_disk` wrote
HUB = "hf://"
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
UNSURE = "cp1252"  # what is taken for the encoding of bytes that are no UTF: Windows' for western languages
LOOKED_AT = 1 << 16  # bytes that say how a file is written


def looks_local(name: str) -> bool:
    """Whether a name is written as a path: ./x, ../x, /x, ~x."""
    return name.startswith(("./", "../", "/", "~")) or name in (".", "..")


def is_file_source(name: str) -> bool:
    """Whether a data source is local rather than a hub id: a file, a pattern, or a folder that ends with `/`."""
    if "://" in name:  # the hub's, or an address, from which nothing is read
        return False
    return looks_local(name) or suffix_of(name) in BUILDERS or name.endswith("/") or is_pattern(name)


def is_pattern(name: str) -> bool:
    """Whether a name stands for several files; a file of that very name is itself."""
    return any(mark in name for mark in MARKS) and not Path(name).exists()


def suffix_of(name: str) -> str:
    """The suffix that says what is in a file: of `rows.jsonl.gz` it is `.jsonl`."""
    path = Path(name.rstrip("/"))
    return (Path(path.stem).suffix if path.suffix.lower() in UNPACKED else path.suffix).lower()


def is_saved(folder: Path) -> bool:
    """Whether a folder is one that `Dataset.save_to_disk` wrote."""
    return any((folder / name).is_file() for name in SAVED)


def list_saved(folder: Path) -> list[Path]:
    """The files of rows in a folder that `Dataset.save_to_disk` wrote; of several splits, of the one to train on."""
    return sorted((folder if (folder / SAVED[0]).is_file() else folder / "train").glob("*.arrow"))


def is_data(file: Path) -> bool:
    """Whether a file of a folder is data: hidden files are other programs' (macOS writes ._rows.jsonl)."""
    return suffix_of(file.name) in BUILDERS and not file.name.startswith(".")


def list_files(name: str) -> list[Path]:
    """The files that a local source names, in the order of their names; those of a pattern, or of a folder's data."""
    path = Path(name)
    if name.endswith("/") and path.is_dir() and not is_saved(path):
        return sorted(file for file in path.iterdir() if file.is_file() and is_data(file))
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if is_pattern(name):
        found = (Path(file) for file in glob.glob(name, recursive=True))  # noqa: PTH207 (folders in the pattern)
        return sorted(file for file in found if file.is_file())
    return [path]


def data_files(name: str) -> list[Path]:
    """The files that hold a source's rows; none of what is on the hub, or a folder that datasets saved."""
    return list_files(name) if is_file_source(name) and not is_saved(Path(name)) else []


def open_bytes(file: Path) -> BinaryIO:
    """A file's bytes, unpacked.

    Raises:
        OSError: It can't be read, or is broken.
        EOFError: It is cut off.
        ImportError: It is packed by zstandard, for which there is no package.
    """
    match file.suffix.lower():
        case ".gz":
            return gzip.open(file, "rb")  # type: ignore[return-value]
        case ".zst":
            return io.BufferedReader(_Unpacked(file))
        case _:
            return file.open("rb")


class _Unpacked(io.RawIOBase):
    """The bytes of a file that zstandard packed. Its own reader says nothing of a file that is cut off."""

    def __init__(self, file: Path) -> None:
        import zstandard

        self._library, self._packed, self._ready = zstandard, file.open("rb"), b""
        self._frame = zstandard.ZstdDecompressor().decompressobj()

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, target: Any) -> int:
        """Fills a buffer; see `open_bytes` for what it raises."""
        while not self._ready:
            ended = self._frame.eof  # of a frame: another may follow
            part = (self._frame.unused_data if ended else b"") or self._packed.read(LOOKED_AT)
            if not part and ended:
                return 0
            if not part:
                raise EOFError("the end of the compressed file is missing")
            if ended:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(part)
            except self._library.ZstdError as error:
                raise OSError(f"it is no file of zstandard's, or broken: {error}") from error
        count = min(len(target), len(self._ready))
        target[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        """Closes the file."""
        self._packed.close()
        super().close()


def open_text(file: Path, encoding: str = "utf-8-sig", newline: str | None = None) -> io.TextIOWrapper:
    """A file's text, unpacked."""
    return io.TextIOWrapper(open_bytes(file), encoding=encoding, newline=newline)


@dataclass(frozen=True)
class Writing:
    """How a file of columns is written.

    Attributes:
        delimiter: Between columns.
        encoding: As Python names it.
        guessed: What of these was guessed, and is not the usual, for people; empty where nothing was.
    """

    delimiter: str
    encoding: str
    guessed: str


def find_writing(file: Path, delimiter: str | None, encoding: str | None) -> Writing:
    """How a csv or tsv file is written: as the recipe says, else by a look at it.

    The delimiter is the one that gives the first line most columns. The encoding is UTF-8 where the file's beginning is
    that, UTF-16 where a mark says so, else Windows' for western languages.

    Raises:
        OSError: It can't be read.
    """
    with open_bytes(file) as stream:
        begin = stream.read(LOOKED_AT)
    found = encoding or _guess_encoding(begin)
    if begin.startswith(codecs.BOM_UTF8) and found.lower().replace("_", "-") in ("utf-8", "utf8"):
        found = "utf-8-sig"  # the mark at the beginning is no part of the first column's name
    line = next(iter(begin.decode(found, errors="replace").splitlines()), "")
    usual = "\t" if suffix_of(file.name) == ".tsv" else ","
    told = [] if encoding or found == "utf-8-sig" else [f"encoding {found}"]
    if delimiter is None:
        counts = {mark: len(split_line(line, mark)) for mark in dict.fromkeys((usual, *DELIMITERS))}
        delimiter = max(counts, key=lambda mark: counts[mark])  # of equal ones the usual, which is the first
        told += [f"columns between {DELIMITERS[delimiter]}"] * (delimiter != usual)
    return Writing(delimiter, found, " and ".join(told))


def split_line(line: str, delimiter: str) -> list[str]:
    """The cells of a line."""
    return next(csv.reader([line], delimiter=delimiter), [])


def _guess_encoding(begin: bytes) -> str:
    if begin[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    for cut in range(4):  # the last character may be cut off
        try:
            begin[: len(begin) - cut].decode("utf-8-sig")
            return "utf-8-sig"
        except UnicodeDecodeError as error:
            if error.start < len(begin) - 4:
                break
    return UNSURE


def iterate_csv(file: Path, delimiter: str | None = None, encoding: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a csv or tsv file: column -> cell, a text."""
    writing = find_writing(file, delimiter, encoding)
    csv.field_size_limit(sys.maxsize)
    with open_text(file, writing.encoding, newline="") as stream:
        for row in csv.DictReader(stream, delimiter=writing.delimiter):
            if None in row:
                raise ValueError("a row has more cells than the header")
            yield row
