"""Rows of turns and images, and the tokens and labels that TRL's vision collator makes of them. For SFTTrainer.

The trainer is given turns and images: pixels are made when a batch is. Tokens and labels are those that this collator
gives for each row alone, for everything that counts and checks rows before.
"""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from recipe_runner.data.accounting import Accounting, Tally
from recipe_runner.data.images import as_parts
from recipe_runner.data.job import Job
from recipe_runner.data.pictures import PICTURES, hash_picture, open_images, processor_of
from recipe_runner.data.shapes import tokens
from recipe_runner.data.tables import IGNORED, NUMBERS, flatten

SHOWN = {
    "row": pa.string(),
    "images": PICTURES,
    "image_hashes": NUMBERS,
}  # what the trainer gets; what tells rows apart
COLUMNS = tokens.COLUMNS | SHOWN
LEARNED = tokens.LEARNED
FIRST = tokens.FIRST


def tokenize(job: Job, rows: list[dict[str, Any]]) -> pa.Table:
    """`input_ids` and `labels` of whole rows, and what the trainer is given."""
    collator = build_collator(job, None)
    made: list[tuple[list[int], list[int]]] = []
    for row in rows:
        batch = collator([open_row(lay_out(row), row["images"])])
        labels = batch["labels"][0].tolist()
        if job.dataset.train_on == "assistant" and not any(label != IGNORED for label in labels):
            raise RuntimeError("the chat template marks no token of it as the assistant's ({% generation %})")
        made.append((batch["input_ids"][0].tolist(), labels))
    ids, labels = zip(*made, strict=True)
    table = pa.table({"input_ids": pa.array(ids, NUMBERS), "labels": pa.array(labels, NUMBERS)})
    return add_shown(table, rows)


def build_collator(job: Job, limit: int | None) -> DataCollatorForVisionLanguageModeling:
    """TRL's collator as its trainer builds it, cutting rows at a limit.

    Source: trl/trainer/sft_trainer.py 1.16.0, `SFTTrainer.__init__`.
    """
    train_on = job.dataset.train_on
    return DataCollatorForVisionLanguageModeling(
        processor=processor_of(job.tokenizer),
        max_length=limit,
        completion_only_loss=train_on not in ("all", "assistant"),
        assistant_only_loss=train_on == "assistant",
    )


def lay_out(row: dict[str, Any]) -> dict[str, Any]:
    """The turns of a row in parts, by TRL's names."""
    names = ("messages", "prompt", "completion", "chosen", "rejected")
    return {name: as_parts(row[name]) for name in names if name in row}


def open_row(turns: dict[str, Any], pictures: list[Any]) -> dict[str, Any]:
    """A row as TRL's trainers take it: turns, and images that are open."""
    return turns | {"images": open_images(pictures)}


def add_shown(table: pa.Table, rows: list[dict[str, Any]]) -> pa.Table:
    """A table with what the trainer is given of each row."""
    texts = [json.dumps(lay_out(row), ensure_ascii=False) for row in rows]
    hashes = [[part for picture in row["images"] for part in hash_picture(picture)] for row in rows]
    columns = {"row": texts, "images": [row["images"] for row in rows], "image_hashes": hashes}
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, SHOWN[name]))
    return table


def keep(
    job: Job, split: str, table: pa.Table, part: np.ndarray, places: np.ndarray, tally: Tally, start: int
) -> pa.Table:
    """Drops rows whose images would be cut, then as `tokens.keep`."""
    table, places = drop_cut(job, table, places, "input_ids", tally)
    kept = tokens.keep_columns(job, split, table, part, places, tally, start, COLUMNS)
    count_images(job, kept, "input_ids", tally)
    return kept


def drop_cut(job: Job, table: pa.Table, places: np.ndarray, name: str, tally: Tally) -> tuple[pa.Table, np.ndarray]:
    """The rows, and their places, that keep all tokens of their images (`name`) where they are cut.

    The others are counted. A model that is given an image and not all of its tokens fails.
    """
    whole = np.ones(len(table), dtype=bool)
    if job.limit and job.dataset.on_overlong == "truncate":
        values, ends = flatten(table, name)
        seen = np.isin(values, image_ids(job))
        for row in range(len(table)):
            whole[row] = not seen[ends[row] + job.limit : ends[row + 1]].any()
    tally.drop(f"whose images do not fit within max_length ({job.limit})", int((~whole).sum()))
    return table.filter(pa.array(whole)), places[whole]


def image_ids(job: Job) -> list[int]:
    """Numbers of the tokens that stand for parts of an image.

    Gemma 3's processor calls the token before them its image token; its tokenizer knows theirs.
    """
    own = getattr(job.tokenizer, "image_token_id", None)
    return [own] if own is not None else [int(number) for number in processor_of(job.tokenizer).image_token_ids]


def count_images(job: Job, kept: pa.Table, name: str, tally: Tally) -> None:
    """Counts images and their tokens (in the column `name`) of rows that are kept."""
    tally.images += int(pc.sum(pc.list_value_length(kept["images"])).as_py() or 0)
    tally.image_tokens += int(np.isin(flatten(kept, name)[0], image_ids(job)).sum())


def finish(dataset: Dataset, accounting: Accounting, config: Any) -> Dataset:
    """A split as TRL's vision path takes it: a row that is read is turns and open images."""
    return dataset.with_transform(_read)


def _read(batch: dict[str, Any]) -> dict[str, list[Any]]:
    turns = [json.loads(row) for row in batch["row"]]
    images = [open_images(pictures) for pictures in batch["images"]]
    return {name: [row[name] for row in turns] for name in turns[0]} | {"images": images}


def as_trained(row: dict[str, Any], job: Job) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens and labels after TRL's collator, which cuts them."""
    batch = collate(row, job)
    return {"": (batch["input_ids"][0].tolist(), batch["labels"][0].tolist())}


def collate(row: dict[str, Any], job: Job) -> dict[str, Any]:
    """The batch of a row alone that TRL's collator makes: tokens, labels, pixels and what else the processor gives."""
    return dict(build_collator(job, job.limit)([open_row(json.loads(row["row"]), row["images"])]))


def inputs_of(row: dict[str, Any], job: Job, answer: str = "") -> dict[str, Any]:
    """What the model is given of a row."""
    return {name: value for name, value in collate(row, job).items() if name != "labels"}
