"""What became of the rows of a split: what was lost and why, how long rows are, what batching wastes."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTConfig, pack_dataset

from recipe_runner.pages.frame import describe_batches, describe_duplicates

BINS = 20  # of the length histogram
SIMULATED = 10_000  # rows that batching is simulated on


def list_reasons(dropped: Mapping[str, int]) -> str:
    """Why rows can't be trained on, and how many, in a line."""
    return "; ".join(f"{count:,} {reason}" for reason, count in dropped.items())


def find_too_many_dropped(dropped: Mapping[str, int], read: int, most: float, what: str) -> tuple[str, str] | None:
    """What is wrong with a data set of which too many rows can't be used, and what to do; None where it is not so.

    Args:
        dropped: Reason -> rows.
        read: Rows that were looked at.
        most: The share of them that may be dropped.
        what: They are: `train rows`.
    """
    lost = sum(dropped.values())
    if not read or lost / read <= most:
        return None
    found = f"{lost:,} of {read:,} {what} can't be used ({list_reasons(dropped)})"
    return found, f"fix the data, or allow it: dataset.max_dropped is {most:g}"


@dataclass(frozen=True)
class Accounting:
    """What became of the rows of one split.

    Attributes:
        rows_read: Rows in the source, after `limit` and the evaluation split.
        rows_kept: Rows that are trained on, before packing.
        dropped: Reason -> number of rows.
        rows_truncated: Rows cut at `max_length`.
        tokens_truncated: Tokens cut off.
        duplicates: Kept rows with the same tokens and labels as an earlier one.
        near_duplicates: Other kept rows that say nearly the same as an earlier one: see `data/similar.py`.
        tokens: Tokens of the kept rows that reach the model (of a pair: of both sequences).
        supervised_tokens: Those of them that are in the loss.
        lengths: Tokens of whole rows, before cutting: p50, p90, p99, max.
        histogram: `counts` of rows between `edges` of length, in tokens, before cutting.
        max_length: Where rows are cut, split or packed up to; None for nowhere.
        batches: Share of padding in batches of `random` rows and of rows `grouped` by length; `packed`: the share of
            packed rows that stays empty (which is not computed: bfd packing is padding-free); of training rows also
            `left`: the share of padding as the recipe makes batches.
        sources: Name, short name in metrics, rows and tokens of each source of a mixture.
        unused: Source -> its columns that no role takes.
        guessed: Source -> what was guessed of how it is written.
        doubts: What of the sources' rows may not be as they were meant.
        packed_rows: Rows after packing; 0 without.
        noted: What was found in rows, or done with them -> number of rows.
        parts: What rows are made of (turns of a role, calls, declared tools, thinking) -> rows that have it.
        lost_parts: Part -> those looked at that the chat template does not render; out of `looked_at`.
        looked_at: Part -> those looked at.
        firsts: Part that the template does not render, or empty thinking that is learned -> the first such row.
        rows_with_special_tokens: Rows whose text spells special tokens of the tokenizer.
        rows_with_two_bos: Rows that begin with two beginning-of-sequence tokens.
        empty_thoughts: Of the first rows, those that learn a block of thinking with nothing in it.
        ends: Tokens that end rows, of the first ones.
        changed_texts: Rows whose text is not what the model's own chat template makes of them.
        change: How the text of the first of them differs.
        rows_in_train: Of evaluation rows: those that are training rows, too, token by token.
        leaked: The first of them, each with the training row that it is.
        rows_near_train: Of evaluation rows: others that say nearly the same as a training row.
        nearly_leaked: The first of them, each with the training row that it is like.
        images: Images of the kept rows.
        image_tokens: Tokens that stand for parts of them.
        streamed: Whether these are the first rows of data that is read while it is trained on.
    """

    rows_read: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    rows_truncated: int = 0
    tokens_truncated: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    histogram: dict[str, list[int]] = field(default_factory=dict)
    max_length: int | None = None
    batches: dict[str, float] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    unused: dict[str, list[str]] = field(default_factory=dict)
    guessed: dict[str, str] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    packed_rows: int = 0
    noted: dict[str, int] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)
    lost_parts: dict[str, int] = field(default_factory=dict)
    looked_at: dict[str, int] = field(default_factory=dict)
    firsts: dict[str, str] = field(default_factory=dict)
    rows_with_special_tokens: int = 0
    rows_with_two_bos: int = 0
    empty_thoughts: int = 0
    ends: list[str] = field(default_factory=list)
    changed_texts: int = 0
    change: str = ""
    rows_in_train: int = 0
    leaked: list[str] = field(default_factory=list)
    rows_near_train: int = 0
    nearly_leaked: list[str] = field(default_factory=list)
    images: int = 0
    image_tokens: int = 0
    streamed: bool = False

    def __str__(self) -> str:
        reasons = list_reasons(self.dropped)
        dropped = f"{sum(self.dropped.values()):,} dropped" + (f" ({reasons})" if reasons else "")
        cut = f"{self.rows_truncated:,} truncated" + (
            f" ({self.tokens_truncated:,} tokens lost)" if self.rows_truncated else ""
        )
        twice = describe_duplicates(self.duplicates, self.near_duplicates)
        share = self.supervised_tokens / max(self.tokens, 1)
        tokens = f"{self.tokens:,} tokens, {self.supervised_tokens:,} supervised ({share:.0%})"
        seen = f"; {self.images:,} images, {self.image_tokens:,} of the tokens" if self.images else ""
        first = "streamed; the first " if self.streamed else ""
        lost = ", ".join(filter(None, (dropped, cut, twice)))
        return f"{first}{self.rows_read:,} rows: {self.rows_kept:,} kept, {lost}; {tokens}{seen}"

    def describe_lengths(self) -> str:
        """Lengths of rows against `max_length`, in a line."""
        quantiles = ", ".join(f"{name} {value:,}" for name, value in self.lengths.items())
        return f"{quantiles} tokens; max_length {f'{self.max_length:,}' if self.max_length else 'none'}"

    def describe_batches(self) -> str:
        """What padding costs, in a line."""
        return describe_batches(self.batches, self.max_length)

    def describe_sources(self) -> str:
        """Shares of the sources of a mixture, in a line."""
        told = []
        for source in self.sources:
            numbered = f" (loss/{source['short']})" if "#" in source["short"] else ""
            rows, tokens = source["rows"] / self.rows_kept, source["tokens"] / self.tokens
            told.append(f"{source['name']}{numbered} {rows:.0%} of rows, {tokens:.0%} of tokens")
        return "; ".join(told)

    def describe_noted(self) -> str:
        """What was found in rows, or done with them, in a line."""
        return "; ".join(f"{rows:,} rows {what}" for what, rows in self.noted.items())

    def describe_guessed(self) -> str:
        """How files are read that say nothing of it, in a line."""
        return "; ".join(f"{name}: {told} (guessed)" for name, told in self.guessed.items())

    def describe_unused(self) -> str:
        """Columns that are not used, in a line."""
        named = (
            ", ".join(f"'{column}'" for column in columns) + f" of {name}" for name, columns in self.unused.items()
        )
        return "; ".join(named)


