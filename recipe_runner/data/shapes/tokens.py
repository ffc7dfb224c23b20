"""Rows of tokens and labels: one sequence a row, or several packed into one. For SFTTrainer."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from recipe_runner.data.accounting import Accounting, Tally
from recipe_runner.data.encode import encode, encode_answers, encode_segments, join, label, tools_of
from recipe_runner.data.formats import turns_of
from recipe_runner.data.job import Job, drop_overlong
from recipe_runner.data.tables import (
    IGNORED,
    NUMBERS,
    count_two_bos,
    hash_rows,
    make_table,
    measure_rows,
    numbers_of,
    with_documents,
)
from recipe_runner.data.thinking import mask_thoughts

COLUMNS = dict.fromkeys(("input_ids", "labels"), NUMBERS)
LEARNED = ("labels",)
FIRST = ("input_ids",)


def tokenize(job: Job, rows: list[dict[str, Any]]) -> pa.Table:
    """`input_ids` and `labels` of whole rows."""
    table = _label(job, rows)
    masks = job.dataset.thinking == "mask" and not job.dataset.is_plain_text
    return _mask_thoughts(job, table, rows) if masks else table


def _label(job: Job, rows: list[dict[str, Any]]) -> pa.Table:
    tokenizer, train_on = job.tokenizer, job.dataset.train_on
    if "segments" in rows[0]:
        ids, masks = encode_segments(tokenizer, rows)
        return label(ids, None if train_on == "all" else masks)
    if "prompt" in rows[0] and train_on != "all":
        shared, wholes = encode_answers(tokenizer, rows, ("completion",))
        return label(wholes["completion"], begins=shared)
    contents = [_read_whole(row, tokenizer) for row in rows]
    table = label(*encode(tokenizer, contents, tools_of(rows), marks=train_on == "assistant"))
    return _mute(table, rows) if any(row.get("muted") for row in rows) else table


def _read_whole(row: dict[str, Any], tokenizer: Any) -> Any:
    """All turns of a row, or its text with its end."""
    if "messages" in row:
        return row["messages"]
    before, answer = ("", row["text"]) if "text" in row else (row["prompt"], row["completion"])
    return join(before, answer, tokenizer)


def _mask_thoughts(job: Job, table: pa.Table, rows: list[dict[str, Any]]) -> pa.Table:
    """Takes the thinking before answers out of the loss."""
    ids, labels = table["input_ids"].to_pylist(), table["labels"].to_pylist()
    masked = [
        mask_thoughts(job.tokenizer, turns_of(row), row.get("tools"), tokens, np.array(learned, np.int32), IGNORED)
        for row, tokens, learned in zip(rows, ids, labels, strict=True)
    ]
    return table.set_column(table.column_names.index("labels"), "labels", pa.array(masked, NUMBERS))


def _mute(table: pa.Table, rows: list[dict[str, Any]]) -> pa.Table:
    """Takes assistant turns out of the loss: the template marks each answer, so the n-th span is that of the n-th turn.

    Raises:
        ValueError: The template does not mark as many spans as there are answers.
    """
    labels = table["labels"].to_pylist()
    for row, learned in zip(rows, labels, strict=True):
        if muted := row.get("muted"):
            begins = [
                at for at, label in enumerate(learned) if label != IGNORED and (not at or learned[at - 1] == IGNORED)
            ]
            answers = sum(turn["role"] == "assistant" for turn in row["messages"])
            if len(begins) != answers:
                raise ValueError(
                    f"the template marks {len(begins)} answers of {answers}: which have weight 0 is unknown"
                )
            for number in muted:
                end = next((at for at in range(begins[number], len(learned)) if learned[at] == IGNORED), len(learned))
                learned[begins[number] : end] = [IGNORED] * (end - begins[number])
    return table.set_column(table.column_names.index("labels"), "labels", pa.array(labels, NUMBERS))


def keep(
    job: Job, split: str, table: pa.Table, part: np.ndarray, places: np.ndarray, tally: Tally, start: int
) -> pa.Table:
    """See `keep_columns`."""
    return keep_columns(job, split, table, part, places, tally, start, COLUMNS)


def keep_columns(
    job: Job,
    split: str,
    table: pa.Table,
    part: np.ndarray,
    places: np.ndarray,
    tally: Tally,
    start: int,
    columns: Mapping[str, pa.DataType],
) -> pa.Table:
    """Drops, cuts or refuses rows that are too long, drops those that teach nothing, and counts all.

    Args:
        job: For limits and policies.
        split: `train` or `eval`.
        table: Whole rows.
        part: Array `(rows read, 2)` of source and row in it.
        places: Array `(rows,)`: the place in `part` of each row of the table.
        tally: Is told what becomes of every row.
        start: Place of `part` in the order of the split.
        columns: What is kept of a row; those that are numbers tell rows apart.
    """
    limit = job.limit
    cuts = job.cuts(split)
    lengths, supervised = measure_rows(table, limit if cuts else None)
    dropped = drop_overlong(job, lengths, part[places], tally)
    mute = (supervised == 0) & ~dropped
    keep = ~(dropped | mute)
    tally.drop(
        f"without a supervised token{f' within max_length ({limit})' if limit and cuts else ''}", int(mute.sum())
    )
    kept = table.filter(pa.array(keep))
    if (bos := job.tokenizer.bos_token_id) is not None:
        tally.two_bos += count_two_bos(kept, bos)
    lost = np.maximum(lengths - limit, 0)[keep] if limit and cuts else np.zeros(keep.sum(), dtype=np.int64)
    tally.add(
        length=lengths[keep],
        tokens=lengths[keep] - lost,
        lost=lost,
        supervised=supervised[keep],
        origin=part[places[keep]],
        hash=hash_rows(table, numbers_of(columns))[keep],
    )
    if lost.any():
        cut = {name: pc.list_slice(kept[name], 0, limit) for name in COLUMNS}
        kept = pa.table({name: cut.get(name, kept[name]) for name in columns})
    return with_documents(make_table(kept, columns, places[keep] + start), lengths[keep] - lost, job.packing(split))


def finish(dataset: Dataset, accounting: Accounting, config: Any) -> Dataset:
    """A split as SFTTrainer takes it: packed documents don't see each other, but for `wrapped`, which is one text."""
    if accounting.packed_rows and config.packing_strategy != "wrapped":
        return dataset.rename_column("document_lengths", "seq_lengths")
    return dataset


def as_trained(row: dict[str, Any], job: Job) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens and labels after TRL's collator, which masks the first token of each packed document."""
    config = job.config
    flattened = config.padding_free or (config.packing and config.packing_strategy in ("bfd", "bfd_split"))
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=flattened)
    entry = {**row, "seq_lengths": row["document_lengths"]} if config.packing else row
    return {"": (row["input_ids"], collator([entry])["labels"][0].tolist())}
