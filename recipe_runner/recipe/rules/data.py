"""Rules about a recipe's data sources: columns, weights, files, templates. One small function a rule; see `rules`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipe_runner.problems.problem import KeyPath
from recipe_runner.recipe.validate import suggest

Found = Iterator[tuple[KeyPath, str, str]]  # key path, message, suggestion
Values = dict[str, Any]

# Suffix of a local data file -> the builder of `datasets` that reads it.
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
ROLES = {"instruction": {"instruction", "input", "output"}, "chat": {"messages"}, "text": {"text"}}
ROLES["preference"] = {"prompt", "chosen", "rejected"}


def looks_local(name: str) -> bool:
    """Whether a name is written as a path: ./x, ../x, /x, ~x."""
    return name.startswith(("./", "../", "/", "~")) or name in (".", "..")


def is_file_source(name: str) -> bool:
    """Whether a data source is a local file rather than a hub id."""
    return looks_local(name) or Path(name).suffix.lower() in BUILDERS


def sources(values: Values) -> Iterator[tuple[KeyPath, Values]]:
    """Every data source of a recipe, with its key path."""
    for key in ("train", "eval"):
        entry = values["dataset"].get(key, {})
        if isinstance(entry, list):
            yield from ((("dataset", key, index), source) for index, source in enumerate(entry))
        elif "source" in entry:
            yield ("dataset", key), entry


def column_roles(values: Values) -> Found:
    """Each format has its own roles of columns."""
    dataset = values["dataset"]
    roles = ROLES[dataset["format"]]
    for path, source in sources(values):
        for role in sorted(set(source.get("columns", {})) - roles):
            hint = suggest(role, sorted(roles)) or f"roles: {', '.join(sorted(roles))}"
            yield (*path, "columns", role), f"'{role}' is no role of format {dataset['format']}", hint


def mixture_weights(values: Values) -> Found:
    """Weights are relative to each other: all sources of a training mixture have one, or none."""
    train = values["dataset"]["train"]
    weighted = isinstance(train, list) and any("weight" in source for source in train)
    for path, source in sources(values):
        if "weight" in source and not (path[1] == "train" and isinstance(train, list)):
            yield (*path, "weight"), "a weight without a training mixture", "remove the key"
        elif "weight" not in source and weighted and path[1] == "train":
            yield path, "other sources of the mixture have a weight, this one has none", "add 'weight:'"


def source_files(values: Values) -> Found:
    """Local files exist; anything else must look like a hub id."""
    for path, source in sources(values):
        name, place = source["source"], (*path, "source")
        kinds = f"local files end with {', '.join(BUILDERS)}"
        if is_file_source(name):
            yield from _local_source(Path(name), path, source, kinds)
        elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
            yield place, f"'{name}' is neither a local file nor a hub id", kinds
        elif Path(name).exists():
            yield place, f"{name} in the current folder would be taken for the hub id", f"write ./{name}; {kinds}"
        if "sample_by" in source and not name.endswith(".txt"):
            yield (*path, "sample_by"), "only a .txt file is cut into documents", "remove the key"


def _local_source(file: Path, path: KeyPath, source: Values, kinds: str) -> Found:
    if file.suffix not in BUILDERS:
        yield (*path, "source"), f"{file} has the suffix '{file.suffix}'", kinds
    elif not file.is_file():
        neighbours = [other.name for other in file.parent.glob("*")] if file.parent.is_dir() else []
        yield (*path, "source"), f"there is no file {file}", suggest(file.name, neighbours)
    for key in ("subset", "revision"):
        if key in source:
            yield (*path, key), f"a local file has no {key}", "remove the key"
    if not re.match(r"train$|train\[", source["split"]):
        yield (*path, "split"), "a local file has the split 'train' only", "remove the key, or take a slice: train[:5%]"


def template_use(values: Values) -> Found:
    """A template is a file that exists, and the data uses it."""
    dataset, training = values["dataset"], values["training"]
    if training.get("chat_template_path") is not None:
        if not Path(training["chat_template_path"]).is_file():
            yield ("training", "chat_template_path"), f"there is no file {training['chat_template_path']}", ""
        if dataset["format"] == "text" or "template" in dataset:
            yield (
                ("training", "chat_template_path"),
                "this dataset is plain text: the chat template would not be used",
                "remove it",
            )
    if "template" in dataset and "system" in dataset:
        yield (("dataset", "system"), "a plain-text template has no system prompt", "write it into the template")
