"""From normalised rows to tokens and labels, by TRL's own code, with every lost row and token counted."""

import copy
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from recipe_runner.errors import UserError
from recipe_runner.recipe import Recipe

IGNORED = -100  # label of a token that is not in the loss (torch.nn.CrossEntropyLoss's ignore_index)
CHECKED_ROWS = 100  # rows whose masks are checked before the weights are loaded


@dataclass(frozen=True)
class Accounting:
    """What became of the rows of one split.

    Attributes:
        rows_read: Rows in the source, after `limit` and the evaluation split.
        rows_kept: Rows that are trained on, before packing.
        dropped: Reason -> number of rows.
        rows_truncated: Rows cut at `max_length`.
        tokens_truncated: Tokens cut off.
        tokens: Tokens in the kept rows.
        supervised_tokens: Those of them that are in the loss.
    """

    rows_read: int
    rows_kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    rows_truncated: int = 0
    tokens_truncated: int = 0
    tokens: int = 0
    supervised_tokens: int = 0

    def __str__(self) -> str:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        dropped = f"{sum(self.dropped.values()):,} dropped" + (f" ({reasons})" if reasons else "")
        cut = f"{self.rows_truncated:,} truncated" + (
            f" ({self.tokens_truncated:,} tokens lost)" if self.rows_truncated else ""
        )
        share = self.supervised_tokens / max(self.tokens, 1)
        tokens = f"{self.tokens:,} tokens, {self.supervised_tokens:,} supervised ({share:.0%})"
        return f"{self.rows_read:,} rows: {self.rows_kept:,} kept, {dropped}, {cut}; {tokens}"


@dataclass(frozen=True)
class PreparedSplit:
    """A split ready for the trainer.

    Attributes:
        dataset: Rows with `input_ids`, `labels` and, when packed, `seq_lengths`.
        accounting: What became of its rows.
    """

    dataset: Dataset
    accounting: Accounting


def prepare_split(
    rows: Dataset, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: SFTConfig, packing: bool, name: str
) -> PreparedSplit:
    """Tokenizes rows, builds labels, truncates or packs: TRL's own preparation, with every lost row and token counted.

    Args:
        rows: Normalised rows, from `sources.load_splits`.
        recipe: The recipe.
        tokenizer: With the chat template that is trained with.
        config: The trainer's configuration.
        packing: Whether to pack rows up to `config.max_length`.
        name: `train` or `eval`, for messages.

    Raises:
        UserError: No row is left, or the masks of the rows are wrong.
    """
    reasons_of_rows = rows["dropped"][:]
    reasons = Counter(reason for reason in reasons_of_rows if reason)
    kept = [index for index, reason in enumerate(reasons_of_rows) if not reason]
    if not kept:
        raise _nothing_left(recipe, name, reasons)
    usable = rows.remove_columns("dropped")
    usable = usable.select(kept) if reasons else usable
    tokenized = _tokenize(usable, recipe, tokenizer, config)
    check_masks(tokenized.select(range(min(CHECKED_ROWS, len(tokenized)))), recipe, tokenizer)

    cuts = config.max_length is not None and not (packing and config.packing_strategy != "bfd")
    limit = config.max_length if cuts else None
    lengths, supervised = measure_rows(tokenized, limit)
    learnable = np.flatnonzero(supervised)
    if lost := len(lengths) - len(learnable):
        reasons[f"without a supervised token within max_length ({limit})"] += lost
        tokenized = tokenized.select(learnable)
        lengths, supervised = lengths[learnable], supervised[learnable]
    if not len(learnable):
        raise _nothing_left(recipe, name, reasons)
    over = np.maximum(lengths - limit, 0) if limit else np.zeros_like(lengths)
    accounting = Accounting(
        rows_read=len(rows),
        rows_kept=len(lengths),
        dropped=dict(reasons),
        rows_truncated=int((over > 0).sum()),
        tokens_truncated=int(over.sum()),
        tokens=int((lengths - over).sum()),
        supervised_tokens=int(supervised.sum()),
    )
    if packing or over.any():
        tokenized = _upstream_preparation(tokenized, recipe, tokenizer, config, packing)
    return PreparedSplit(tokenized, accounting)


def _tokenize(rows: Dataset, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: SFTConfig) -> Dataset:
    """Tokens and labels of whole rows, neither truncated nor packed."""
    whole = copy.copy(config)
    whole.max_length = None
    whole.assistant_only_loss = recipe.values["dataset"]["train_on"] == "assistant"
    tokenized = _upstream_preparation(rows, recipe, tokenizer, whole, packing=False)
    return tokenized.select_columns(["input_ids", "labels"])


def _upstream_preparation(
    rows: Dataset, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: SFTConfig, packing: bool
) -> Dataset:
    """Calls `SFTTrainer._prepare_dataset` without a trainer, because a trainer would load the weights first.

    Source: trl/trainer/sft_trainer.py 1.16.0; of `self` the method reads only the three attributes given here, which
    `test_tokens.py` holds against a real trainer.
    """
    stand_in = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=None,  # the tokenizer already has the training template: see `model.load_tokenizer`
        completion_only_loss=recipe.values["dataset"]["train_on"] == "completion",
    )
    prepare: Any = SFTTrainer._prepare_dataset
    return prepare(stand_in, rows, tokenizer, config, packing, None, "")


def measure_rows(tokenized: Dataset, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of rows, and how many supervised tokens each has within the first `limit` tokens: arrays `(rows,)`."""
    lengths, supervised = [], []
    for batch in tokenized.select_columns(["labels"]).with_format("arrow").iter(batch_size=10_000):
        column = batch.column("labels").combine_chunks()
        offsets = column.offsets.to_numpy()
        learned = np.concatenate([[0], np.cumsum(column.values.to_numpy() != IGNORED)])
        ends = offsets[1:] if limit is None else np.minimum(offsets[1:], offsets[:-1] + limit)
        lengths.append(np.diff(offsets))
        supervised.append(learned[ends] - learned[offsets[:-1]])
    return np.concatenate(lengths), np.concatenate(supervised)


def check_masks(sample: Dataset, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks on real rows that every supervised span ends with a token that ends a turn or a text.

    A template may leave that token out of the assistant's mask: the loss looks healthy, and the model never stops.

    Args:
        sample: Tokenized rows, not yet truncated.
        recipe: The recipe.
        tokenizer: With the chat template that is trained with.

    Raises:
        UserError: A supervised span ends with content.
    """
    stops = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    for number, row in enumerate(sample, 1):
        last = None
        for token in [*row["labels"], IGNORED]:
            if token != IGNORED and (last is None or tokenizer.decode([token]).strip()):
                last = token  # white space after the end of a turn belongs to the template
            elif token == IGNORED and last is not None:
                if last not in stops:
                    text = tokenizer.decode([token for token in row["labels"] if token != IGNORED])
                    message = (
                        f"the supervised text of row {number} ends with {text[-30:]!r}, not with an end-of-turn token"
                    )
                    fix = (
                        "the model would not learn to stop: put that token inside {% generation %} in the chat template"
                    )
                    raise recipe.error("end-of-turn-masked", message, fix, "dataset", "train_on")
                last = None


def _nothing_left(recipe: Recipe, name: str, reasons: dict[str, int]) -> UserError:
    told = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
    return recipe.error("empty-dataset", f"no row of the {name} data can be used: {told}", "", "dataset", name)
