"""Rules about a recipe's data sources: columns, weights, files, templates. One small function a rule."""

import re
from pathlib import Path

from recipe_runner.methods import METHODS
from recipe_runner.problems.problem import Found
from recipe_runner.problems.words import suggest
from recipe_runner.recipe.local import (
    BUILDERS,
    COMPRESSED,
    HUB,
    UNPACKED,
    is_data,
    is_file_source,
    is_saved,
    list_files,
    suffix_of,
)
from recipe_runner.recipe.sections import DatasetSection, SourceSection, UpstreamSection
from recipe_runner.stages import FORMATS, STAGES, Stage

KINDS = f"local files end with {', '.join(BUILDERS)}"


def column_roles(dataset: DatasetSection) -> Found:
    """Each format has its own roles of columns."""
    for source in dataset.sources:
        form = dataset.of(source).format
        roles = sorted(FORMATS[form].roles)
        for role in sorted(set(source.columns) - set(roles)):
            hint = suggest(role, roles) or f"roles: {', '.join(roles)}"
            yield (*source.path, "columns", role), f"'{role}' is not a role of format {form}", hint


def source_formats(dataset: DatasetSection) -> Found:
    """Instructions and conversations are mixed as turns: nothing else has two layouts."""
    for source in dataset.sources:
        if not source.format or source.format == dataset.format:
            continue
        place = (*source.path, "format")
        if dataset.format not in ("instruction", "chat"):
            yield place, f"rows of {dataset.format} are mixed with no others", "remove the key"
        elif dataset.template is not None:
            yield place, "dataset.template writes texts, and conversations are turns", "remove the template"
        elif dataset.images:
            yield place, "rows with images have one layout", "write all of them as turns (format chat)"


def image_use(stage: Stage, dataset: DatasetSection, training: UpstreamSection, peft: UpstreamSection) -> Found:
    """TRL takes images in some stages, and not with every way of making batches."""
    if not dataset.images:
        if dataset.image_folder:
            yield ("dataset", "image_folder"), "the recipe trains on no images", "set images: marked, or remove the key"
        for source in dataset.sources:
            if source.columns.get("images"):
                yield (*source.path, "columns", "images"), "the recipe trains on no images", "set images: marked"
        return
    place = ("dataset", "images")
    if not stage.sees or "images" not in FORMATS[dataset.format].roles:
        stages = " and ".join(name for name, known in STAGES.items() if known.sees)
        yield place, f"TRL 1.16 trains on images in the stages {stages} only", "remove the key"
        return
    if dataset.template is not None:
        yield ("dataset", "template"), "a plain text has no place for images", "remove the key"
    if dataset.thinking == "mask":
        yield ("dataset", "thinking"), "TRL's vision path masks no thinking", "set keep or drop"
    if dataset.image_folder and not Path(dataset.image_folder).is_dir():
        yield ("dataset", "image_folder"), f"there is no folder {dataset.image_folder}", "name the folder of the images"
    for key in ("packing", "eval_packing", "padding_free"):
        if training[key]:
            yield (
                ("training", key),
                "TRL 1.16 takes rows with images as they are, one after the other",
                "remove the key",
            )
    if training["truncation_mode"] == "keep_end":
        yield ("training", "truncation_mode"), "it would cut the images off, which come first", "remove the key"
    if training["precompute_ref_log_probs"]:
        yield ("training", "precompute_ref_log_probs"), "TRL 1.16 can't with images", "remove the key"
    if training["pad_to_multiple_of"] not in (None, "auto"):
        yield ("training", "pad_to_multiple_of"), "TRL 1.16 can't with images", "remove the key"
    if training["train_sampling_strategy"] == "group_by_length":
        fix = "remove the key"
        yield ("training", "train_sampling_strategy"), "every image would be opened to know how long its row is", fix
    if peft and METHODS[str(peft["method"])].is_prompt:
        yield ("peft", "method"), f"the virtual tokens of {peft['method']} have no place beside images", "take lora"


