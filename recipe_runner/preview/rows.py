"""Rows as the trainer receives them, with what a person needs to read them: text, turns, where they come from."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recipe_runner.data import store
from recipe_runner.data.accounting import Accounting, Tally
from recipe_runner.data.encode import apply_template
from recipe_runner.data.formats import turns_of
from recipe_runner.data.images import Picture
from recipe_runner.data.job import Job, read_rows
from recipe_runner.data.pictures import open_images, see
from recipe_runner.data.prepare import nothing_left, order_rows, prepare_chunks, shape_of
from recipe_runner.data.rendering import find_turn
from recipe_runner.data.shapes.image_tokens import image_ids
from recipe_runner.data.shapes.unpaired import take_side
from recipe_runner.data.tables import IGNORED
from recipe_runner.data.turns import MARK, Turns
from recipe_runner.files import read_object
from recipe_runner.model import hub
from recipe_runner.problems.errors import user_error
from recipe_runner.problems.problem import Problem
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.sections import ModelSection
from recipe_runner.runs.folder import find_changed
from recipe_runner.training.config import build_config
from recipe_runner.training.environment import choose_precision
from recipe_runner.training.prepare import accumulate, find_data_problems, open_job
from recipe_runner.training.summary import describe_steps, describe_template

SPARE = 50  # rows read beyond those asked for, in case some are dropped


@dataclass(frozen=True)
class Piece:
    """Some tokens that decode to whole characters.

    Attributes:
        text: What they say.
        supervised: Whether they are in the loss.
        special: Whether they are a special token.
        start: Place of the first of them in the row.
    """

    text: str
    supervised: bool
    special: bool
    start: int


@dataclass(frozen=True)
class Origin:
    """A row of the data, inside a row of the trainer's: alone, or packed with others.

    Attributes:
        source: File or hub id.
        row: Its number there, from 1.
        start: Place of its first token.
        tokens: How many it has here.
        lost: How many were cut off at `max_length`.
        turns: Role and place of the first token of each turn.
    """

    source: str
    row: int
    start: int
    tokens: int
    lost: int
    turns: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Shown:
    """An image of a row.

    Attributes:
        name: Its file; empty where the data holds its bytes.
        width: In pixels.
        height: In pixels.
        picture: Where it is.
    """

    name: str
    width: int
    height: int
    picture: Picture

    def __str__(self) -> str:
        return f"{self.name or 'in the data'}, {self.width:,} x {self.height:,} pixels"


@dataclass(frozen=True)
class Row:
    """A row as the trainer receives it.

    Attributes:
        tokens: Tokens as the vocabulary spells them.
        input_ids: Their numbers.
        labels: What is learned at each place; -100 where nothing is.
        pieces: The tokens as text.
        documents: What the row is made of.
        rejected: The sequence with the rejected answer, when the row is a pair; this one then holds the chosen answer.
        label: Whether the answer is a good one, where rows are judged; None elsewhere.
        handed: Column -> value: what rewards are given beside the model's answer.
        images: What its turns show, in their order.
    """

    tokens: list[str]
    input_ids: list[int]
    labels: list[int]
    pieces: tuple[Piece, ...]
    documents: tuple[Origin, ...]
    rejected: "Row | None" = None
    label: bool | None = None
    handed: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[Shown, ...] = ()

    @property
    def supervised(self) -> int:
        """Tokens in the loss."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Opened:
    """Everything about a recipe's data but the rows."""

    job: Job
    model: ModelSection
    processes: int
    orders: dict[str, np.ndarray]


@dataclass(frozen=True)
class Facts:
    """What became of all rows."""

    accounts: dict[str, Accounting]
    problems: list[Problem]
    steps: str
    template: str
    stored: str


def open_preview(recipe: Recipe, processes: int) -> Opened:
    """Opens data, tokenizer and template, as a run on a number of processes would; no weights.

    Raises:
        UserError: One of them is at fault.
    """
    hub.find_model(recipe.model)
    precision = choose_precision(recipe.training, recipe.model.dtype, bool(recipe.peft), launcher="no")
    config = build_config(recipe.stage, accumulate(recipe, processes), recipe.model, recipe.run.seed, precision)
    job, _ = open_job(recipe, config)
    return Opened(job, recipe.model, processes, order_rows(job))


def take_rows(opened: Opened, number: int) -> list[Row]:
    """The first rows of the training data, as the trainer receives them before it shuffles."""
    job, order = opened.job, opened.orders["train"]
    found: list[Row] = []
    part = order if job.packing("train") else order[: number + SPARE]  # packing looks at the rows around
    while True:
        tally = job.tally()
        with prepare_chunks(job, "train", part, tally) as tables:
            for table in tables:
                found += _read_table(job, order, table, tally, number - len(found))
                if len(found) >= number:
                    return found
        if len(part) == len(order):
            if not found:
                raise nothing_left("train", tally.dropped)
            return found
        found, part = [], order[: len(part) * 10]


