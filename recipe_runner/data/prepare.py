"""From rows to what the trainer is given, by several processes, with every lost row and token counted."""

import collections
import contextlib
import importlib
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recipe_runner.data.accounting import Tally, list_reasons
from recipe_runner.data.checks import (
    CHECKED_ROWS,
    check_ends,
    compare_templates,
    count_empty_thoughts,
    count_endless,
    count_rendered_parts,
    count_special_tokens,
)
from recipe_runner.data.job import Job, read_rows
from recipe_runner.data.order import arrange_rows
from recipe_runner.data.pictures import ImageError
from recipe_runner.data.rendering import REFUSALS, find_refused
from recipe_runner.data.similar import sketch
from recipe_runner.data.sources import Source
from recipe_runner.data.tables import PACKED_TOGETHER, flatten, make_table, pack, with_documents
from recipe_runner.data.thinking import is_turns
from recipe_runner.data.turns import BAD, GOOD, fold_turns
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.problems.limits import TooSlow, time_limit
from recipe_runner.stages import Stage
from recipe_runner.workers import work_in_order

MEASURED = 200  # rows of a source that say how long its rows are
CHUNK = 1_000  # rows prepared at once: what bounds the memory
CHUNK_SECONDS, ROW_SECONDS = 60, 10  # a chunk that takes longer is looked at row by row: templates may be endless
FOLDS = {"merge_system": "a system turn", "merge_turns": "two turns of one role after each other"}


def shape_of(stage: Stage) -> Any:
    """The module of the shape that a stage's rows have: see `shapes`."""
    return importlib.import_module(f"recipe_runner.data.shapes.{stage.shape}")


def order_rows(job: Job) -> dict[str, np.ndarray]:
    """Which rows are trained on and which are held out, in which order: see `order.arrange_rows`.

    Raises:
        UserError: A source is too small to be split, or its first rows can't be used.
    """
    section, lengths = job.dataset, []
    if section.weight_by == "tokens":
        lengths = [_measure(job, number) for number in range(len(section.train))]
    return arrange_rows(section, job.sources, job.seed, lengths)


