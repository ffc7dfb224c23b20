"""A recipe at smoke's size: what is changed in it, and nothing else."""

import contextlib
import copy
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import datasets

from recipe_runner.data import store
from recipe_runner.data.columns import choose_columns
from recipe_runner.data.look import texts_of
from recipe_runner.problems.problem import KeyPath, join_path
from recipe_runner.recipe.local import is_file_source
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.sections import SourceSection
from recipe_runner.smoke.rows import Rows, Wanted, find_rows, is_local, lengthen, work_out, write_rows
from recipe_runner.smoke.stand_in import StandIn, build_stand_in, write_judge

LEAST_ROWS, MOST_ROWS = 24, 96
HELD_OUT = 4  # rows at least that are evaluated, of rows that stand in for the data
SHOWN = 3  # rows that a person looks at
ANSWER = 24  # tokens of an answer at most, where the model answers while it trains
TEXTS = 2000  # that a tokenizer is learned from
Found = list[tuple[SourceSection, Rows]]  # the sources of a recipe, each with its rows
SPLITTING = ("bfd_split", "wrapped")  # ways to pack that split long documents
LONG = 6  # characters of a document for each token of a row: it is longer than the row
KERNELS = ("flash_attention_2", "flash_attention_3", "flex_attention")  # of a GPU


@dataclass
class Small:
    """A recipe that can be run here, and what is known of it.

    Attributes:
        recipe: As it is run.
        stand_in: What stands in for its model.
        changed: Key -> what it is instead, in words.
        wanted: What its rows should teach.
        rows: Number of rows of each split's sources.
        told: Where the rows come from.
    """

    recipe: Recipe
    stand_in: StandIn
    changed: dict[KeyPath, str] = field(default_factory=dict)
    wanted: list[Wanted] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    told: str = ""


def shrink_recipes(recipes: Sequence[Recipe], folder: Path, steps: int, on_cpu: bool) -> list[Small]:
    """Recipes with a small model, few rows and few steps; every other key is as it was.

    Args:
        recipes: Resolved ones that train: one, or the stages of a pipeline, which begin with the same model.
        folder: For the model, the rows and the runs.
        steps: Of the optimizer.
        on_cpu: Whether there is no GPU here.

    Raises:
        UserError: Nothing is known of the model, or rows can't be read.
    """
    found = [
        _lengthen(
            recipe,
            _find_rows(recipe, recipe.dataset.sources, {"train": _count_rows(recipe, steps), "eval": LEAST_ROWS}),
        )
        for recipe in recipes
    ]
    named = [count_layers(recipe.values) for recipe in recipes]
    layers = [count for count in named if count is not None]
    stand_in = _build_stand_in(recipes[0], found, folder, max(layers) if len(layers) == len(named) else None)
    return [
        _shrink(recipe, stand_in, rows, folder / f"rows-{number}", steps, on_cpu)
        for number, (recipe, rows) in enumerate(zip(recipes, found, strict=True), 1)
    ]


def _shrink(recipe: Recipe, stand_in: StandIn, found: Found, folder: Path, steps: int, on_cpu: bool) -> Small:
    values, small = _replace(recipe, stand_in, found, folder)
    small.changed[("model", "name_or_path")] = stand_in.told
    small.changed[("model", "revision")] = "of the stand-in"
    if values["model"].get("attn_implementation") in KERNELS and on_cpu:
        _change(values, small, ("model", "attn_implementation"), "sdpa")
    if values["model"].get("adapter"):  # it fits the real model
        _change(values, small, ("model", "adapter"), None)
    for source, rows in found:
        head = {column: [row.get(column) for row in rows.entries[:20]] for column in rows.entries[0]}
        dataset = recipe.dataset.of(source)
        columns = choose_columns(source, dataset.format, head)
        split, unpairs = str(source.path[1]), recipe.stage.shape == "unpaired" and "chosen" in columns
        small.wanted.append(work_out(dataset, split, columns, rows.entries, unpairs))
        small.rows[split] = small.rows.get(split, 0) + len(rows.entries) * (1 + unpairs)
    fraction, read = recipe.dataset.fraction, small.rows["train"]
    if fraction and fraction * read < HELD_OUT and not any(is_file_source(source.source) for source, _ in found):
        _change(values, small, ("dataset", "eval", "fraction"), HELD_OUT / read)
    _shrink_training(values, small, recipe, steps, on_cpu)
    _shrink_method(values, small)
    _replace_judges(values, small, recipe, folder)
    values["run"]["output_dir"] = str(folder.parent / "runs")
    small.changed[("run", "output_dir")] = "a folder of smoke's"
    small.recipe = dataclasses.replace(recipe, values=values)
    return small