def take_row(opened: Opened, number: int) -> list[Row]:
    """One row of the data by its number, from 1, through all sources in their order; alone, also when rows are packed.

    Raises:
        UserError: There is no such row, or it is dropped (the message says why).
    """
    sizes = [len(source.rows) for source in opened.job.sources]
    if not 1 <= number <= sum(sizes):
        raise user_error("no-such-row", f"there is no row {number}", f"the data has rows 1 to {sum(sizes)}")
    ends = np.cumsum(sizes)
    source = int(np.searchsorted(ends, number))
    return _take_alone(opened, source, int(number - 1 - (ends[source] - sizes[source])))


def take_place(opened: Opened, name: str, number: int, label: bool | None) -> Row:
    """A row of a source by its number there, from 1; of a pair that is judged apart, the answer with a label.

    Raises:
        UserError: There is no such source or row.
    """
    names = [source.name for source in opened.job.sources]
    if name not in names or not 1 <= number <= len(opened.job.sources[names.index(name)].rows):
        raise user_error("no-such-row", f"there is no row {number} of {name}", "is it the recipe of the run?")
    found = _take_alone(opened, names.index(name), number - 1)
    return next((row for row in found if row.label == label), found[0])


def check_unchanged(opened: Opened, run: Path) -> None:
    """Checks that data is what a run was trained on.

    Raises:
        UserError: It has changed.
    """
    recorded = read_object(run / "environment.json").get("data_files")
    files = store.describe_origin(opened.job)["files"]
    if changed := find_changed(recorded if isinstance(recorded, dict) else {}, files):
        message = f"{changed[0]} is not what the run in {run} was trained on: its rows can't be told"
        raise user_error("data-changed", message, "revert the change, or train again", path=("dataset",))


def _take_alone(opened: Opened, source: int, number: int) -> list[Row]:
    order = np.array([[source, number]])
    job = opened.job.unpacked("train")
    tally = job.tally()
    with prepare_chunks(job, "train", order, tally) as tables:
        (table,) = tables
    if not len(table):
        reason = next(iter(tally.dropped))
        name = f"{job.sources[source].name}: row {order[0, 1] + 1}"
        raise user_error("row-dropped", f"{name} is not trained on: it is one {reason}", "fix it, or leave it out")
    return _read_table(job, order, table, tally, 2 if job.unpairs else 1)


def _read_table(job: Job, order: np.ndarray, table: Any, tally: Tally, number: int) -> list[Row]:
    if not len(table):
        return []  # all of these rows are dropped
    lost = None if job.packing("train") else tally.columns["lost"][-1]
    rows = []
    for place, entry in enumerate(table.slice(0, number).to_pylist()):
        cut = 0 if lost is None else int(lost[place])
        sides = [
            _read_sequence(job, order, entry, answer, ids, labels, cut)
            for answer, (ids, labels) in shape_of(job.stage).as_trained(entry, job).items()
        ]
        label = entry["label"] == [1] if "label" in entry else None
        (raw,) = read_rows(job, order[entry["documents"][:1]]) if job.dataset.reward_columns else [{}]
        handed = {name: raw[name] for name in job.dataset.reward_columns}
        rejected = sides[1] if len(sides) > 1 else None
        pictures = entry.get("images") or []
        opened = zip(pictures, open_images(pictures), strict=True)
        images = tuple(Shown(picture["path"] or "", *image.size, picture) for picture, image in opened)
        rows.append(dataclasses.replace(sides[0], rejected=rejected, label=label, handed=handed, images=images))
    return rows


def _read_sequence(
    job: Job, order: np.ndarray, entry: dict[str, Any], answer: str, ids: list[int], labels: list[int], cut: int
) -> Row:
    """A sequence that the collator makes of a prepared row (`answer`: its key there), with its documents and turns."""
    lengths = entry["document_lengths"] if len(entry["documents"]) > 1 else [len(ids)]
    documents, start = [], 0
    for document, length in zip(entry["documents"], lengths, strict=True):
        raw = read_rows(job, order[document : document + 1])[0]
        raw = take_side(raw, entry["label"] == [1]) if "label" in entry else raw
        turns = [*raw["prompt"], *raw[answer]] if answer else turns_of(raw)
        if raw.get("images"):
            found = _find_seen_turns(job, turns, raw["images"], ids)
        else:
            found = _find_turns(job, turns, raw.get("tools"), ids[start : start + length], start)
        source, row = order[document]
        documents.append(Origin(job.sources[source].name, int(row) + 1, start, length, cut, found))
        start += length
    spelt = list(job.tokenizer.convert_ids_to_tokens(ids))
    seen = image_ids(job) if job.dataset.images else []
    return Row(spelt, ids, labels, _find_pieces(job.tokenizer, ids, labels, seen), tuple(documents))


