"""Rows of a prompt, a chosen and a rejected answer, in tokens. For DPOTrainer."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from recipe_runner.data.accounting import Accounting, Tally
from recipe_runner.data.encode import encode_answers, split
from recipe_runner.data.job import Job, drop_overlong
from recipe_runner.data.tables import IGNORED, NUMBERS, hash_rows, make_table, numbers_of, with_documents

COLUMNS = dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), NUMBERS)
LEARNED = ("chosen_ids", "rejected_ids")
FIRST = ("prompt_ids", "chosen_ids")


def tokenize(job: Job, rows: list[dict[str, Any]]) -> pa.Table:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of whole rows."""
    return split(*encode_answers(job.tokenizer, rows, ("chosen", "rejected")))


def keep(
    job: Job, split: str, table: pa.Table, part: np.ndarray, places: np.ndarray, tally: Tally, start: int
) -> pa.Table:
    """Drops or refuses pairs that are too long, and counts all; TRL's collator cuts the others. See `tokens.keep`."""
    return keep_answers(job, COLUMNS, LEARNED, table, part, places, tally, start)


def keep_answers(
    job: Job,
    columns: dict[str, pa.DataType],
    answers: tuple[str, ...],
    table: pa.Table,
    part: np.ndarray,
    places: np.ndarray,
    tally: Tally,
    start: int,
) -> pa.Table:
    """`keep` for rows of a prompt and one or several answers, each of which makes a sequence with the prompt."""
    limit = job.limit
    prompt = pc.list_value_length(table["prompt_ids"]).to_numpy()
    whole = np.stack([prompt + pc.list_value_length(table[name]).to_numpy() for name in answers])
    lengths = whole.max(axis=0)
    dropped = drop_overlong(job, lengths, part[places], tally)
    mute = (prompt >= limit) & ~dropped if limit else dropped & False
    equal = find_equal(table, answers) & ~dropped & ~mute
    keep = ~(dropped | mute | equal)
    tally.drop("whose answers are equal in tokens", int(equal.sum()))
    tally.drop(f"whose prompt fills max_length ({limit})", int(mute.sum()))
    fitted = np.minimum(whole, limit) if limit else whole
    tally.add(
        length=lengths[keep],
        tokens=fitted.sum(axis=0)[keep],
        lost=(whole - fitted).sum(axis=0)[keep],
        supervised=(fitted - prompt).sum(axis=0)[keep],
        origin=part[places[keep]],
        hash=hash_rows(table, numbers_of(columns))[keep],
    )
    kept = make_table(table.filter(pa.array(keep)), columns, places[keep] + start)
    return with_documents(kept, fitted.max(axis=0)[keep], packing=False)


def find_equal(table: pa.Table, answers: tuple[str, ...]) -> np.ndarray:
    """Which pairs have two answers that the chat template makes the same of: there is nothing to prefer."""
    if len(answers) < 2:
        return np.zeros(len(table), dtype=bool)
    one, other = (table[name] for name in answers)
    found = pc.equal(pc.list_value_length(one), pc.list_value_length(other)).to_numpy(zero_copy_only=False)
    for place in np.flatnonzero(found):
        found[place] = one[int(place)] == other[int(place)]
    return np.asarray(found, dtype=bool)


def finish(dataset: Dataset, accounting: Accounting, config: Any) -> Dataset:
    """A split as DPOTrainer takes it, with `length`, of the longer sequence, by which transformers groups rows."""
    lengths = pc.list_flatten(dataset.data.column("document_lengths")).to_numpy()
    return dataset.add_column("length", lengths)


def as_trained(row: dict[str, Any], job: Job) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens and labels of both sequences after TRL's collator, which cuts them."""
    options = {"max_length": job.config.max_length, "truncation_mode": job.config.truncation_mode}
    return read_batch(DataCollatorForPreference(pad_token_id=0, **options)([row]), ("chosen", "rejected"))


def read_batch(batch: dict[str, Any], answers: tuple[str, ...]) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens and labels of each answer's sequence in a collated batch, without padding; only the answer is learned."""
    sequences = {}
    masks = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    for name, ids, real, learned in zip(answers, *masks, strict=True):
        labels = ids.where(learned.bool(), IGNORED)
        sequences[name] = ids[real.bool()].tolist(), labels[real.bool()].tolist()
    return sequences