def sample_recipe(recipe: Recipe, folder: Path) -> tuple[Recipe, str]:
    """A recipe with a few rows in the layout of its data, and a tokenizer that stands in for its model's: for a look.

    Args:
        recipe: A resolved recipe that trains.
        folder: For the stand-in and the rows.

    Returns:
        The recipe; and what stands in for what, for people.

    Raises:
        UserError: Nothing is known of its model, or its rows can't be read.
    """
    found = _find_rows(recipe, recipe.dataset.train, {"train": SHOWN})
    stand_in = _build_stand_in(recipe, [found], folder, 0)
    values, small = _replace(recipe, stand_in, found, folder / "rows")
    values["dataset"].pop("eval", None)
    told = f"{small.told}; {stand_in.told.partition('; ')[2]}"
    return dataclasses.replace(recipe, values=values), told


def _find_rows(recipe: Recipe, sources: Sequence[SourceSection], counts: Mapping[str, int]) -> Found:
    return [(source, find_rows(recipe, source, counts[str(source.path[1])])) for source in sources]


def _lengthen(recipe: Recipe, found: Found) -> Found:
    """Makes one row of each source longer than a row may be, where such rows are cut or split."""
    training = recipe.training
    limit = training["max_length"]
    if not limit or recipe.dataset.on_overlong != "truncate" or training["truncation_mode"] == "keep_end":
        return found
    return [(source, lengthen(source, recipe.dataset.of(source).format, rows, LONG * limit)) for source, rows in found]


def _build_stand_in(recipe: Recipe, found: Sequence[Found], folder: Path, layers: int | None) -> StandIn:
    """The model that stands in for a recipe's, with a tokenizer for the texts of all rows."""
    share = TEXTS // len(found)
    texts = [[text for _, rows in of for row in rows.entries for text in texts_of(row)][:share] for of in found]
    return build_stand_in(
        recipe.model, list(itertools.chain(*texts)), folder / "model", layers, bool(recipe.dataset.images)
    )


def _replace(recipe: Recipe, stand_in: StandIn, found: Found, folder: Path) -> tuple[dict[str, Any], Small]:
    """A recipe's values with the stand-in for its model and rows for its data, and what was changed."""
    values = copy.deepcopy(dict(recipe.values))
    small = Small(recipe, stand_in)
    small.told = ", ".join(dict.fromkeys(rows.told for _, rows in found))
    values["model"]["name_or_path"] = str(stand_in.folder)
    folder.mkdir()
    for number, (source, rows) in enumerate(found):
        _replace_source(values, small, source, rows, folder / f"{number}.jsonl")
    return values, small


def _find_layer_numbers(values: Mapping[str, Any]) -> list[str]:
    """Where a recipe names layers by number: the small model then has all of them."""
    peft, found = values.get("peft") or {}, []
    if peft.get("layers_to_transform") is not None or peft.get("layer_replication"):
        found.append("peft.layers_to_transform")
    named = [*(values.get("unfreeze") or []), *_texts(peft.get("target_modules")), *_texts(peft.get("exclude_modules"))]
    return found + [name for name in named if re.search(r"\d", name)]


def count_layers(values: Mapping[str, Any]) -> int | None:
    """How many layers the small model must have: `layers[-8:]` takes nine, so that one is frozen.

    Returns:
        0 where it names none; None for all that the model has.
    """
    named, most = _find_layer_numbers(values), 0
    for name in named:
        found = re.fullmatch(r"layers\[-(\d+):?\]", name)
        if not found:
            return None
        most = max(most, int(found[1]) + 1)
    return most


def _texts(value: Any) -> Sequence[str]:
    return [value] if isinstance(value, str) else value or []


def _count_rows(recipe: Recipe, steps: int) -> int:
    """How many rows are made: enough for the steps, where that is few."""
    of_step: int = recipe.training["per_device_train_batch_size"] * recipe.training["gradient_accumulation_steps"]
    return max(LEAST_ROWS, min(MOST_ROWS, of_step * steps))


