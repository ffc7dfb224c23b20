"""Data that is read while it is trained on: a window of rows after the other, each prepared as all data is.

A reader knows where it is: in which pass over each source, how many of its rows it had, and how many rows it gave to
the trainer before the window that it is in. A run goes on from there, without preparing again what was trained on.
"""

import collections
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset

from recipe_runner.data.accounting import Accounting, find_too_many_dropped, list_reasons
from recipe_runner.data.columns import check_streamed_row
from recipe_runner.data.job import Job
from recipe_runner.data.marks import mark_sources
from recipe_runner.data.prepare import prepare_chunk, shape_of
from recipe_runner.data.reading import stream_rows
from recipe_runner.data.sources import Source
from recipe_runner.data.tables import check_vocabulary, pack
from recipe_runner.problems.errors import user_error

WINDOW = 1_000  # rows that are read, mixed and packed at a time
COUNTED = ("rows_read", "rows_kept", "rows_truncated", "tokens_truncated", "tokens", "supervised_tokens", "packed_rows")


@dataclass(frozen=True)
class Place:
    """Where a reader is in a source.

    Attributes:
        passes: How often it was read to its end.
        rows: How many rows of the pass the reader had.
        drawn: How many rows the reader had in all.
    """

    passes: int = 0
    rows: int = 0
    drawn: int = 0


@dataclass(frozen=True)
class Position:
    """Where a reader is, at the begin of a window.

    Attributes:
        window: Its number.
        given: Rows (packed ones, where they are packed) that the trainer was given before.
        places: Of each source.
        counted: What became of all rows before, in numbers.
        dropped: Reason -> rows before that could not be trained on.
    """

    window: int = 0
    given: int = 0
    places: Sequence[Place] = ()
    counted: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Position":
        """From JSON values.

        Raises:
            KeyError: One is missing.
            TypeError: They are no position's.
        """
        return Position(**{**values, "places": [Place(**place) for place in values["places"]]})

    def describe(self) -> str:
        """What was read, in a line."""
        counted, lost = self.counted, sum(self.dropped.values())
        why = list_reasons(self.dropped)
        passes = max((place.passes for place in self.places), default=0)
        again = f"; read to the end {'once' if passes == 1 else f'{passes:,} times'}" if passes else ""
        dropped = f"{lost:,} dropped" + (f" ({why})" if why else "")
        rows = f"{counted.get('rows_read', 0):,} rows read: {counted.get('rows_kept', 0):,} kept, {dropped}"
        cut = f"{counted.get('rows_truncated', 0):,} truncated ({counted.get('tokens_truncated', 0):,} tokens lost)"
        learned = f"{counted.get('tokens', 0):,} tokens, {counted.get('supervised_tokens', 0):,} supervised"
        return f"{rows}, {cut}; {learned}{again}"


