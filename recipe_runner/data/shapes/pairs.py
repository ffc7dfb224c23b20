"""Rows of a prompt, a chosen and a rejected answer, in tokens. For DPOTrainer."""

import copy
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from recipe_runner.data.accounting import Accounting, Tally
from recipe_runner.data.job import Job, drop_overlong
from recipe_runner.data.tables import IGNORED, hash_rows, make_table, with_documents
from recipe_runner.data.upstream import call_preparation

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
LEARNED = ("chosen_ids", "rejected_ids")
FIRST = ("prompt_ids", "chosen_ids")


def tokenize(job: Job, rows: list[dict[str, Any]]) -> pa.Table:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of whole rows."""
    whole = copy.copy(job.config)
    whole.max_length = None
    dataset = Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})
    prepared = call_preparation(DPOTrainer, dataset, job.tokenizer, whole, "")
    return prepared.select_columns(list(COLUMNS)).data.table.combine_chunks()


def keep(
    job: Job, split: str, table: pa.Table, part: np.ndarray, places: np.ndarray, tally: Tally, start: int
) -> pa.Table:
    """Drops or refuses pairs that are too long, and counts all; TRL's collator cuts the others. See `tokens.keep`."""
    limit = job.config.max_length
    prompt, chosen, rejected = (pc.list_value_length(table[name]).to_numpy() for name in COLUMNS)
    both = np.stack([prompt + chosen, prompt + rejected])
    lengths = both.max(axis=0)
    dropped = drop_overlong(job, lengths, part[places], tally)
    mute = (prompt >= limit) & ~dropped if limit else dropped & False
    keep = ~(dropped | mute)
    tally.drop(f"whose prompt fills max_length ({limit})", int(mute.sum()))
    fitted = np.minimum(both, limit) if limit else both
    tally.add(
        length=lengths[keep],
        tokens=fitted.sum(axis=0)[keep],
        lost=(both - fitted).sum(axis=0)[keep],
        supervised=(fitted - prompt).sum(axis=0)[keep],
        source=part[places[keep], 0],
        hash=hash_rows(table, COLUMNS)[keep],
    )
    kept = table.filter(pa.array(keep))
    columns = {name: kept[name] for name in COLUMNS}
    return with_documents(make_table(columns, places[keep] + start), fitted.max(axis=0)[keep], False)


def finish(dataset: Dataset, accounting: Accounting, config: Any) -> Dataset:
    """A split as DPOTrainer takes it, with `length`, of the longer sequence, by which transformers groups rows."""
    lengths = pc.list_flatten(dataset.data.column("document_lengths")).to_numpy()
    return dataset.add_column("length", lengths)


def as_trained(row: dict[str, Any], config: Any) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens and labels of both sequences after TRL's collator, which cuts them.

    Args:
        row: `prompt_ids`, `chosen_ids`, `rejected_ids`.
        config: The trainer's configuration.
    """
    collator = DataCollatorForPreference(
        pad_token_id=0, max_length=config.max_length, truncation_mode=config.truncation_mode
    )
    batch = collator([row])
    sequences = []
    for ids, real, learned in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
        kept = ids[real.bool()].tolist()
        answers = zip(kept, learned[real.bool()].tolist(), strict=True)
        sequences.append((kept, [token if of_answer else IGNORED for token, of_answer in answers]))
    return dict(zip(("chosen", "rejected"), sequences, strict=True))