def _measure(job: Job, number: int) -> float:
    """Mean tokens of some rows of a source, by the seed, as they reach the model."""
    count = len(job.sources[number].rows)
    places = np.random.default_rng(job.seed).permutation(count)[:MEASURED]
    order = np.stack([np.full(len(places), number), places], axis=1)
    rows = read_answers(job, order)
    order = np.tile(order, (len(rows) // len(order), 1))
    reasons = [row.pop("dropped") for row in rows]
    kept = [place for place, reason in enumerate(reasons) if not reason]
    if not kept:
        raise nothing_left("train", collections.Counter(reasons), job.sources[number])
    table = _tokenize(job, [rows[place] for place in kept], order[kept])
    lengths = np.sum([pc.list_value_length(table[name]).to_numpy() for name in shape_of(job.stage).FIRST], axis=0)
    return float(np.minimum(lengths, job.limit).mean() if job.limit and job.cuts("train") else lengths.mean())


@contextlib.contextmanager
def prepare_chunks(
    job: Job, split: str, order: np.ndarray, tally: Tally, workers: int = 1
) -> Iterator[Iterator[pa.Table]]:
    """Tokenizes rows, builds labels, cuts or packs: what the trainer is given.

    Args:
        job: Stage, sources, tokenizer, configuration.
        split: `train` or `eval`.
        order: Array `(rows, 2)` of source and row in it.
        tally: Is told what became of every row.
        workers: Processes. What comes out is the same for any number of them.

    Yields:
        An iterator of tables of the shape's columns; `documents`, the places in `order` of the rows that a row is
        made of; and `document_lengths`, how many tokens each of them has there.

    Raises:
        UserError: A row has the wrong shape, is refused by the template, or is too long; or masks are wrong.
    """
    task = partial(prepare_chunk, job, split, order)
    fix, path = "if memory ran out, set dataset.workers: 1", ("dataset", "workers")
    with work_in_order(task, range(0, len(order), CHUNK), workers, fix=fix, path=path) as results:
        tables = _count(results, tally)
        yield _pack_together(tables, job, tally) if job.packing(split) else tables


def _count(results: Iterator[tuple[pa.Table, Tally]], tally: Tally) -> Iterator[pa.Table]:
    for table, counted in results:
        tally.merge(counted)
        yield table


def _pack_together(tables: Iterator[pa.Table], job: Job, tally: Tally) -> Iterator[pa.Table]:
    """Packs as many rows at a time as TRL does, wherever the tables end."""
    waiting: list[pa.Table] = []
    for table in chain(tables, [None]):
        waiting += [] if table is None else [table]
        rows = sum(map(len, waiting))
        whole = rows if table is None else rows // PACKED_TOGETHER * PACKED_TOGETHER
        if whole:
            together = pa.concat_tables(waiting)
            packed = pack(together.slice(0, whole), job.config)
            tally.packed_rows += len(packed)
            yield packed
            waiting = [together.slice(whole)]


def prepare_chunk(
    job: Job, split: str, order: np.ndarray, start: int, first: bool | None = None, sketched: bool = True
) -> tuple[pa.Table, Tally]:
    """The shape's columns and `document` of the rows of a chunk that are kept, and what became of all.

    Args:
        job: Stage, sources, tokenizer, configuration.
        split: `train` or `eval`.
        order: Array `(rows, 2)` of source and row in it.
        start: Of the chunk in it.
        first: Whether its rows are the first of the data; without it, whether it starts at 0.
        sketched: Whether rows that say nearly the same are to be found.

    Raises:
        UserError: See `prepare_chunks`.
    """
    part, shape, tally = order[start : start + CHUNK], shape_of(job.stage), job.tally()
    rows, documents = read_rows(job, part), np.arange(len(part))
    if job.unpairs:  # mixed: the answers to a prompt should not meet in a batch
        mixed = np.random.default_rng([job.seed, start]).permutation(2 * len(part))
        both = shape.unpair(rows)
        rows, documents = [both[place] for place in mixed], mixed % len(part)
        part = part[documents]
    tally.read += len(rows)
    reasons = [row.pop("dropped") for row in rows]
    for reason in filter(None, reasons):
        tally.drop(reason, 1)
    for row, reason in zip(rows, reasons, strict=True):
        tally.noted.update(row.pop("noted", ()))
        if "label" in row and not reason:
            tally.noted[GOOD if row["label"] else BAD] += 1
    places = np.array([place for place, reason in enumerate(reasons) if not reason], dtype=np.int64)
    if not len(places):
        empty = pa.schema(list(shape.COLUMNS.items())).empty_table()
        return with_documents(make_table(empty, shape.COLUMNS, places), places, job.packing(split)), tally
    usable = [rows[place] for place in places]
    table = _tokenize(job, usable, part[places])  # first: it finds the rows that the template refuses
    tally.special += count_special_tokens(usable, job.tokenizer)
    names = [f"{job.sources[source].name}: {job.sources[source].call_row(row)}" for source, row in part[places]]
    count_rendered_parts(usable, names, job, tally)
    if job.replaced:
        compare_templates(usable, job.tokenizer, job.replaced.own, tally)
    if first if first is not None else start == 0:
        for name in shape.LEARNED:
            looked_at = table[name].slice(0, CHECKED_ROWS)
            if job.dataset.format == "segments":
                count_endless(looked_at, names, job.tokenizer, tally)
            else:
                tally.ends |= check_ends(looked_at, job.tokenizer)
            count_empty_thoughts(looked_at, names, job.tokenizer, tally)
    table = shape.keep(job, split, table, part, places, tally, start)
    if sketched:
        tally.sketches.append(_sketch(job, rows, list_documents(table) - start))
    return (_renumber(table, documents, start) if job.unpairs else table), tally


def list_documents(table: pa.Table) -> np.ndarray:
    """The place in the order of rows that each row is of, where each is of one: array `(rows,)`."""
    return table["document"].to_numpy() if "document" in table.column_names else flatten(table, "documents")[0]


def _sketch(job: Job, rows: list[dict[str, Any]], places: np.ndarray) -> np.ndarray:
    """What finds rows that say nearly the same; of pairs that are trained on one by one, the good answer has it."""
    told = [{} if job.unpairs and not rows[place]["label"] else rows[place] for place in places]
    return sketch(told)


def _renumber(table: pa.Table, documents: np.ndarray, start: int) -> pa.Table:
    """A table whose rows know which pair they are of, rather than their own places after `start`."""
    values, ends = flatten(table, "documents")
    numbers = pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(documents[values - start] + start))
    return table.set_column(table.column_names.index("documents"), "documents", numbers)


def read_answers(job: Job, order: np.ndarray) -> list[dict[str, Any]]:
    """As `read_rows`; of pairs that the trainer takes one by one, each answer as a row."""
    rows = read_rows(job, order)
    return shape_of(job.stage).unpair(rows) if job.unpairs else rows


def _tokenize(job: Job, rows: list[dict[str, Any]], order: np.ndarray) -> pa.Table:
    """Whole rows in tokens, neither cut nor packed.

    Raises:
        UserError: The chat template, or the tokenizer, refuses a row.
    """
    shape = shape_of(job.stage)
    try:
        with contextlib.nullcontext() if job.dataset.is_plain_text else time_limit(CHUNK_SECONDS):
            return shape.tokenize(job, rows)
    except (*REFUSALS, TooSlow) as failure:
        for row, (source, number) in zip(rows, order, strict=True):
            try:
                with time_limit(ROW_SECONDS):
                    shape.tokenize(job, [row])
            except (*REFUSALS, TooSlow) as error:
                opened = job.sources[source]
                told, what, fix = first_line(error), "", "does the chat template come to an end?"
                if isinstance(error, ImageError):
                    message = f"{opened.name}: {opened.call_row(number)}: {told}"
                    raise user_error("unreadable-image", message, "", path=opened.path) from error
                if not isinstance(error, TooSlow):
                    what = find_refused(row, job.tokenizer, told)
                    lacks = re.search(r"has no attribute '(\w+)'", told) if what.startswith("tool") else None
                    fix = (
                        f"give the tool a '{lacks[1]}'" if lacks else _find_remedy(job, row) or "fix or remove the row"
                    )
                message = f"{opened.name}: {opened.call_row(number)} can't be rendered: {what}{': ' * bool(what)}{told}"
                raise user_error("row-refused", message, fix, path=opened.path) from error
        if isinstance(failure, TooSlow):
            return shape.tokenize(job, rows)  # long rows, each of which comes to an end
        raise


def _find_remedy(job: Job, row: dict[str, Any]) -> str:
    """The keys with which the template takes a row whose turns it refuses (Gemma, Mistral); empty where none helps."""
    for keys in (("merge_system",), ("merge_turns",), ("merge_system", "merge_turns")):
        dataset = replace(job.dataset, merge_system="merge_system" in keys, merge_turns="merge_turns" in keys)
        folded = {
            key: fold_turns(cell, [True] * len(cell), dataset, "")[0] for key, cell in row.items() if is_turns(cell)
        }
        try:
            shape_of(job.stage).tokenize(job, [{**row, **folded, "muted": []}])
        except REFUSALS:
            continue
        what = " and ".join(FOLDS[key] for key in keys)
        return f"the chat template refuses {what}: set {' and '.join(f'dataset.{key}: true' for key in keys)}"
    return ""


def input_ids_of(stage: Stage, row: dict[str, Any]) -> list[int]:
    """The tokens of a prepared row; of a pair, those with the better answer."""
    return [token for name in shape_of(stage).FIRST for token in row[name]]


def nothing_left(split: str, reasons: dict[str, int], source: Source | None = None) -> UserError:
    """The error for a split, or for a source of it, of which no row is left."""
    told = list_reasons(reasons)
    message = f"no row of the {split} data{f' of {source.name}' if source else ''} can be used: {told}"
    fix = "fix its rows, or leave the source out" if source else "fix them, or name other data"
    if any("max_length" in reason for reason in reasons):
        fix += "; training.max_length is how long a row may be"
    return user_error("empty-dataset", message, fix, path=source.path if source else ("dataset", split))