def streamed(stage: Stage, dataset: DatasetSection, training: UpstreamSection) -> Found:
    """What is streamed has no end that is known, no row that can be asked for, and is read by one reader a process."""
    if not dataset.streaming:
        return
    if training["max_steps"] <= 0:
        yield ("training", "max_steps"), "data that is streamed has no end that is known", "set training.max_steps"
    if dataset.fraction is not None:
        fix = "name evaluation data of its own, which is not streamed, or remove streaming"
        yield ("dataset", "eval", "fraction"), "a part can be held out of all rows only, which are not there", fix
    if training["train_sampling_strategy"] == "group_by_length":
        found = "rows that are streamed come as they are, mixed within a thousand"
        yield ("training", "train_sampling_strategy"), found, "remove one of the two"
    if stage.generates:
        yield ("dataset", "streaming"), f"the stage {stage.name} asks for its prompts by number", "remove streaming"
    if dataset.images:
        yield ("dataset", "images"), "rows with images are not streamed: they are opened before", "remove streaming"
    if training["precompute_ref_log_probs"]:
        found = "the reference would look at all rows before the first step"
        yield ("training", "precompute_ref_log_probs"), found, "remove one of the two"
    if training["dataloader_num_workers"]:
        yield ("training", "dataloader_num_workers"), "a stream has one reader a process, the process itself", "set 0"
    for source in dataset.train:
        for key in ("limit", "epochs"):
            if getattr(source, key) is not None:
                yield (*source.path, key), f"{key} counts rows, which are not known: max_steps is the end", "remove it"
        if "[" in source.split:
            yield (*source.path, "split"), f"{source.split} is a part of rows that are not known", "name a whole split"
        if source.sample_by not in (None, "line"):
            yield (*source.path, "sample_by"), "a text that is streamed is read line by line", "remove one of the two"
        if source.field or suffix_of(source.source) == ".json":
            found = "a .json file is read as a whole: it may be one list"
            yield (*source.path, "source"), found, "write a row a line, as .jsonl (jq -c '.[]')"
        if len(dataset.train) > 1 and source.weight is None:
            yield source.path, "how many rows a source has is not known: a mixture needs weights", "add 'weight:'"


def mixture_weights(dataset: DatasetSection) -> Found:
    """Weights are relative to each other: all sources of a training mixture have one, or none."""
    mixture = {source.path for source in dataset.train if len(source.path) > 2}  # written as a list
    weighted = any(source.weight is not None for source in dataset.train if source.path in mixture)
    for source in dataset.sources:
        if source.weight is not None and source.path not in mixture:
            yield (*source.path, "weight"), "a weight without a training mixture", "remove the key"
        elif source.weight is None and weighted and source.path in mixture:
            yield source.path, "other sources of the mixture have a weight, this one has none", "add 'weight:'"


def mixture_epochs(dataset: DatasetSection) -> Found:
    """Epochs are a way to mix training data, weights are another."""
    weighted = any(source.weight is not None for source in dataset.train)
    for source in dataset.sources:
        if source.epochs is None:
            continue
        if source not in dataset.train:
            yield (*source.path, "epochs"), "evaluation data is taken once", "remove the key"
        elif weighted:
            yield (*source.path, "epochs"), "a mixture has weights, or epochs of its sources", "remove one of them"
    if dataset.weight_by != "rows" and not weighted:
        yield ("dataset", "weight_by"), "no source has a weight", "add 'weight:' to each source, or remove the key"


def source_files(dataset: DatasetSection) -> Found:
    """Local files exist; anything else must look like a hub id, or a file on the hub."""
    for source in dataset.sources:
        name, place = source.source, (*source.path, "source")
        if "://" in name and not name.startswith(HUB):
            yield place, f"{name} is an address, from which nothing is read", f"download it, and name the file; {KINDS}"
        elif is_file_source(name):
            yield from _local_source(source)
        elif name.startswith(HUB):
            if suffix_of(name) not in BUILDERS:
                yield place, f"{name} is no file of data", f"name one: hf://datasets/OWNER/NAME/FILE; {KINDS}"
        elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
            yield place, f"'{name}' is neither a local file nor a hub id", KINDS
        elif Path(name).exists():
            yield place, f"{name} in the current folder would be taken for the hub id", f"write ./{name}; {KINDS}"
        yield from _options(source)