def _change(values: dict[str, Any], small: Small, path: KeyPath, value: Any) -> None:
    """Sets a key to another value, or takes it out (None), and notes it."""
    section: Any = values
    part: Any
    for part in path[:-1]:
        section = section.setdefault(part, {}) if isinstance(section, dict) else section[part]  # of a mixture's sources
    if section.get(path[-1]) == value:
        return
    if value is None:
        section.pop(path[-1], None)
    else:
        section[path[-1]] = value
    small.changed[path] = "left out" if value is None else str(value)


def _replace_source(values: dict[str, Any], small: Small, source: SourceSection, rows: Rows, file: Path) -> None:
    """Puts rows in the place of data on the hub; a file of the recipe's own stays."""
    if is_local(source):
        return
    write_rows(rows, file)
    entry: Any = values
    for part in source.path:
        entry = entry[part]
    for key in ("subset", "revision"):
        entry.pop(key, None)
    entry |= {"source": str(file), "split": "train"}
    for key in ("source", "split", "subset", "revision"):
        small.changed[(*source.path, key)] = rows.told
    if entry.get("limit", 0) > len(rows.entries):
        _change(values, small, (*source.path, "limit"), None)


def _shrink_training(values: dict[str, Any], small: Small, recipe: Recipe, steps: int, on_cpu: bool) -> None:
    said = values["training"]
    every = max(steps - 1, 1)  # a checkpoint before the last step: the run is resumed from there
    wanted: dict[str, Any] = {"max_steps": steps, "save_strategy": "steps", "save_steps": every, "logging_steps": 1}
    wanted |= {"logging_strategy": "steps", "save_total_limit": 3}
    if recipe.dataset.has_eval:
        wanted |= {"eval_strategy": "steps", "eval_steps": every}
    if said.get("warmup_steps", 0) >= 1:  # below 1 it is a share of the steps
        wanted["warmup_steps"] = 1
    if said.get("report_to"):
        wanted["report_to"] = "none"
    if on_cpu:
        wanted["use_cpu"] = True
        wanted |= {key: None for key in ("fp16", "tf32") if said.get(key)}
    for key, value in wanted.items():
        _change(values, small, ("training", key), value)


def _shrink_method(values: dict[str, Any], small: Small) -> None:
    """What a method counts in steps."""
    if (values.get("peft") or {}).get("method") == "adalora":
        for key, value in {"tinit": 1, "tfinal": 1, "deltaT": 1}.items():
            _change(values, small, ("peft", key), value)


def _replace_judges(values: dict[str, Any], small: Small, recipe: Recipe, folder: Path) -> None:
    """Small models stand in for a teacher and for reward models, and a reward that differs is put beside the others.

    Answers of random weights are all wrong, and often all as long: by the recipe's own rewards nothing may be learned.
    """
    if recipe.stage.taught:
        write_judge(small.stand_in, folder / "teacher", scores=False)
        _change(values, small, ("model", "teacher"), str(folder / "teacher"))
        _change(values, small, ("model", "teacher_revision"), None)
    for number, reward in enumerate(recipe.rewards):
        if reward.model:
            write_judge(small.stand_in, folder / f"judge-{number}", scores=True)
            _change(values, small, ("rewards", number, "model"), str(folder / f"judge-{number}"))
            _change(values, small, ("rewards", number, "tokenizer"), "same")
    if recipe.rewards:
        values["rewards"].append({"name": "repetition_penalty", "ngram_size": 1, "weight": 1.0, "tokenizer": "same"})
        small.changed[("rewards", len(recipe.rewards))] = "repetition_penalty: random answers differ in it"
    if recipe.stage.generates and recipe.training["max_completion_length"] > ANSWER:
        _change(values, small, ("training", "max_completion_length"), ANSWER)


@contextlib.contextmanager
def apart(folder: Path) -> Iterator[None]:
    """Keeps prepared data and the datasets library's copies in a folder, and not in the person's caches."""
    with (
        mock.patch.object(store, "store_folder", return_value=folder / "prepared"),
        mock.patch.object(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets")),
    ):
        yield


def describe_changes(small: Small) -> list[str]:
    """What is not as in the recipe, a line each."""
    return [f"{join_path(path)}: {told}" for path, told in small.changed.items()]
