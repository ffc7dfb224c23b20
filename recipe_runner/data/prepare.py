"""From rows to tokens and labels, by TRL's own code, chunk by chunk, with every lost row and token counted."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from recipe_runner.data.accounting import Tally
from recipe_runner.data.checks import check_ends, count_rendered_roles, count_special_tokens
from recipe_runner.data.sources import Source, read_rows
from recipe_runner.data.tables import (
    IGNORED,
    PACKED_TOGETHER,
    count_two_bos,
    hash_rows,
    make_table,
    measure_rows,
    pack,
    with_documents,
)
from recipe_runner.problems.errors import UserError, first_line
from recipe_runner.recipe.recipe import Recipe

CHUNK = 5_000  # rows prepared at once: what bounds the memory
# What a prepared row is made of: for pairs, and for everything else.
COLUMNS = {True: ("prompt_ids", "chosen_ids", "rejected_ids"), False: ("input_ids", "labels")}
CHECKED_ROWS = 100  # rows of a split whose masks are checked token by token


@dataclass(frozen=True)
class Job:
    """What is needed to make tokens of rows.

    Attributes:
        recipe: The recipe.
        sources: Its sources, opened.
        tokenizer: With the chat template that is trained with.
        config: The trainer's configuration.
    """

    recipe: Recipe
    sources: list[Source]
    tokenizer: PreTrainedTokenizerBase
    config: Any  # SFTConfig or DPOConfig

    @property
    def pairs(self) -> bool:
        """Whether rows are preference pairs."""
        return bool(self.recipe.values["dataset"]["format"] == "preference")

    def packing(self, split: str) -> bool:
        """Whether a split is packed."""
        if self.pairs:
            return False
        packing, of_eval = self.config.packing, self.config.eval_packing
        return bool(packing if split == "train" or of_eval is None else of_eval)

    def cuts(self, split: str) -> bool:
        """Whether rows longer than `max_length` lose tokens, rather than being split between packed rows."""
        return not (self.packing(split) and self.config.packing_strategy != "bfd")

    def tally(self) -> Tally:
        """Counters for a split."""
        return Tally(self.config.max_length, [source.name for source in self.sources])


def prepare_chunks(job: Job, split: str, order: np.ndarray, tally: Tally) -> Iterator[pa.Table]:
    """Tokenizes rows, builds labels, cuts or packs: what the trainer is given.

    Args:
        job: Recipe, sources, tokenizer, configuration.
        split: `train` or `eval`.
        order: Array `(rows, 2)` of source and row in it.
        tally: Is told what became of every row.

    Yields:
        Tables of `input_ids` and `labels` (lists of equal length), or of `prompt_ids`, `chosen_ids` and `rejected_ids`
        (which the collator cuts); `documents`, the places in `order` of the rows that a row is made of; and
        `document_lengths`, how many tokens each of them has there.

    Raises:
        UserError: A row has the wrong shape, is refused by the template, or is too long; or masks are wrong.
    """
    waiting = None
    for start in range(0, len(order), CHUNK):
        table = _prepare_chunk(job, split, order, start, tally)
        if not job.packing(split):
            yield table
            continue
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        whole = len(waiting) // PACKED_TOGETHER * PACKED_TOGETHER
        whole = whole if start + CHUNK < len(order) else len(waiting)
        if whole:
            packed = pack(waiting.slice(0, whole), job.config)
            tally.packed_rows += len(packed)
            yield packed
            waiting = waiting.slice(whole)


def _prepare_chunk(job: Job, split: str, order: np.ndarray, start: int, tally: Tally) -> pa.Table:
    """`input_ids`, `labels` and `document` of the rows of a chunk that are kept."""
    part = order[start : start + CHUNK]
    rows = read_rows(job.recipe, job.sources, part)
    tally.read += len(rows)
    reasons = [row.pop("dropped") for row in rows]
    for reason in filter(None, reasons):
        tally.drop(reason, 1)
    places = np.array([place for place, reason in enumerate(reasons) if not reason], dtype=np.int64)
    if not len(places):
        empty = make_table({name: [] for name in COLUMNS[job.pairs]}, places)
        return with_documents(empty, places, job.packing(split))
    usable = [rows[place] for place in places]
    tally.special += count_special_tokens(usable, job.tokenizer)
    count_rendered_roles(usable, job.tokenizer, tally)
    tokenized = _tokenize(job, usable, part[places])
    if job.pairs:
        if start == 0:
            answers = tokenized.slice(0, CHECKED_ROWS)
            for name in ("chosen_ids", "rejected_ids"):
                check_ends(pa.table({"labels": answers[name]}), job.recipe, job.tokenizer)
        return _keep_pairs(job, tokenized, part, places, tally, start)
    if start == 0:
        check_ends(tokenized.slice(0, CHECKED_ROWS), job.recipe, job.tokenizer)
    return _keep_learnable(job, split, tokenized, part, places, tally, start)


def _keep_learnable(
    job: Job, split: str, table: pa.Table, part: np.ndarray, places: np.ndarray, tally: Tally, start: int
) -> pa.Table:
    """Drops, cuts or refuses rows that are too long, drops those that teach nothing, and counts all."""
    limit = job.config.max_length
    cuts = job.cuts(split)
    lengths, supervised = measure_rows(table, limit if cuts else None)
    dropped = _drop_long(job, lengths, part[places], tally)
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
        source=part[places[keep], 0],
        hash=hash_rows(table, COLUMNS[False])[keep],
    )
    columns = {name: kept[name] for name in COLUMNS[False]}
    if lost.any():
        columns = {name: pc.list_slice(column, 0, limit) for name, column in columns.items()}
    return with_documents(make_table(columns, places[keep] + start), lengths[keep] - lost, job.packing(split))


def _keep_pairs(job: Job, table: pa.Table, part: np.ndarray, places: np.ndarray, tally: Tally, start: int) -> pa.Table:
    """Drops or refuses pairs that are too long, and counts all; TRL's collator cuts the others."""
    limit = job.config.max_length
    prompt, chosen, rejected = (pc.list_value_length(table[name]).to_numpy() for name in COLUMNS[True])
    both = np.stack([prompt + chosen, prompt + rejected])
    lengths = both.max(axis=0)
    dropped = _drop_long(job, lengths, part[places], tally)
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
        hash=hash_rows(table, COLUMNS[True])[keep],
    )
    kept = table.filter(pa.array(keep))
    columns = {name: kept[name] for name in COLUMNS[True]}
    return with_documents(make_table(columns, places[keep] + start), fitted.max(axis=0)[keep], False)


