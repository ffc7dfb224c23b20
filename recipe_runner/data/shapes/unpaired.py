"""Rows of a prompt, one answer, and whether it is a good one, in tokens. For KTOTrainer."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from recipe_runner.data.accounting import Accounting, Tally
from recipe_runner.data.encode import encode_answers, split
from recipe_runner.data.job import Job
from recipe_runner.data.shapes.pairs import keep_answers, read_batch
from recipe_runner.data.tables import NUMBERS

COLUMNS = dict.fromkeys(("prompt_ids", "completion_ids", "label"), NUMBERS)  # the label is a list of one number
LEARNED = ("completion_ids",)
FIRST = ("prompt_ids", "completion_ids")


def unpair(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both answers of pairs, each with its label: all chosen ones, then all rejected ones.

    Source: trl/data_utils.py 1.16.0, `unpair_preference_dataset`.
    """
    return [take_side(row, good) for good in (True, False) for row in rows]


def take_side(row: dict[str, Any], good: bool) -> dict[str, Any]:
    """The good or the bad answer of a pair, as a row of its own; any other row as it is."""
    if "chosen" not in row:
        return row
    kept = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
    return {**kept, "completion": row["chosen" if good else "rejected"], "label": good}


def tokenize(job: Job, rows: list[dict[str, Any]]) -> pa.Table:
    """`prompt_ids`, `completion_ids` and `label` of whole rows."""
    table = split(*encode_answers(job.tokenizer, rows, ("completion",)))
    return table.append_column("label", pa.array([[int(row["label"])] for row in rows], NUMBERS))


def keep(
    job: Job, split: str, table: pa.Table, part: np.ndarray, places: np.ndarray, tally: Tally, start: int
) -> pa.Table:
    """Drops or refuses rows that are too long, and counts all; TRL's collator cuts the others. See `tokens.keep`."""
    return keep_answers(job, COLUMNS, LEARNED, table, part, places, tally, start)


def finish(dataset: Dataset, accounting: Accounting, config: Any) -> Dataset:
    """A split as KTOTrainer takes it: `label` true or false, and for the KL term the answer of a neighbour.

    Source: trl/trainer/kto_trainer.py 1.16.0, add_kl_completion_ids: within each batch of a device, in order, every
    row gets the answer of the row before it, and the first one that of the last.
    """
    labels = pc.equal(pc.list_flatten(dataset.data.column("label")), 1)
    dataset = dataset.remove_columns("label").add_column("label", labels.to_numpy(zero_copy_only=False))
    if config.loss_type == "apo_zero_unpaired":  # has no KL term
        return dataset
    rows, size = np.arange(len(dataset)), config.per_device_train_batch_size
    begins = rows // size * size
    last = np.minimum(begins + size, len(dataset)) - 1
    neighbours = np.where(rows == begins, last, rows - 1)
    answers = (
        dataset.with_format("arrow").select_columns("completion_ids")[:]["completion_ids"].take(pa.array(neighbours))
    )
    return dataset.add_column("KL_completion_ids", answers.combine_chunks())


def as_trained(row: dict[str, Any], job: Job) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens and labels after TRL's collator, which cuts them; only the answer is learned."""
    collator = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=job.limit)
    return read_batch(collator([row]), ("completion",))