def _options(source: SourceSection) -> Found:
    """Keys that say how a file is read belong to a kind of file."""
    suffixes = {suffix_of(file.name) for file in list_files(source.source)} if is_file_source(source.source) else set()
    suffixes = suffixes or {suffix_of(source.source)}
    kinds = {"sample_by": (".txt",), "field": (".json",), "delimiter": (".csv", ".tsv"), "encoding": (".csv", ".tsv")}
    for key, wanted in kinds.items():
        if getattr(source, key) and not suffixes <= set(wanted):
            yield (*source.path, key), f"is for a {' or '.join(wanted)} file", "remove the key"


def _local_source(source: SourceSection) -> Found:
    name, place = source.source, (*source.path, "source")
    path, files = Path(name), list_files(name)
    if path.is_dir() and is_saved(path):
        pass  # a folder that datasets wrote
    elif path.is_dir() and not name.endswith("/"):
        inside = sorted(file.name for file in path.iterdir() if is_data(file))
        fix = f"name a file in it ({name}/{inside[0]}), or {name}/ for all of them" if inside else KINDS
        yield place, f"{path} is a folder, not a file", fix
    elif name.endswith("/") and not path.exists():
        yield place, f"there is no folder {path}", "name one that is there, or a file"
    elif not files:
        where = f"no file in {path} is data" if path.is_dir() else f"no file matches {name}"
        yield place, where, KINDS
    else:
        yield from _local_files(source, files)
        below = sorted(file for file in path.glob("*/**/*") if is_data(file)) if name.endswith("/") else []
        if below:
            found = f"{path} has data in folders below it, too: {below[0].relative_to(path)}"
            yield place, found, f"name all, or those meant: {name}**/*{below[0].suffix}, {name}*{below[0].suffix}"
    for key in ("subset", "revision"):
        if getattr(source, key) is not None:
            yield (*source.path, key), f"a local file has no {key}", "remove the key"
    if not is_saved(path) and not re.match(r"train$|train\[", source.split):
        fix = "remove the key, or take a slice: train[:5%]"
        yield (*source.path, "split"), "a local file has the split 'train' only", fix


def _local_files(source: SourceSection, files: list[Path]) -> Found:
    place, kinds = (*source.path, "source"), {suffix_of(file.name) for file in files}
    if len(kinds) > 1:
        yield place, f"{source.source} has files of several kinds: {', '.join(sorted(kinds))}", "name one kind: *.jsonl"
        return
    file, suffix = files[0], kinds.pop()
    if file.exists() and not file.is_file():
        yield place, f"{file} is a device or a pipe, not a file", KINDS
    elif file.suffix.lower() in COMPRESSED:
        yield place, f"{file} is compressed", f"unpack it ({COMPRESSED[file.suffix.lower()]}), and name what is inside"
    elif file.suffix.lower() in UNPACKED and suffix in (".parquet", ".arrow", ""):
        yield place, f"{file}: only texts are read where they are compressed", "unpack it, and name what is inside"
    elif suffix not in BUILDERS or (file.suffix != file.suffix.lower() and file.suffix.lower() in BUILDERS):
        renamed = f"rename it to {file.stem}{suffix}; " * (suffix in BUILDERS)
        yield place, f"{file} has the suffix '{file.suffix}'", f"{renamed}{KINDS}"
    elif not file.exists():
        neighbours = [other.name for other in file.parent.glob("[!.]*")] if file.parent.is_dir() else []
        yield place, f"there is no file {file}", suggest(file.name, neighbours)


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
