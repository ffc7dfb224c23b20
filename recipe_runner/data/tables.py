"""Tables of tokens: building, measuring and packing them, without a loop over tokens."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset
from trl import pack_dataset

from recipe_runner.problems.errors import user_error

IGNORED = -100  # label of a token that is not in the loss (torch.nn.CrossEntropyLoss's ignore_index)
NUMBERS = pa.list_(pa.int32())
PACKED_TOGETHER = 1_000  # rows: the batch of `Dataset.map`, and so of TRL's packing


def make_table(table: pa.Table, columns: Mapping[str, pa.DataType], documents: np.ndarray) -> pa.Table:
    """Some columns of a table, of the given types, and the document that each row is."""
    kept = {name: table[name].cast(kind) for name, kind in columns.items()}
    return pa.table(kept | {"document": pa.array(documents, pa.int64())})


def with_documents(table: pa.Table, lengths: np.ndarray, packing: bool) -> pa.Table:
    """An unpacked row is one document; packing makes its own."""
    if packing:
        return table
    one = np.arange(len(table) + 1, dtype=np.int32)
    documents = pa.ListArray.from_arrays(one, table["document"].combine_chunks())
    return (
        table.drop_columns("document")
        .append_column("documents", documents)
        .append_column("document_lengths", pa.ListArray.from_arrays(one, pa.array(lengths, pa.int32())))
    )


def measure_rows(table: pa.Table, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of rows, and supervised tokens within the first `limit` of each: arrays `(rows,)`."""
    labels, ends = flatten(table, "labels")
    learned = np.concatenate([[0], np.cumsum(labels != IGNORED)])
    stops = ends[1:] if limit is None else np.minimum(ends[1:], ends[:-1] + limit)
    return np.diff(ends), learned[stops] - learned[ends[:-1]]


def numbers_of(columns: Mapping[str, pa.DataType]) -> list[str]:
    """Names of the columns that are lists of numbers."""
    return [name for name, kind in columns.items() if kind == NUMBERS]


def hash_rows(table: pa.Table, names: Iterable[str]) -> np.ndarray:
    """A hash of some list columns of each row: array `(rows,)` of 64-bit numbers."""
    columns = [flatten(table, name) for name in names]
    hashes = np.empty(len(table), dtype=np.uint64)
    for row in range(len(table)):
        digest = xxhash.xxh3_64()
        for values, ends in columns:
            part = values[ends[row] : ends[row + 1]]
            digest.update(len(part).to_bytes(8, "little"))  # where one list ends and the next begins
            digest.update(part.tobytes())
        hashes[row] = digest.intdigest()
    return hashes


def flatten(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of a list column, one after the other, and where each row begins and the last one ends."""
    column = table[name].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    offsets = column.offsets.to_numpy()
    return column.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0]


def count_two_bos(table: pa.Table, bos: int) -> int:
    """Rows that begin with two beginning-of-sequence tokens."""
    ids, ends = flatten(table, "input_ids")
    begins = ends[:-1][np.diff(ends) > 1]
    return int(((ids[begins] == bos) & (ids[begins + 1] == bos)).sum())


def pack(table: pa.Table, config: Any) -> pa.Table:
    """TRL's packing, which also carries, token by token, the document that a token is of."""
    ends = flatten(table, "input_ids")[1]
    owners = np.repeat(table["document"].to_numpy(), np.diff(ends))
    offsets = pa.array(ends.astype(np.int32))
    owned = table.drop_columns("document").append_column("document", pa.ListArray.from_arrays(offsets, owners))
    packed = pack_dataset(Dataset(owned), config.max_length, config.packing_strategy, {"batch_size": PACKED_TOGETHER})
    result = packed.with_format("arrow")[:].combine_chunks()
    owners, ends = flatten(result, "document")
    fresh = np.ones(len(owners), dtype=bool)
    fresh[1:] = owners[1:] != owners[:-1]
    fresh[ends[:-1]] = True
    begins = np.flatnonzero(fresh)
    rows = np.searchsorted(begins, ends).astype(np.int32)
    lengths = np.diff(np.append(begins, len(owners))).astype(np.int32)
    columns = {name: result[name].combine_chunks() for name in ("input_ids", "labels")}
    columns["documents"] = pa.ListArray.from_arrays(rows, owners[begins])
    columns["document_lengths"] = pa.ListArray.from_arrays(rows, lengths)
    return pa.table(columns)


def check_vocabulary(table: pa.Table, known: int, name: str) -> None:
    """Checks that a model (`name`) of `known` tokens has an embedding for every token of some rows.

    Raises:
        UserError: It does not.
    """
    for column in (column for column in table.column_names if column.endswith("_ids")):
        highest = pc.max(pc.list_flatten(table.column(column))).as_py()
        if highest is not None and highest >= known:
            message = f"{name}: the tokenizer made token {highest:,}, the model has the tokens 0 to {known - 1:,}"
            raise user_error("tokens-not-in-model", message, "take both of one model", path=("model", "name_or_path"))