def _drop_long(job: Job, lengths: np.ndarray, order: np.ndarray, tally: Tally) -> np.ndarray:
    """Which rows `on_overlong: drop` drops, counted: an array `(rows,)` of truth values.

    Raises:
        UserError: A row is too long, and `on_overlong` is error.
    """
    limit, policy = job.config.max_length, job.recipe.values["dataset"]["on_overlong"]
    long = lengths > limit if limit else np.zeros(len(lengths), dtype=bool)
    if policy == "error" and long.any():
        first = int(np.argmax(long))
        source, row = order[first]
        message = f"{job.sources[source].name}: row {row + 1} has {lengths[first]:,} tokens"
        fix = f"max_length is {limit:,}: raise it, or set on_overlong to truncate or drop"
        raise job.recipe.error("row-too-long", message, fix, "dataset", "on_overlong")
    dropped = long & (policy == "drop")
    tally.drop(f"longer than max_length ({limit})", int(dropped.sum()))
    return dropped


def _tokenize(job: Job, rows: list[dict[str, Any]], order: np.ndarray) -> pa.Table:
    """`input_ids` and `labels` of whole rows, neither cut nor packed.

    Raises:
        UserError: The chat template, or the tokenizer, refuses a row.
    """
    whole = copy.copy(job.config)
    whole.max_length = None
    if not job.pairs:
        whole.assistant_only_loss = job.recipe.values["dataset"]["train_on"] == "assistant"

    def tokenize(some: list[dict[str, Any]]) -> pa.Table:
        dataset = Dataset.from_dict({key: [row[key] for row in some] for key in some[0]})
        prepared = _upstream_preparation(dataset, job, whole)
        return prepared.select_columns(list(COLUMNS[job.pairs])).data.table.combine_chunks()

    try:
        return tokenize(rows)
    except (TemplateError, RuntimeError, ValueError, TypeError):
        for row, (source, number) in zip(rows, order, strict=True):
            try:
                tokenize([row])
            except (TemplateError, RuntimeError, ValueError, TypeError) as error:
                message = f"{job.sources[source].name}: row {number + 1} can't be rendered: {first_line(error)}"
                fix = "mend or remove the row"
                raise job.recipe.error("row-refused", message, fix, *job.sources[source].path, "source") from error
        raise


def _upstream_preparation(rows: Dataset, job: Job, config: SFTConfig) -> Dataset:
    """Calls `SFTTrainer._prepare_dataset` without a trainer, because a trainer would load the weights first.

    Source: trl/trainer/sft_trainer.py 1.16.0; of `self` the method reads only the three attributes given here, which
    `test_tokens.py` holds against a real trainer. Its barrier between processes is taken out: `store` lets one process
    prepare and the others wait without a collective, which would time out.
    """
    stand_in = SimpleNamespace(
        _tokenizer=job.tokenizer,
        chat_template=None,  # the tokenizer already has the training template: see `model.load_tokenizer`
        completion_only_loss=job.recipe.values["dataset"].get("train_on") == "completion",
    )
    if job.pairs:
        with mock.patch("trl.trainer.dpo_trainer.global_then_local_main_first", contextlib.nullcontext):
            return DPOTrainer._prepare_dataset(stand_in, rows, job.tokenizer, config, "")
    prepare: Any = SFTTrainer._prepare_dataset
    with mock.patch("trl.trainer.sft_trainer.global_then_local_main_first", contextlib.nullcontext):
        return prepare(stand_in, rows, job.tokenizer, config, False, None, "")


def labels_as_trained(row: dict[str, Any], config: SFTConfig) -> list[int]:
    """Labels of a prepared row after TRL's collator, which masks the first token of each packed document.

    Args:
        row: `input_ids`, `labels`, `document_lengths`.
        config: The trainer's configuration.
    """
    flattened = config.padding_free or (config.packing and config.packing_strategy in ("bfd", "bfd_split"))
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=flattened)
    entry = {**row, "seq_lengths": row["document_lengths"]} if config.packing else row
    labels: list[int] = collator([entry])["labels"][0].tolist()
    return labels


def pair_as_trained(row: dict[str, Any], config: DPOConfig) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of both sequences of a prepared pair, chosen first, after TRL's collator, which cuts them.

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
    return sequences


def nothing_left(recipe: Recipe, split: str, reasons: dict[str, int]) -> UserError:
    """The error for a split of which no row is left."""
    told = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
    return recipe.error("empty-dataset", f"no row of the {split} data can be used: {told}", "", "dataset", split)