class Window:
    """Some rows of a source, by column."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
        self.cells = {column: [row.get(column) for row in rows] for column in columns}
        self.count = len(rows)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, numbers: Sequence[int]) -> dict[str, list[Any]]:
        """Cells of rows by their numbers."""
        return {column: [cells[number] for number in numbers] for column, cells in self.cells.items()}


class Reader:
    """The rows of a process, from a position on, without end: a source that was read to its end begins anew."""

    def __init__(self, job: Job, number: int, count: int, known: int, marked: bool, begin: Position, skip: int) -> None:
        """Sets where it begins.

        Args:
            job: Stage, sources, tokenizer, configuration.
            number: Which reader this is.
            count: How many there are.
            known: Tokens that the model has.
            marked: Whether rows say of which sources they are.
            begin: The begin of the window that it is in.
            skip: Rows of that window that the trainer had.
        """
        self.marked = marked
        self.job, self.number, self.count, self.known, self.skip = job, number, count, known, skip
        sources = job.sources[: len(job.dataset.train)]
        self.sources = sources
        self.begin = self.now = begin if begin.places else replace(begin, places=[Place() for _ in sources])
        self.begun = collections.deque([self.now], maxlen=64)  # positions of the last windows
        weights = [source.section.weight or 1.0 for source in sources]
        self.shares = np.array(weights) / sum(weights)
        self.rows: list[Iterator[tuple[str, dict[str, Any]]]] = []
        self.columns = [frozenset([*source.rows.column_names, *source.unused]) for source in sources]

    def _open(self, place: Place, which: int) -> Iterator[tuple[str, dict[str, Any]]]:
        return stream_rows(self.sources[which].section, self.number, self.count, place.rows)

    def find(self, given: int) -> tuple[Position, int]:
        """The begin of the window that is in the trainer's hands after so many rows, and how many are of it."""
        last = max((position for position in self.begun if position.given <= given), key=lambda at: at.given)
        return last, given - last.given

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows from where it begins: TRL looks at the first one before it trains."""
        self.now, skip = self.begin, self.skip
        self.begun.clear()
        self.rows = [self._open(place, which) for which, place in enumerate(self.now.places)]
        empty_since = self._count_passes()
        while True:
            self.begun.append(self.now)
            given = self.now.given
            yield from itertools.islice(self._prepare(self.now), skip, None)
            skip = 0
            if self.now.given > given:
                empty_since = self._count_passes()
            elif self._count_passes() > empty_since + 1:  # a whole pass, and the rest of the one before
                which = f" for reader {self.number + 1} of {self.count}" if self.count > 1 else ""
                message = f"no row of the train data can be used{which}: {list_reasons(self.now.dropped)}"
                raise user_error(
                    "empty-dataset", message, "fix the data, or take fewer processes", path=("dataset", "train")
                )

    def _count_passes(self) -> int:
        """How often the source that was read the most often was read to its end."""
        return max(place.passes for place in self.now.places)

    def _prepare(self, position: Position) -> Dataset:
        """The rows of a window as the trainer takes them."""
        windows, places = [], []
        for which, source in enumerate(self.sources):
            # as many as bring what was drawn of it to its share of all
            wanted = int(self.shares[which] * WINDOW * (position.window + 1)) - position.places[which].drawn
            window, place = self._draw(which, source, wanted, position.places[which])
            windows.append(window)
            places.append(place)
        job = replace(self.job, sources=[*windows, *self.job.sources[len(windows) :]])
        order = np.concatenate(
            [np.stack([np.full(len(of.rows), which), np.arange(len(of.rows))], 1) for which, of in enumerate(windows)]
        )
        chance = np.random.default_rng([self.job.seed, self.number, position.window])
        order = order[chance.permutation(len(order))]
        table, tally = prepare_chunk(job, "train", order, 0, position.window == 0, sketched=False)
        if job.packing("train") and len(table):
            table = pack(table, job.config)
            tally.packed_rows = len(table)
        check_vocabulary(table, self.known, self.job.tokenizer.name_or_path)
        some = any(map(len, tally.columns["length"]))
        made = tally.finish() if some else Accounting(rows_read=tally.read, dropped=dict(tally.dropped))
        self.now = self._count(position, places, made, len(table))
        rows = Dataset(table.combine_chunks())
        rows = shape_of(job.stage).finish(rows, made, job.config)
        return mark_sources(rows, order) if self.marked else rows

    def _draw(self, which: int, source: Source, wanted: int, place: Place) -> tuple[Source, Place]:
        found: list[dict[str, Any]] = []
        names: list[str] = []
        section = self.job.dataset.of(source.section)
        while len(found) < wanted:
            before = len(found)
            for name, row in self.rows[which]:
                check_streamed_row(section, source.section, source.columns, self.columns[which], row, name)
                found.append(row)
                names.append(name)
                if len(found) == wanted:
                    break
            place = replace(place, rows=place.rows + len(found) - before, drawn=place.drawn + len(found) - before)
            if len(found) < wanted:
                if not place.rows:
                    message = f"{source.name} has no row for reader {self.number + 1} of {self.count}"
                    raise user_error("empty-dataset", message, "take fewer processes, or more data", path=source.path)
                place = replace(place, passes=place.passes + 1, rows=0)
                self.rows[which] = self._open(place, which)
        window = Window(found, list(dict.fromkeys(source.columns.values())))
        return replace(source, rows=window, numbered=names), place

    def _count(self, position: Position, places: list[Place], made: Accounting, given: int) -> Position:
        """Where the next window begins, and what became of all rows up to there.

        Raises:
            UserError: More rows were dropped than may be.
        """
        counted = {key: position.counted.get(key, 0) + getattr(made, key) for key in COUNTED}
        dropped = dict(collections.Counter(position.dropped) + collections.Counter(made.dropped))
        most, what = self.job.dataset.max_dropped, "train rows up to here"
        if found := find_too_many_dropped(dropped, counted["rows_read"], most, what):
            raise user_error("too-many-dropped", *found, path=("dataset", "max_dropped"))
        return Position(position.window + 1, position.given + given, places, counted, dropped)


def stream(readers: Sequence[Reader], features: Features) -> IterableDataset:
    """What the trainer takes: each process reads its own part.

    Args:
        readers: Of all processes; each process iterates over its own.
        features: Of the rows.
    """

    def generate(numbers: list[int]) -> Iterator[dict[str, Any]]:
        for number in numbers:
            yield from readers[number]

    made: IterableDataset = IterableDataset.from_generator(
        generate, features=features, gen_kwargs={"numbers": list(range(len(readers)))}
    )
    return made
