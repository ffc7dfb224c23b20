"""Rows of a prompt, one answer, and whether it is a good one, in tokens. For KTOTrainer."""

import copy
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from trl import KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from recipe_runner.data.accounting import Accounting, Tally
from recipe_runner.data.job import Job, drop_overlong
from recipe_runner.data.tables import IGNORED, hash_rows, make_table, with_documents
from recipe_runner.data.upstream import call_preparation

COLUMNS = ("prompt_ids", "completion_ids", "label")  # the label is a list of one number
LEARNED = ("completion_ids",)
FIRST = ("prompt_ids", "completion_ids")


def tokenize(job: Job, rows: list[dict[str, Any]]) -> pa.Table:
    """`prompt_ids`, `completion_ids` and `label` of whole rows."""
    whole = copy.copy(job.config)
    whole.max_length = None
    dataset = Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})
    prepared = call_preparation(KTOTrainer, dataset, job.tokenizer, whole, "", calculate_KL=False)
    table = prepared.select_columns(["prompt_ids", "completion_ids"]).data.table.combine_chunks()
    return table.append_column("label", pa.array([[int(row["label"])] for row in rows], pa.list_(pa.int32())))


def keep(
    job: Job, split: str, table: pa.Table, part: np.ndarray, places: np.ndarray, tally: Tally, start: int
) -> pa.Table:
    """Drops or refuses rows that are too long, and counts all; TRL's collator cuts the others. See `tokens.keep`."""
    limit = job.config.max_length
    prompt, completion = (pc.list_value_length(table[name]).to_numpy() for name in FIRST)
    lengths = prompt + completion
    dropped = drop_overlong(job, lengths, part[places], tally)
    mute = (prompt >= limit) & ~dropped if limit else dropped & False
    keep = ~(dropped | mute)
    tally.drop(f"whose prompt fills max_length ({limit})", int(mute.sum()))
    fitted = np.minimum(lengths, limit) if limit else lengths
    tally.add(
        length=lengths[keep],
        tokens=fitted[keep],
        lost=(lengths - fitted)[keep],
        supervised=(fitted - prompt)[keep],
        source=part[places[keep], 0],
        hash=hash_rows(table, COLUMNS)[keep],
    )
    kept = table.filter(pa.array(keep))
    return with_documents(make_table({name: kept[name] for name in COLUMNS}, places[keep] + start), fitted[keep], False)


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


def as_trained(row: dict[str, Any], config: Any) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens and labels after TRL's collator, which cuts them; only the answer is learned.

    Args:
        row: `prompt_ids`, `completion_ids`, `label`.
        config: The trainer's configuration.
    """
    batch = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=config.max_length)([row])
    ids, learned = batch["input_ids"][0].tolist(), batch["completion_mask"][0].tolist()
    labels = [token if of_answer else IGNORED for token, of_answer in zip(ids, learned, strict=True)]
    return {"completion": (ids, labels)}
