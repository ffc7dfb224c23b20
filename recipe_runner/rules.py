"""Rules across sections: what each section allows, but the whole does not. One small function a rule."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recipe_runner.problem import KeyPath, Mark, Problem, as_warning, join_path
from recipe_runner.validate import suggest

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
ROLES = {"instruction": {"instruction", "input", "output"}, "chat": {"messages"}, "text": {"text"}}

Found = Iterator[tuple[KeyPath, str, str]]  # key path, message, suggestion
Values = dict[str, Any]


def check_rules(values: Values, place: Callable[[KeyPath, bool], Mark], file: Path) -> list[Problem]:
    """Applies every rule to a recipe that passed the schema, with defaults and absolute paths filled in."""
    problems = []
    for code, rule in RULES.items():
        for path, message, suggestion in rule(values):
            problems.append(Problem(code, message, place(path, True), join_path(path), suggestion))
    if file.stem not in (values["name"], "recipe", "resolved"):  # a run folder keeps copies by those names
        message = f"the recipe is named '{values['name']}', its file '{file.name}'"
        problem = Problem("name-differs", message, place(("name",), False), "name", "give both the same name")
        problems.append(as_warning(problem))
    return problems


def quantization_without_peft(values: Values) -> Found:
    """Quantized weights cannot be trained: a quantized base needs an adapter."""
    if values.get("quantization") and not values.get("peft"):
        yield (
            ("quantization",),
            "a quantized base model can't be trained itself",
            "add 'peft: {method: lora, target_modules: all-linear}', or remove quantization",
        )


def quantization_width(values: Values) -> Found:
    """Exactly one of 4-bit and 8-bit."""
    quantization = values.get("quantization") or {}
    widths = [key for key in ("load_in_4bit", "load_in_8bit") if quantization.get(key)]
    if quantization and len(widths) != 1:
        yield (
            ("quantization",),
            "both 4-bit and 8-bit are on" if widths else "neither 4-bit nor 8-bit is on",
            "set one of load_in_4bit and load_in_8bit to true",
        )


def precision_conflict(values: Values) -> Found:
    """One mixed precision at a time."""
    if values["training"].get("bf16") and values["training"].get("fp16"):
        yield ("training", "fp16"), "both bf16 and fp16 are on", "keep one"


def eval_without_data(values: Values) -> Found:
    """Evaluation needs data."""
    strategy = values["training"].get("eval_strategy", "no")
    if strategy != "no" and "eval" not in values["dataset"]:
        yield (
            ("training", "eval_strategy"),
            f"eval_strategy is {strategy}, but there is no evaluation data",
            "add 'eval: {fraction: 0.02}' to dataset",
        )
    if values["training"].get("eval_on_start") and "eval" not in values["dataset"]:
        yield (("training", "eval_on_start"), "there is no evaluation data", "add 'eval: {fraction: 0.02}' to dataset")


def eval_data_unused(values: Values) -> Found:
    """Held-out data that is never evaluated is data lost."""
    if "eval" in values["dataset"] and values["training"].get("eval_strategy", "no") == "no":
        yield (
            ("dataset", "eval"),
            "the evaluation data is never used",
            "set training.eval_strategy to steps or epoch, or remove eval",
        )


def best_model_schedule(values: Values) -> Found:
    """load_best_model_at_end compares checkpoints: both schedules must agree (transformers' TrainingArguments)."""
    training = values["training"]
    if not training.get("load_best_model_at_end"):
        return
    save, evaluate = training.get("save_strategy", "steps"), training.get("eval_strategy", "no")
    if save != evaluate and save != "best":
        yield (
            ("training", "load_best_model_at_end"),
            f"save_strategy is {save}, eval_strategy is {evaluate}",
            "give both the same value",
        )
    elif save == "steps" and isinstance(training.get("save_steps", 500), int):
        steps = training.get("eval_steps") or training.get("logging_steps", 10)
        if training.get("save_steps", 500) % steps:
            yield (
                ("training", "load_best_model_at_end"),
                f"save_steps ({training.get('save_steps', 500)}) is no multiple of eval_steps ({steps})",
                "make it one",
            )


def packing_without_length(values: Values) -> Found:
    """Packing fills rows up to max_length."""
    training = values["training"]
    if training.get("packing") and "max_length" in training and training["max_length"] is None:
        yield ("training", "max_length"), "packing needs a length to fill", "set max_length"


def remote_code_unpinned(values: Values) -> Found:
    """Code from the hub runs on this machine: the recipe must say which code."""
    model = values["model"]
    if (
        model.get("trust_remote_code")
        and not re.fullmatch(r"[0-9a-f]{40}", model.get("revision", ""))
        and not Path(model["name_or_path"]).is_dir()
    ):
        yield (
            ("model", "trust_remote_code"),
            "remote code from a revision that can change",
            "set model.revision to a full commit hash",
        )


def column_roles(values: Values) -> Found:
    """Each format has its own roles of columns."""
    dataset = values["dataset"]
    roles = ROLES[dataset["format"]]
    for path, source in sources(values):
        for role in sorted(set(source.get("columns", {})) - roles):
            hint = suggest(role, sorted(roles)) or f"roles: {', '.join(sorted(roles))}"
            yield (*path, "columns", role), f"'{role}' is no role of format {dataset['format']}", hint


def mixture_weights(values: Values) -> Found:
    """Weights are relative to each other: all sources have one, or none."""
    train = values["dataset"]["train"]
    if isinstance(train, list):
        for index, source in enumerate(train):
            if "weight" not in source and any("weight" in other for other in train):
                yield (
                    ("dataset", "train", index),
                    "other sources of the mixture have a weight, this one has none",
                    "add 'weight:'",
                )
    elif "weight" in train:
        yield (
            ("dataset", "train", "weight"),
            "a weight without a mixture",
            "remove it, or make train a list of sources",
        )


def source_files(values: Values) -> Found:
    """Local files exist; anything else must look like a hub id."""
    for path, source in sources(values):
        name = source["source"]
        if Path(name).suffix in DATA_SUFFIXES:
            if not Path(name).is_file():
                neighbours = (
                    [str(file.name) for file in Path(name).parent.glob("*")] if Path(name).parent.is_dir() else []
                )
                yield (*path, "source"), f"there is no file {name}", suggest(Path(name).name, neighbours)
            for key in ("subset", "revision"):
                if key in source:
                    yield (*path, key), f"a local file has no {key}", "remove the key"
            if not re.match(r"train$|train\[", source["split"]):
                yield (
                    (*path, "split"),
                    "a local file has the split 'train' only",
                    "remove the key, or take a slice: train[:5%]",
                )
        elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            yield (
                (*path, "source"),
                f"'{name}' is neither a local file nor a hub id",
                f"local files end with {', '.join(DATA_SUFFIXES)}",
            )


def template_use(values: Values) -> Found:
    """A template is a file that exists, and the data uses it."""
    dataset, training = values["dataset"], values["training"]
    if "chat_template_path" in training:
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


RULES: dict[str, Callable[[Values], Found]] = {
    "quantized-full-training": quantization_without_peft,
    "quantization-width": quantization_width,
    "precision-conflict": precision_conflict,
    "eval-without-data": eval_without_data,
    "eval-data-unused": eval_data_unused,
    "best-model-schedule": best_model_schedule,
    "packing-without-length": packing_without_length,
    "remote-code-unpinned": remote_code_unpinned,
    "wrong-column-role": column_roles,
    "mixture-weight": mixture_weights,
    "wrong-source": source_files,
    "template-use": template_use,
}


def sources(values: Values) -> Iterator[tuple[KeyPath, Values]]:
    """Every data source of a recipe, with its key path."""
    for key in ("train", "eval"):
        entry = values["dataset"].get(key, {})
        if isinstance(entry, list):
            yield from ((("dataset", key, index), source) for index, source in enumerate(entry))
        elif "source" in entry:
            yield ("dataset", key), entry
