"""Every row judged: how well a model predicts what each row teaches, before the training and after it.

The ledger is `rows.jsonl` in the run's folder, a line a row; `recipe-run preview --worst` shows the rows of it.
"""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from recipe_runner.data.accounting import list_reasons
from recipe_runner.data.job import Job, read_rows
from recipe_runner.data.prepare import prepare_chunks, shape_of
from recipe_runner.data.shapes.unpaired import take_side
from recipe_runner.data.similar import NUMBERS, find_similar, find_similar_among
from recipe_runner.data.tables import IGNORED
from recipe_runner.files import write_text
from recipe_runner.model.scores import Score, rate_sequences, score_sequences
from recipe_runner.preview.rows import check_unchanged, open_preview
from recipe_runner.problems.errors import user_error
from recipe_runner.results.target import Opened, Target, open_target
from recipe_runner.runs.ledger import FILE, KNOWN, Entry

Sequences = dict[str, tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Judged:
    """A row as it was trained on.

    Attributes:
        split: `train` or `eval`.
        source: File or hub id.
        number: Its number there, from 1.
        sequences: Answer (`chosen`, ...; empty where there is one) -> tokens and labels.
        label: Of a judged answer: whether it is a good one.
        sketch: What finds rows that say nearly the same.
        look: Makes what a vision model is given of the row with an answer; None where it shows no images.
    """

    split: str
    source: str
    number: int
    sequences: Sequences
    label: bool | None
    sketch: np.ndarray
    look: Callable[[str], dict[str, Any]] | None

    @property
    def digest(self) -> str:
        """Of all tokens and labels: rows with the same one teach the same."""
        return hashlib.sha256(json.dumps(self.sequences, sort_keys=True).encode()).hexdigest()


def write_ledger(
    target: Target, limit: int | None, dtype: str | None, quantized: bool, tell: Callable[[str], None]
) -> tuple[Path, list[Entry]]:
    """Judges every row of a run by the model before and after it, and writes the ledger into its folder.

    Args:
        target: A run.
        limit: The most rows of each split.
        dtype: Of the weights.
        quantized: Whether the base is quantized as in training.
        tell: Is told what was done.

    Raises:
        UserError: It is no run, its data has changed, or the stage has no rows that say what is to be learned.
    """
    recipe = target.recipe
    if target.run is None or recipe is None:
        message = f"{target.name} is no run: which rows it was trained on is not known"
        raise user_error("no-ledger", message, "name a completed run")
    if recipe.stage.generates:
        message = f"the stage {recipe.stage.name} writes its own answers: its rows say none"
        raise user_error("no-ledger", message, "see completions.jsonl, which has every answer with its rewards")
    opened = open_preview(recipe, 1)
    check_unchanged(opened, target.run)
    rows, dropped = [], Counter[str]()
    for split, order in opened.orders.items():
        rows += list(read_judged(opened.job, split, order, limit, dropped))
    if dropped:
        tell(f"not in it: {sum(dropped.values()):,} rows that can't be used ({list_reasons(dropped)})")
    model = open_target(target, dtype, quantized, scores=recipe.stage.scores)
    after = _measure(model, rows, recipe.stage.scores)
    tell(f"after: {len(rows):,} rows")
    before: list[dict[str, float]] = [{} for _ in rows]
    if not recipe.stage.scores:  # the head of a reward model is made by its training
        if not target.holds_base:
            del model  # one model in memory
            model = open_target(target, dtype, quantized, base=True)
        with model.model.disable_adapter() if target.holds_base else nullcontext():
            before = _measure(model, rows, scores=False)
        tell(f"before: {len(rows):,} rows")
    entries = list(_compare(rows, before, after))
    file = target.run / FILE
    write_text(file, "".join(json.dumps(dataclasses.asdict(entry), ensure_ascii=False) + "\n" for entry in entries))
    return file, entries


def read_judged(job: Job, split: str, order: np.ndarray, limit: int | None, dropped: Counter[str]) -> Iterator[Judged]:
    """The rows of a split that can be used, each once, as the trainer would get them, unpacked; counts the others."""
    job, order = job.unpacked(split), np.unique(order, axis=0)[:limit]  # a mixture repeats rows
    shape = shape_of(job.stage)
    tally = job.tally()
    with prepare_chunks(job, split, order, tally) as tables:
        for table in tables:
            entries = table.to_pylist()
            part = order[[entry["documents"][0] for entry in entries]]
            reads = "label" in table.column_names or job.dataset.images
            raws = read_rows(job, part) if reads else [{}] * len(entries)
            places = zip(entries, part, raws, tally.sketches[-1], strict=True)
            for entry, (source, number), raw, sketch in places:
                raw = take_side(raw, entry["label"] == [1]) if "label" in entry else raw
                look = partial(shape.inputs_of, entry, job) if raw.get("images") else None
                sequences = shape.as_trained(entry, job)
                place = (split, job.sources[source].name, int(number) + 1)
                yield Judged(*place, sequences, raw.get("label"), sketch, look)
    dropped.update(tally.dropped)


def _measure(opened: Opened, rows: Sequence[Judged], scores: bool) -> list[dict[str, float]]:
    """Of each row, for each answer: its loss a token and its log-probability, or what a reward model gives it."""
    found: list[dict[str, float]] = [{} for _ in rows]
    for answer in rows[0].sequences if rows else ():
        if scores:
            for row, value in zip(
                found, rate_sequences(opened.model, [row.sequences[answer][0] for row in rows]), strict=True
            ):
                row[answer] = value
            continue
        seen = [partial(row.look, answer) if row.look else None for row in rows]
        made: list[Score] = score_sequences(opened.model, [row.sequences[answer] for row in rows], seen)
        for row, score in zip(found, made, strict=True):
            row[answer] = -score.loss
            row.setdefault("loss", score.loss / max(score.tokens, 1))
    return found


def _compare(
    rows: Sequence[Judged], before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]
) -> Iterator[Entry]:
    first: dict[str, Judged] = {}
    trained = {row.digest for row in rows if row.split == "train"}
    alike = _find_alike(rows)
    for row, old, new, like in zip(rows, before, after, alike, strict=True):
        digest, flags = row.digest, []
        answers = list(row.sequences)
        margin = None
        if len(answers) == 2:
            chosen, rejected = answers
            margin = (new[chosen] - new[rejected]) - (old.get(chosen, 0.0) - old.get(rejected, 0.0))
        if digest in first and first[digest].split == row.split:
            flags.append(f"the same as row {first[digest].number} of {first[digest].source}")
        elif like and like.split == row.split:
            flags.append(f"nearly the same as row {like.number} of {like.source}")
        first.setdefault(digest, row)
        if row.split == "eval" and digest in trained:
            flags.append("trained on")
        elif like and like.split != row.split:
            flags.append(f"nearly the same as row {like.number} of {like.source}, which was trained on")
        ids, labels = row.sequences[answers[0]]
        supervised = sum(label != IGNORED for label in labels)
        was, now = _finite(old.get("loss")), _finite(new.get("loss"))
        if margin is None and was is not None and now is not None and row.label is not False:
            if was < KNOWN:
                flags.append("known before")
            elif now >= was:
                flags.append("not learned")
        if margin is not None and margin <= 0:
            flags.append("not learned")
        place = (row.split, row.source, row.number)
        yield Entry(*place, len(ids), supervised, was, now, _finite(margin), row.label, flags)


def _find_alike(rows: Sequence[Judged]) -> list[Judged | None]:
    """For each row one that says nearly the same: a training row, or else an earlier one of its split."""
    found: list[Judged | None] = []
    sketches = {
        split: np.array([row.sketch for row in rows if row.split == split], dtype=np.uint8).reshape(-1, NUMBERS)
        for split in ("train", "eval")
    }
    for split, own in sketches.items():
        among = [row for row in rows if row.split == split]
        trained = [row for row in rows if row.split == "train"]
        within = find_similar(own)
        between = find_similar_among(own, sketches["train"]) if split == "eval" else np.full(len(own), -1)
        for earlier, other in zip(within, between, strict=True):
            found.append(trained[other] if other >= 0 else among[earlier] if earlier >= 0 else None)
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
