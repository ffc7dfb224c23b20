"""Which rows are trained on and which are held out, in which order."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset, concatenate_datasets, interleave_datasets

from recipe_runner.data.sources import Source
from recipe_runner.problems.errors import user_error
from recipe_runner.recipe.sections import DatasetSection

MOST_REPEATS = 100  # times all rows, that a mixture may have


def arrange_rows(
    dataset: DatasetSection, sources: list[Source], seed: int, lengths: Sequence[float] = ()
) -> dict[str, np.ndarray]:
    """Which rows are trained on and which are held out, in which order, by the recipe's seed.

    Only numbers are shuffled, split and mixed here (by `datasets`' own functions), so that the first rows are known
    without reading all.

    Args:
        dataset: For weights, epochs and what is held out.
        sources: Opened, those of the training data first.
        seed: Of shuffles and splits.
        lengths: Mean tokens of a row of each training source, where weights are shares of tokens.

    Returns:
        `train` and, when the recipe evaluates, `eval`: arrays `(rows, 2)` of source and row in it.

    Raises:
        UserError: A source is too small to be split.
    """
    indices = []
    for number, source in enumerate(sources):
        rows = Dataset.from_dict({"source": np.full(len(source.rows), number), "row": np.arange(len(source.rows))})
        if limit := source.section.limit:
            rows = rows.shuffle(seed=seed).select(range(min(limit, len(rows))))
        indices.append(rows)
    train, evaluation = indices[: len(dataset.train)], indices[len(dataset.train) :]
    if dataset.fraction is not None:
        # Split before mixing: mixing repeats rows, and a repeated row may not be on both sides.
        if min(len(rows) for rows in train) < 2:
            raise user_error("empty-dataset", "a source has one row: none can be held out", path=("dataset", "eval"))
        sizes = [max(1, round(len(rows) * dataset.fraction)) for rows in train]
        if any(size >= len(rows) for size, rows in zip(sizes, train, strict=True)):
            message = f"{dataset.fraction:g} of {min(map(len, train))} rows are all of them: none is left to train on"
            raise user_error("empty-dataset", message, "hold out less", path=("dataset", "eval"))
        parts = [rows.train_test_split(size, seed=seed) for rows, size in zip(train, sizes, strict=True)]
        train, evaluation = [part["train"] for part in parts], [part["test"] for part in parts]
    weights = [source.weight for source in dataset.train if source.weight is not None]
    if len(train) > 1 and weights:
        weights = [weight / length for weight, length in zip(weights, lengths or [1.0] * len(weights), strict=True)]
        shares = [weight / sum(weights) for weight in weights]
        needed, there = max(len(rows) / share for rows, share in zip(train, shares, strict=True)), sum(map(len, train))
        if needed > MOST_REPEATS * there:
            message = f"with these weights, {needed:,.0f} rows are drawn until each of {there:,} was seen"
            raise user_error("mixture-weight", message, "take weights that differ less", path=("dataset", "train"))
        mixed = interleave_datasets(train, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    else:
        taken = zip(train, dataset.train, strict=True)
        mixed = concatenate_datasets([_repeat(rows, source.epochs, seed) for rows, source in taken])
    orders = {"train": mixed} | ({"eval": concatenate_datasets(evaluation)} if evaluation else {})
    return {split: _as_array(rows) for split, rows in orders.items()}


def _repeat(rows: Dataset, epochs: float | None, seed: int) -> Dataset:
    """Rows as often as a source says: `2.5` is twice all, and half of them once more."""
    if epochs is None:
        return rows
    whole, rest = divmod(epochs, 1)
    if not round(epochs * len(rows)):
        message = f"{epochs:g} epochs of {len(rows)} rows are none"
        raise user_error("mixture-weight", message, "take more, or leave the source out", path=("dataset", "train"))
    more = rows.shuffle(seed=seed).select(range(round(rest * len(rows))))
    return concatenate_datasets([*[rows] * int(whole), more])


def _as_array(rows: Dataset) -> np.ndarray:
    columns = rows.with_format("numpy")[:]
    return np.stack([columns["source"], columns["row"]], axis=1)
