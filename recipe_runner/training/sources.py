"""Data sources: loading, choosing columns, splitting and mixing. The rows' layout is made by `formats`."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, disable_progress_bars, interleave_datasets, load_dataset
from datasets.exceptions import DatasetsError

from recipe_runner import formats
from recipe_runner.data_rules import BUILDERS, sources
from recipe_runner.errors import UserError, first_line
from recipe_runner.formats import RowError, normalise_row
from recipe_runner.problem import KeyPath
from recipe_runner.recipe import Recipe
from recipe_runner.validate import suggest

COLUMNS = {"instruction": ("instruction", "output"), "chat": ("messages",), "text": ("text",)}
# datasets' cache tells functions of a module by their names alone: without this it would serve rows made by older code.
CODE = hashlib.sha256(Path(formats.__file__).read_bytes()).hexdigest()


def load_splits(recipe: Recipe) -> tuple[Dataset, Dataset | None]:
    """Loads, normalises, splits and mixes the sources of a recipe, by its seed.

    Returns:
        Training and evaluation rows: `messages: list[{role, content}]`, or `prompt` and `completion` (both strings, or
        both lists of messages), or `text`; and `dropped`, the reason why a row can't be trained on, or ''.

    Raises:
        UserError: A source cannot be read, lacks a column, or has a row of the wrong shape.
    """
    disable_progress_bars()
    seed, held_out = recipe.values["run"]["seed"], recipe.values["dataset"].get("eval") or {}
    loaded = {path: load_source(recipe, source, path) for path, source in sources(recipe.values)}
    train = [rows for path, rows in loaded.items() if path[1] == "train"]
    evaluation = [rows for path, rows in loaded.items() if path[1] == "eval"]
    if "fraction" in held_out:
        # Split before mixing: mixing repeats rows, and a repeated row may not be on both sides.
        if min(len(rows) for rows in train) < 2:
            raise recipe.error("empty-dataset", "a source has one row: none can be held out", "", "dataset", "eval")
        sizes = [max(1, round(len(rows) * held_out["fraction"])) for rows in train]
        parts = [rows.train_test_split(size, seed=seed) for rows, size in zip(train, sizes, strict=True)]
        train, evaluation = [part["train"] for part in parts], [part["test"] for part in parts]
    weights = [source.get("weight") for path, source in sources(recipe.values) if path[1] == "train"]
    if len(train) > 1 and None not in weights:
        shares = [weight / sum(weights) for weight in weights]
        mixed = interleave_datasets(train, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    else:
        mixed = concatenate_datasets(train)
    return mixed, concatenate_datasets(evaluation) if evaluation else None


def load_source(recipe: Recipe, source: dict[str, Any], path: KeyPath) -> Dataset:
    """Loads one source and normalises its rows."""
    name, suffix = source["source"], Path(source["source"]).suffix
    try:
        if suffix in BUILDERS:
            options = {"sample_by": source["sample_by"]} if "sample_by" in source else {}
            rows = load_dataset(BUILDERS[suffix], data_files=name, split=source["split"], **options)
        else:
            rows = load_dataset(name, source.get("subset"), split=source["split"], revision=source.get("revision"))
    except (DatasetsError, OSError, ValueError, TypeError, KeyError, RuntimeError, StopIteration) as error:
        raise _explain_load_error(error, name, suffix, recipe, path) from error
    if not len(rows):
        raise recipe.error("empty-dataset", f"{name} has no rows", "", *path, "source")
    columns = choose_columns(recipe, source, rows.column_names, path)
    if "limit" in source:
        rows = rows.shuffle(seed=recipe.values["run"]["seed"]).select(range(min(source["limit"], len(rows))))
    rows = rows.select_columns(list(columns.values()))
    settings = {"dataset": recipe.values["dataset"], "columns": columns, "name": name, "code": CODE}
    try:
        normalise = partial(normalise_batch, **settings)
        return rows.map(normalise, batched=True, with_indices=True, remove_columns=rows.column_names)
    except RowError as error:
        raise recipe.error("wrong-row-shape", str(error), "", *path, "source") from error


def choose_columns(recipe: Recipe, source: dict[str, Any], available: list[str], path: KeyPath) -> dict[str, str]:
    """Maps each role of the format to a column that the data has.

    Raises:
        UserError: A column is missing; the message lists those there are.
    """
    form, given = recipe.values["dataset"]["format"], source.get("columns", {})
    columns = {role: given.get(role, role) for role in COLUMNS[form]}
    if form == "chat" and "messages" not in given and "messages" not in available and "conversations" in available:
        columns["messages"] = "conversations"  # ShareGPT's name
    if form == "instruction" and (column := given.get("input", "input" if "input" in available else None)):
        columns["input"] = column
    for role, column in columns.items():
        if column not in available:
            there = f"its columns: {', '.join(available)}"
            message = f"{source['source']} has no column '{column}' for the role '{role}'; {there}"
            hint = suggest(column, available) or f"set columns: {{{role}: NAME}}"
            raise recipe.error("missing-column", message, hint, *path, "columns", role)
    return columns


def normalise_batch(
    batch: dict[str, list], indices: list[int], dataset: dict[str, Any], columns: dict[str, str], name: str, code: str
) -> dict[str, list]:
    """Normalises rows to a layout of TRL's, as `Dataset.map` wants it: columns in, columns out.

    `code` is not used: it makes the cache of `Dataset.map` notice a changed version of formats.py.
    """
    rows = []
    for position, index in enumerate(indices):
        row = {role: batch[column][position] for role, column in columns.items()}
        rows.append(normalise_row(row, dataset, f"{name}: row {index + 1}"))
    return {key: [row[key] for row in rows] for key in rows[0]}


def _explain_load_error(error: Exception, name: str, suffix: str, recipe: Recipe, path: KeyPath) -> UserError:
    """Says which line of a local file is at fault, or why a hub dataset can't be had."""
    place = (*path, "source")
    if isinstance(error, StopIteration):  # datasets 5.2: a JSON file without rows
        return recipe.error("empty-dataset", f"{name} is empty", "", *place)
    if suffix in (".json", ".jsonl") and (found := _find_bad_json(Path(name))):
        return recipe.error("unreadable-data", found, "mend the file", *place)
    root: BaseException = error
    while suffix in BUILDERS and (root.__cause__ or root.__context__):
        root = root.__cause__ or root.__context__ or root
    what = first_line(root)
    if suffix in BUILDERS:
        return recipe.error("unreadable-data", f"cannot read {name}: {what}", "", *place)
    hint = "check the id, subset and split, and the network; or use a local file"
    return recipe.error("dataset-unavailable", f"cannot load the dataset '{name}': {what}", hint, *place)


def _find_bad_json(file: Path) -> str:
    """Where a JSON or JSON-lines file stops being one; empty when every row is an object."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        whole = stream.read(1) == "["
        stream.seek(0)
        number = 0
        try:
            if whole:
                wrong = [index for index, row in enumerate(json.load(stream), 1) if not isinstance(row, dict)]
                return f"{file}: item {wrong[0]} is no JSON object" if wrong else ""
            for number, line in enumerate(stream, 1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"{file}: line {number} is no JSON object"
        except json.JSONDecodeError as error:
            return f"{file}: line {error.lineno if whole else number}, column {error.colno}: {error.msg}"
    return ""
