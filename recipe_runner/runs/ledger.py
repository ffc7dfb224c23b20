"""The row ledger of a run: `rows.jsonl`, a line a row, with its loss before the training and after it."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recipe_runner.problems.errors import user_error

FILE = "rows.jsonl"
KNOWN = 0.05  # nats a token: below it, a row had nothing to teach before the first step (each token has 95 %)


@dataclass(frozen=True)
class Entry:
    """A row.

    Attributes:
        split: `train` or `eval`.
        source: File or hub id.
        row: Its number there, from 1.
        tokens: Of the row (of a pair: with the better answer).
        supervised: Those of them that are learned.
        before: Mean loss of those tokens before the training, in nats; None where it is not known.
        after: The same after it.
        margin: Of pairs: by how much the training made the better answer likelier than the other, in nats; of a reward
            model what it gives the better one beyond the other.
        label: Of a judged answer: whether it is a good one.
        flags: What is conspicuous about it, in words.
    """

    split: str
    source: str
    row: int
    tokens: int
    supervised: int
    before: float | None
    after: float | None
    margin: float | None = None
    label: bool | None = None
    flags: Sequence[str] = field(default_factory=list)

    @property
    def learned(self) -> float:
        """How well it was learned, the more the better.

        Of pairs the margin; of judged answers what they became likelier, or less likely where they are bad; else minus
        the loss after the training.
        """
        if self.margin is not None:
            return self.margin
        if self.label is not None and self.before is not None and self.after is not None:
            return (self.before - self.after) * (1 if self.label else -1)
        return -self.after if self.after is not None else float("-inf")

    def describe(self) -> str:
        """In a line."""
        losses = [f"{value:.3f}" if value is not None else "?" for value in (self.before, self.after)]
        told = f"loss {losses[0]} before, {losses[1]} after" if self.margin is None else f"margin {self.margin:+.3f}"
        return f"{told}; {self.supervised:,} of {self.tokens:,} tokens learned" + "".join(f"; {f}" for f in self.flags)


def read_ledger(run: Path) -> list[Entry]:
    """The ledger of a run.

    Raises:
        UserError: It has none, or it is damaged.
    """
    file = run / FILE
    if not file.is_file():
        fix = f"make it: recipe-run evaluate {run} --rows"
        raise user_error("no-ledger", f"{run} has no ledger of its rows ({FILE})", fix)
    try:
        return [Entry(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise user_error(
            "no-ledger", f"{file} is damaged", f"make it again: recipe-run evaluate {run} --rows"
        ) from error


def find_worst(entries: Sequence[Entry], number: int) -> list[Entry]:
    """The rows of the training data that were learned the least, the worst first."""
    return sorted((entry for entry in entries if entry.split == "train"), key=lambda entry: entry.learned)[:number]


SAME, NEAR = "the same as another", "nearly the same as another"
TRAINED, NEAR_TRAINED = "trained on, too", "nearly the same as one that was trained on"
SHORT = ("not learned", "known before", SAME, NEAR, TRAINED, NEAR_TRAINED)  # as they are counted, in this order


def _shorten(flag: str) -> str:
    """A flag without which row it names."""
    if flag.startswith("nearly the same as"):
        return NEAR_TRAINED if flag.endswith("which was trained on") else NEAR
    return SAME if flag.startswith("the same as") else TRAINED if flag == "trained on" else flag


def summarize(entries: Sequence[Entry]) -> str:
    """What the ledger says of all rows, in lines."""
    lines = []
    for split in dict.fromkeys(entry.split for entry in entries):
        rows = [entry for entry in entries if entry.split == split]
        means = [
            sum(found) / len(found) if (found := [x for x in values if x is not None]) else None
            for values in ([entry.before for entry in rows], [entry.after for entry in rows])
        ]
        told = f"mean loss {means[0]:.3f} before, {means[1]:.3f} after" if None not in means else ""
        counts = Counter(_shorten(flag) for entry in rows for flag in entry.flags)
        flags = "; ".join(f"{counts[told]:,} {told}" for told in SHORT if counts[told])
        lines.append(f"{split}: {len(rows):,} rows" + "".join(f"; {part}" for part in (told, flags) if part))
    return "\n".join(lines)
