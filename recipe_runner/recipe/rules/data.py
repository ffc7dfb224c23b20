"""Rules about a recipe's data sources: columns, weights, files, templates. One small function a rule."""

import re
from pathlib import Path

from recipe_runner.problems.problem import Found
from recipe_runner.problems.words import suggest
from recipe_runner.recipe.sections import DatasetSection, SourceSection, UpstreamSection
from recipe_runner.stages import FORMATS

# Suffix of a local data file -> the builder of `datasets` that reads it.
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
COMPRESSED = {".gz": "gunzip", ".zip": "unzip", ".zst": "unzstd", ".xz": "unxz", ".bz2": "bunzip2"}


def looks_local(name: str) -> bool:
    """Whether a name is written as a path: ./x, ../x, /x, ~x."""
    return name.startswith(("./", "../", "/", "~")) or name in (".", "..")


def is_file_source(name: str) -> bool:
    """Whether a data source is a local file rather than a hub id."""
    return looks_local(name) or Path(name).suffix.lower() in BUILDERS


def column_roles(dataset: DatasetSection) -> Found:
    """Each format has its own roles of columns."""
    roles = sorted(FORMATS[dataset.format].roles)
    for source in dataset.sources:
        for role in sorted(set(source.columns) - set(roles)):
            hint = suggest(role, roles) or f"roles: {', '.join(roles)}"
            yield (*source.path, "columns", role), f"'{role}' is not a role of format {dataset.format}", hint


def mixture_weights(dataset: DatasetSection) -> Found:
    """Weights are relative to each other: all sources of a training mixture have one, or none."""
    mixture = {source.path for source in dataset.train if len(source.path) > 2}  # written as a list
    weighted = any(source.weight is not None for source in dataset.train if source.path in mixture)
    for source in dataset.sources:
        if source.weight is not None and source.path not in mixture:
            yield (*source.path, "weight"), "a weight without a training mixture", "remove the key"
        elif source.weight is None and weighted and source.path in mixture:
            yield source.path, "other sources of the mixture have a weight, this one has none", "add 'weight:'"


def source_files(dataset: DatasetSection) -> Found:
    """Local files exist; anything else must look like a hub id."""
    kinds = f"local files end with {', '.join(BUILDERS)}"
    for source in dataset.sources:
        name, place = source.source, (*source.path, "source")
        if is_file_source(name):
            yield from _local_source(Path(name), source, kinds)
        elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
            yield place, f"'{name}' is neither a local file nor a hub id", kinds
        elif Path(name).exists():
            yield place, f"{name} in the current folder would be taken for the hub id", f"write ./{name}; {kinds}"
        if source.sample_by and not name.endswith(".txt"):
            yield (*source.path, "sample_by"), "only a .txt file is cut into documents", "remove the key"


def _local_source(file: Path, source: SourceSection, kinds: str) -> Found:
    place, suffix = (*source.path, "source"), file.suffix.lower()
    if file.is_dir():
        inside = sorted(other.name for other in file.iterdir() if other.suffix in BUILDERS)
        fix = f"name a file in it: {source.source}/{inside[0]}" if inside else kinds
        yield place, f"{file} is a folder, not a file", fix
    elif file.exists() and not file.is_file():
        yield place, f"{file} is a device or a pipe, not a file", kinds
    elif suffix in COMPRESSED:
        yield place, f"{file} is compressed", f"unpack it ({COMPRESSED[suffix]}), and name what is inside"
    elif suffix == ".tsv":
        yield place, f"{file}: columns between tabs are not read", "save it as .csv, with commas"
    elif file.suffix not in BUILDERS:
        renamed = f"rename it to {file.stem}{suffix}; " * (suffix in BUILDERS)
        yield place, f"{file} has the suffix '{file.suffix}'", f"{renamed}{kinds}"
    elif not file.exists():
        neighbours = [other.name for other in file.parent.glob("*")] if file.parent.is_dir() else []
        yield place, f"there is no file {file}", suggest(file.name, neighbours)
    for key in ("subset", "revision"):
        if getattr(source, key) is not None:
            yield (*source.path, key), f"a local file has no {key}", "remove the key"
    if not re.match(r"train$|train\[", source.split):
        fix = "remove the key, or take a slice: train[:5%]"
        yield (*source.path, "split"), "a local file has the split 'train' only", fix


def template_use(dataset: DatasetSection, training: UpstreamSection) -> Found:
    """A template is a file that exists, and the data uses it."""
    if (file := training["chat_template_path"]) is not None:
        path = ("training", "chat_template_path")
        if not Path(file).is_file():
            yield path, f"{file} is not a file" if Path(file).exists() else f"there is no file {file}", ""
        if dataset.is_plain_text:
            yield path, "this dataset is plain text: the chat template would not be used", "remove it"
    if dataset.template is not None and dataset.system is not None:
        yield ("dataset", "system"), "a plain-text template has no system prompt", "write it into the template"
