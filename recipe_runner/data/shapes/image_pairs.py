"""Rows of a prompt with images, a chosen and a rejected answer, and their tokens. For DPOTrainer.

As in `image_tokens`, the trainer is given turns and images, and the tokens are those of TRL's collator.
"""

import json
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from recipe_runner.data.accounting import Accounting, Tally
from recipe_runner.data.job import Job
from recipe_runner.data.pictures import processor_of
from recipe_runner.data.shapes import image_tokens, pairs
from recipe_runner.data.shapes.image_tokens import SHOWN, add_shown, count_images, drop_cut, lay_out, open_row
from recipe_runner.data.tables import NUMBERS

COLUMNS = pairs.COLUMNS | SHOWN
LEARNED = pairs.LEARNED
FIRST = pairs.FIRST
ANSWERS = ("chosen", "rejected")


def tokenize(job: Job, rows: list[dict[str, Any]]) -> pa.Table:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of whole rows, and what the trainer is given."""
    collator = DataCollatorForVisionPreference(processor=processor_of(job.tokenizer))
    columns: dict[str, list[list[int]]] = {name: [] for name in pairs.COLUMNS}
    for row in rows:
        batch = collator([open_row(lay_out(row), row["images"])])
        parts = pairs.read_batch(batch, ANSWERS)
        for name, (ids, labels) in parts.items():
            begin = next((at for at, label in enumerate(labels) if label >= 0), len(ids))
            columns[f"{name}_ids"].append(ids[begin:])
        columns["prompt_ids"].append(ids[:begin])
    return add_shown(pa.table({name: pa.array(ids, NUMBERS) for name, ids in columns.items()}), rows)


def keep(
    job: Job, split: str, table: pa.Table, part: np.ndarray, places: np.ndarray, tally: Tally, start: int
) -> pa.Table:
    """Drops pairs whose images would be cut, then as `pairs.keep`."""
    table, places = drop_cut(job, table, places, "prompt_ids", tally)
    kept = pairs.keep_answers(job, COLUMNS, LEARNED, table, part, places, tally, start)
    count_images(job, kept, "prompt_ids", tally)
    return kept


def finish(dataset: Dataset, accounting: Accounting, config: Any) -> Dataset:
    """A split as TRL's vision path takes it. See `image_tokens.finish`."""
    return image_tokens.finish(dataset, accounting, config)


def as_trained(row: dict[str, Any], job: Job) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens and labels of both sequences after TRL's collator, which cuts them."""
    return pairs.read_batch(collate(row, job), ANSWERS)


def collate(row: dict[str, Any], job: Job) -> dict[str, Any]:
    """The batch of a row alone that TRL's collator makes: both sequences, each with all images."""
    collator = DataCollatorForVisionPreference(processor=processor_of(job.tokenizer), max_length=job.limit)
    return dict(collator([open_row(json.loads(row["row"]), row["images"])]))


def inputs_of(row: dict[str, Any], job: Job, answer: str) -> dict[str, Any]:
    """What the model is given of a row with one of its answers: in each tensor, the first half is of the chosen one."""
    batch = {name: value for name, value in collate(row, job).items() if name != "completion_mask"}
    return {name: value.chunk(2)[ANSWERS.index(answer)] for name, value in batch.items()}