def _find_turns(job: Job, turns: Turns, tools: Any, input_ids: list[int], start: int) -> tuple[tuple[str, int], ...]:
    """Where each turn begins."""
    found = []
    for count in range(len(turns)):
        begins = 0 if not count else find_turn(turns, count, input_ids, job.tokenizer, tools)
        if begins is None or begins >= len(input_ids):
            break  # the template does not render a part of this conversation, or it is cut before
        found.append((turns[count]["role"], start + begins))
    return tuple(found)


def _find_seen_turns(job: Job, turns: Turns, images: list[Any], ids: list[int]) -> tuple[tuple[str, int], ...]:
    """Where each turn of a row with images begins: after as many tokens as the turns before it have with theirs."""
    found = []
    for count in range(len(turns)):
        shown = sum(turn["content"].count(MARK) for turn in turns[:count])
        text = apply_template(job.tokenizer, turns[:count], tokenize=False) if count else ""
        begins = len(see(job.tokenizer, text, images[:shown])["input_ids"][0]) if count else 0
        if begins >= len(ids):
            break
        found.append((turns[count]["role"], begins))
    return tuple(found)


def _find_pieces(
    tokenizer: Any, input_ids: list[int], labels: list[int], seen: Sequence[int] = ()
) -> tuple[Piece, ...]:
    """Decodes token by token, beside the one before (a word's space belongs to it), whole characters together.

    Tokens of an image (`seen`) that follow each other are one piece, with their number.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)

    def decode(begin: int, end: int) -> str:
        return str(tokenizer.decode(input_ids[begin:end], clean_up_tokenization_spaces=False))

    pieces, start = [], 0
    for end in range(1, len(input_ids) + 1):
        if input_ids[end - 1] in seen and end < len(input_ids) and input_ids[end] == input_ids[end - 1]:
            continue  # more of an image comes
        if end - start > 1 and input_ids[start] in seen:
            pieces.append(Piece(f"{decode(end - 1, end)} x {end - start} ", False, True, start))
            start = end
            continue
        before = decode(start - 1, start) if start else ""
        text = decode(max(start - 1, 0), end)[len(before) :]
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(input_ids) and end - start < 8:
            continue  # a part of a character
        supervised = any(label != IGNORED for label in labels[start:end])
        pieces.append(Piece(text, supervised, input_ids[start] in special, start))
        start = end
    return tuple(pieces)


def account(opened: Opened) -> Facts:
    """Prepares all rows (or finds them prepared) and says what became of them."""
    job = opened.job
    data = store.prepare_data(job)
    accounts = {split: prepared.accounting for split, prepared in data.splits.items()}
    problems = find_data_problems(opened.model, job, data, opened.orders)
    size = sum(file.stat().st_size for file in data.folder.iterdir())
    made = f"made in {data.seconds:.1f} s" if data.made_now else f"found in {data.seconds:.1f} s"
    steps = describe_steps(
        job.config, len(data.splits["train"].dataset), opened.processes, data.splits["train"].accounting.streamed
    )
    template = describe_template(job.replaced, accounts["train"])
    return Facts(accounts, problems, steps, template, f"{data.folder} ({size / 1e6:,.1f} MB, {made})")


def describe_handed(row: Row) -> list[str]:
    """What rewards are given beside the model's answer, a column each."""
    return [f"{name}: {json.dumps(value, ensure_ascii=False, default=str)}" for name, value in row.handed.items()]


def as_json(row: Row) -> dict[str, Any]:
    """A row as JSON values; `source` and `row` are those of its first document, `rejected` is of pairs only."""
    documents = [dataclasses.asdict(document) for document in row.documents]
    for document in documents:
        document["turns"] = [{"role": role, "start": start} for role, start in document["turns"]]
    values = {
        "source": row.documents[0].source,
        "row": row.documents[0].row,
        "tokens": row.tokens,
        "input_ids": row.input_ids,
        "labels": row.labels,
        "documents": documents,
    }
    images = [{"path": image.name or None, "width": image.width, "height": image.height} for image in row.images]
    values |= {"images": images} if images else {}
    values |= {"label": row.label} if row.label is not None else {}
    values |= {"reward_columns": dict(row.handed)} if row.handed else {}
    return values | ({"rejected": as_json(row.rejected)} if row.rejected else {})
