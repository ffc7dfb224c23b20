"""What is needed to make rows that the trainer is given."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from recipe_runner.data import sources
from recipe_runner.data.accounting import Tally
from recipe_runner.data.results import unwrap_results
from recipe_runner.data.sources import Source
from recipe_runner.data.thinking import fit_thoughts
from recipe_runner.problems.errors import user_error
from recipe_runner.recipe.sections import DatasetSection
from recipe_runner.stages import Stage


@dataclass(frozen=True)
class Replaced:
    """A chat template of the model's that another one, which marks the assistant's tokens, stands in for.

    Attributes:
        own: The model's template.
        name: What replaces it, for messages.
        known: Whether TRL knows the model's template by its source; else both were seen to render the same text.
    """

    own: str
    name: str
    known: bool


@dataclass(frozen=True)
class Job:
    """What is needed to make rows that the trainer is given.

    Attributes:
        stage: The training stage.
        dataset: The recipe's dataset section.
        seed: Of splits and shuffles.
        sources: The sources, opened.
        tokenizer: With the chat template that is trained with.
        config: The trainer's configuration, of the stage's class.
        replaced: The model's own chat template, where another is trained with.
    """

    stage: Stage
    dataset: DatasetSection
    seed: int
    sources: list[Source]
    tokenizer: PreTrainedTokenizerBase
    config: Any
    replaced: Replaced | None = None

    @property
    def limit(self) -> int | None:
        """Tokens of a row; None for no limit."""
        return getattr(self.config, "max_length", None)

    @property
    def unpairs(self) -> bool:
        """Whether rows are pairs, of which each answer is a row for the trainer, with a label."""
        return self.stage.shape == "unpaired" and self.dataset.format == "preference"

    def packing(self, split: str) -> bool:
        """Whether a split is packed."""
        packing, of_eval = getattr(self.config, "packing", False), getattr(self.config, "eval_packing", None)
        return bool(packing if split == "train" or of_eval is None else of_eval)

    def unpacked(self, split: str) -> "Job":
        """The same, with the rows of a split as they are."""
        if not self.packing(split):
            return self
        keys = {"packing": False} | ({"eval_packing": False} if hasattr(self.config, "eval_packing") else {})
        return replace(self, config=replace(self.config, **keys))

    def cuts(self, split: str) -> bool:
        """Whether rows longer than `max_length` lose tokens, rather than being split between packed rows."""
        return not (self.packing(split) and self.config.packing_strategy != "bfd")

    def tally(self) -> Tally:
        """Counters for a split."""
        names = sources.name_sources([source.section for source in self.sources])
        return Tally(self.limit, [source.name for source in self.sources], names)


def read_rows(job: Job, order: np.ndarray) -> list[dict[str, Any]]:
    """Some rows, `(rows, 2)` of source and row in it, in TRL's layout, as the chat template takes them.

    Raises:
        UserError: A row has the wrong shape.
    """
    rows = sources.read_rows(job.dataset, job.sources, order)
    if job.dataset.is_plain_text:
        return rows
    fitted = (fit_thoughts(row, job.dataset.thinking, job.tokenizer) for row in rows)
    return [unwrap_results(row, job.tokenizer) for row in fitted]


def drop_overlong(job: Job, lengths: np.ndarray, order: np.ndarray, tally: Tally) -> np.ndarray:
    """Which rows `on_overlong: drop` drops, counted: an array `(rows,)`; `order` `(rows, 2)` has source and row in it.

    Raises:
        UserError: A row is too long, and `on_overlong` is error.
    """
    limit, policy = job.limit, job.dataset.on_overlong
    long = lengths > limit if limit else np.zeros(len(lengths), dtype=bool)
    if policy == "error" and long.any():
        first = int(np.argmax(long))
        source, row = order[first]
        message = f"{job.sources[source].name}: {job.sources[source].call_row(row)} has {lengths[first]:,} tokens"
        fix = f"max_length is {limit:,}: raise it, or set on_overlong to truncate or drop"
        raise user_error("row-too-long", message, fix, path=("dataset", "on_overlong"))
    dropped = long & (policy == "drop")
    tally.drop(f"longer than max_length ({limit})", int(dropped.sum()))
    return dropped
