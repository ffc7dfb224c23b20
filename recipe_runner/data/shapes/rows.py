"""Rows that the trainer tokenizes itself: a prompt, and whatever else the row holds. For trainers that generate."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from recipe_runner.data.accounting import Accounting, Tally
from recipe_runner.data.encode import encode, tools_of
from recipe_runner.data.job import Job, drop_overlong
from recipe_runner.data.tables import IGNORED, NUMBERS, hash_rows, make_table, with_documents

COLUMNS = {"prompt_ids": NUMBERS, "row": pa.string()}  # the row itself, as JSON
LEARNED = ()
FIRST = ("prompt_ids",)


def tokenize(job: Job, rows: list[dict[str, Any]]) -> pa.Table:
    """The rows as they are, and `prompt_ids`, the tokens that the model goes on from, to measure and to show them."""
    ids, _ = encode(job.tokenizer, [row["prompt"] for row in rows], tools_of(rows), asks=True)
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    return pa.table({"prompt_ids": pa.array(ids, NUMBERS), "row": texts})


def keep(
    job: Job, split: str, table: pa.Table, part: np.ndarray, places: np.ndarray, tally: Tally, start: int
) -> pa.Table:
    """Drops or refuses rows whose prompt is too long, and counts all. See `tokens.keep`."""
    lengths = pc.list_value_length(table["prompt_ids"]).to_numpy()
    keep = ~drop_overlong(job, lengths, part[places], tally)
    none = np.zeros(keep.sum(), dtype=np.int64)
    hashes = hash_rows(table, FIRST)[keep]
    origin, lengths = part[places[keep]], lengths[keep]
    tally.add(origin=origin, length=lengths, tokens=lengths, lost=none, supervised=none, hash=hashes)
    kept = make_table(table.filter(pa.array(keep)), COLUMNS, places[keep] + start)
    return with_documents(kept, lengths, packing=False)


def finish(dataset: Dataset, accounting: Accounting, config: Any) -> Dataset:
    """A split as such a trainer takes it: a row that is read is as it was, with every column and key that it had."""
    return dataset.with_transform(lambda batch: _read(batch["row"]))


def _read(rows: list[str]) -> dict[str, list[Any]]:
    """Rows by column."""
    decoded = [json.loads(row) for row in rows]
    return {name: [row[name] for row in decoded] for name in decoded[0]}


def as_trained(row: dict[str, Any], job: Job) -> dict[str, tuple[list[int], list[int]]]:
    """The prompt's tokens: what is learned is generated while training."""
    return {"": (row["prompt_ids"], [IGNORED] * len(row["prompt_ids"]))}
