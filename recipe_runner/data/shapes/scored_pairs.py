"""Rows of two whole sequences in tokens, with the chosen and with the rejected answer. For RewardTrainer."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from trl.data_utils import common_prefix_length

from recipe_runner.data.accounting import Accounting, Tally
from recipe_runner.data.encode import encode, join, tools_of
from recipe_runner.data.job import Job, drop_overlong
from recipe_runner.data.shapes.pairs import find_equal
from recipe_runner.data.tables import IGNORED, NUMBERS, flatten, hash_rows, make_table, with_documents

ANSWERS = ("chosen", "rejected")
COLUMNS = dict.fromkeys(("chosen_ids", "rejected_ids"), NUMBERS)
LEARNED = ()
FIRST = ("chosen_ids",)


def tokenize(job: Job, rows: list[dict[str, Any]]) -> pa.Table:
    """`chosen_ids` and `rejected_ids`, each with its prompt.

    Source: trl/trainer/reward_trainer.py 1.16.0, `tokenize_fn`.
    """
    tools = tools_of(rows)
    wholes = {
        f"{name}_ids": encode(job.tokenizer, [join(row["prompt"], row[name], job.tokenizer) for row in rows], tools)[0]
        for name in ANSWERS
    }
    return pa.table({name: pa.array(ids, NUMBERS) for name, ids in wholes.items()})


def keep(
    job: Job, split: str, table: pa.Table, part: np.ndarray, places: np.ndarray, tally: Tally, start: int
) -> pa.Table:
    """Drops or refuses pairs that are too long (an answer that is cut is not what was judged). See `tokens.keep`."""
    whole = np.stack([pc.list_value_length(table[name]).to_numpy() for name in COLUMNS])
    lengths = whole.max(axis=0)
    dropped = drop_overlong(job, lengths, part[places], tally)
    equal = find_equal(table, tuple(COLUMNS)) & ~dropped
    keep = ~(dropped | equal)
    tally.drop("whose answers are equal in tokens", int(equal.sum()))
    tally.add(
        length=lengths[keep],
        tokens=whole.sum(axis=0)[keep],
        lost=np.zeros(keep.sum(), dtype=np.int64),
        supervised=(whole - _count_shared(table)).sum(axis=0)[keep],
        origin=part[places[keep]],
        hash=hash_rows(table, COLUMNS)[keep],
    )
    kept = make_table(table.filter(pa.array(keep)), COLUMNS, places[keep] + start)
    return with_documents(kept, lengths[keep], packing=False)


def _count_shared(table: pa.Table) -> np.ndarray:
    """How many tokens both sequences of each row begin with: array `(rows,)`."""
    (chosen, begins), (rejected, starts) = (flatten(table, name) for name in COLUMNS)
    shared = np.zeros(len(table), dtype=np.int64)
    for row in range(len(table)):
        one, other = chosen[begins[row] : begins[row + 1]], rejected[starts[row] : starts[row + 1]]
        length = min(len(one), len(other))
        differ = np.flatnonzero(one[:length] != other[:length])
        shared[row] = differ[0] if len(differ) else length
    return shared


def finish(dataset: Dataset, accounting: Accounting, config: Any) -> Dataset:
    """A split as RewardTrainer takes it, with `length`, of the longer sequence, by which transformers groups rows."""
    lengths = pc.list_flatten(dataset.data.column("document_lengths")).to_numpy()
    return dataset.add_column("length", lengths)


def as_trained(row: dict[str, Any], job: Job) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens of both sequences; as labels those that tell the answers apart, of which the score has to be."""
    sequences = {name: list(row[f"{name}_ids"]) for name in ANSWERS}
    shared = common_prefix_length(*sequences.values())
    return {name: (ids, [IGNORED] * shared + ids[shared:]) for name, ids in sequences.items()}