@dataclass
class Tally:
    """Counts while rows go by, and makes the accounting at the end.

    Attributes:
        limit: Tokens of a row; None for no limit.
        source_names: The files or hub ids.
        short_names: What they are called in metrics.
        sketches: Of the kept rows: what finds those that say nearly the same.
        columns: What `add` takes of kept rows, in its order; the number of a source and of a row in place of `origin`.
    """

    limit: int | None
    source_names: list[str]
    short_names: list[str]
    read: int = 0
    packed_rows: int = 0
    special: int = 0
    two_bos: int = 0
    empty_thoughts: int = 0
    changed_texts: int = 0
    images: int = 0
    image_tokens: int = 0
    change: str = ""
    ends: set[str] = field(default_factory=set)
    dropped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    lost_parts: Counter[str] = field(default_factory=Counter)
    looked_at: Counter[str] = field(default_factory=Counter)
    firsts: dict[str, str] = field(default_factory=dict)
    sketches: list[np.ndarray] = field(default_factory=list)
    columns: dict[str, list[np.ndarray]] = field(
        default_factory=lambda: {
            name: [] for name in ("length", "tokens", "lost", "supervised", "source", "row", "hash")
        }
    )

    def merge(self, later: "Tally") -> None:
        """Adds what was counted of later rows."""
        counted = ("read", "packed_rows", "special", "two_bos", "empty_thoughts", "changed_texts")
        for name in (*counted, "images", "image_tokens"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.change = self.change or later.change
        self.ends |= later.ends
        self.firsts = later.firsts | self.firsts
        for name in ("dropped", "noted", "parts", "lost_parts", "looked_at"):
            getattr(self, name).update(getattr(later, name))
        self.sketches += later.sketches
        for name, arrays in later.columns.items():
            self.columns[name] += arrays

    def add(
        self,
        *,
        origin: np.ndarray,
        length: np.ndarray,
        tokens: np.ndarray,
        lost: np.ndarray,
        supervised: np.ndarray,
        hash: np.ndarray,
    ) -> None:
        """Adds kept rows.

        Args:
            origin: `(rows, 2)`: the source of each row, and its number there.
            length: `(rows,)`: of the whole row (of the longer answer's sequence, for a pair).
            tokens: `(rows,)`: those that reach the model.
            lost: `(rows,)`: tokens that cutting took away.
            supervised: `(rows,)`: tokens that are learned.
            hash: `(rows,)`: equal for rows that are equal, token by token.
        """
        values = (length, tokens, lost, supervised, origin[:, 0], origin[:, 1], hash)
        for column, added in zip(self.columns.values(), values, strict=True):
            column.append(added)

    def drop(self, reason: str, rows: int) -> None:
        """Counts rows that can't be trained on."""
        if rows:
            self.dropped[reason] += rows

    def finish(self) -> Accounting:
        """The accounting of all rows that went by, without `batches`."""
        columns = {name: np.concatenate(arrays) for name, arrays in self.columns.items()}
        lengths, kept, lost = columns["length"], columns["tokens"], columns["lost"]
        supervised, sources, hashes = columns["supervised"], columns["source"], columns["hash"]
        least, most = int(lengths.min()), int(lengths.max())
        least = 0 if least < most / 2 else least - 1
        counts, edges = np.histogram(lengths, bins=min(BINS, most - least), range=(least, most))
        used = np.unique(sources)
        return Accounting(
            rows_read=self.read,
            rows_kept=len(lengths),
            dropped=dict(self.dropped),
            rows_truncated=int((lost > 0).sum()),
            tokens_truncated=int(lost.sum()),
            duplicates=len(hashes) - len(np.unique(hashes)),
            tokens=int(kept.sum()),
            supervised_tokens=int(supervised.sum()),
            lengths={f"p{q}": int(np.percentile(lengths, q, method="higher")) for q in (50, 90, 99)}
            | {"max": int(lengths.max())},
            histogram={"counts": counts.tolist(), "edges": np.rint(edges).astype(int).tolist()},
            max_length=self.limit,
            sources=[
                {
                    "name": self.source_names[number],
                    "short": self.short_names[number],
                    "rows": int((sources == number).sum()),
                    "tokens": int(kept[sources == number].sum()),
                }
                for number in used
            ]
            if len(used) > 1
            else [],
            packed_rows=self.packed_rows,
            noted=dict(self.noted),
            parts=dict(self.parts),
            lost_parts=dict(self.lost_parts),
            looked_at=dict(self.looked_at),
            firsts=dict(self.firsts),
            rows_with_special_tokens=self.special,
            rows_with_two_bos=self.two_bos,
            empty_thoughts=self.empty_thoughts,
            changed_texts=self.changed_texts,
            change=self.change,
            images=self.images,
            image_tokens=self.image_tokens,
            ends=sorted(self.ends),
        )


def simulate_batches(lengths: np.ndarray, config: SFTConfig, split: str) -> dict[str, float]:
    """What padding would cost by each way of batching, as a share of tokens: see `Accounting.batches`.

    Source: transformers' LengthGroupedSampler (batches of device batch x accumulation) and TRL's `pack_dataset`.

    Args:
        lengths: Array `(documents,)` of tokens.
        config: For batch size, accumulation, seed and `max_length`, and for the way in which batches are made.
        split: `train` or `eval`.
    """
    chance = np.random.default_rng(config.seed)
    lengths = chance.permutation(lengths)[:SIMULATED]
    size = config.per_device_train_batch_size
    grouping = size * config.gradient_accumulation_steps
    generator = torch.Generator().manual_seed(config.seed)
    grouped = lengths[get_length_grouped_indices(lengths.tolist(), grouping, generator=generator)]
    shares = {"random": _padding(lengths, size), "grouped": _padding(grouped, size)}
    if config.max_length and hasattr(config, "packing"):  # pairs are not packed
        fitted = np.minimum(lengths, config.max_length)
        ends = np.concatenate([[0], np.cumsum(fitted)]).astype(np.int32)
        rows = pa.ListArray.from_arrays(pa.array(ends), np.zeros(ends[-1], dtype=np.int8))
        packed = pack_dataset(Dataset(pa.table({"input_ids": rows})), config.max_length, "bfd")
        shares["packed"] = 1 - int(fitted.sum()) / (len(packed) * config.max_length)
    if split == "train":
        way = "grouped" if config.train_sampling_strategy == "group_by_length" else "random"
        whole = getattr(config, "packing", False) or getattr(config, "padding_free", False)
        shares["left"] = 0.0 if whole else shares[way]
    return {name: round(float(share), 4) for name, share in shares.items()}


def _padding(lengths: np.ndarray, size: int) -> float:
    """Share of padding when rows are batched in this order."""
    padded = sum(
        int(lengths[at : at + size].max()) * len(lengths[at : at + size]) for at in range(0, len(lengths), size)
    )
    return 1 - int(lengths.sum()) / padded
