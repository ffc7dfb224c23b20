"""Rules across sections: what each section allows, but the whole does not. One small function a rule."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recipe_runner.problem import KeyPath, Mark, Problem, as_warning
from recipe_runner.validate import suggest

# Suffix of a local data file -> the builder of `datasets` that reads it.
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
ROLES = {"instruction": {"instruction", "input", "output"}, "chat": {"messages"}, "text": {"text"}}


def looks_local(name: str) -> bool:
    """Whether a name is written as a path: ./x, ../x, /x, ~x."""
    return name.startswith(("./", "../", "/", "~")) or name in (".", "..")


def is_file_source(name: str) -> bool:
    """Whether a data source is a local file rather than a hub id."""
    return looks_local(name) or Path(name).suffix.lower() in BUILDERS


Found = Iterator[tuple[KeyPath, str, str]]  # key path, message, suggestion
Values = dict[str, Any]


def check_rules(values: Values, place: Callable[[KeyPath, bool], Mark], file: Path) -> list[Problem]:
    """Applies every rule to a recipe that passed the schema, with defaults and absolute paths filled in."""
    problems = []
    for code, rule in RULES.items():
        for path, message, suggestion in rule(values):
            problem = Problem(code, message, place(path, True), path, suggestion)
            problems.append(as_warning(problem) if code in WARNINGS else problem)
    if file.stem not in (values["name"], "recipe", "resolved"):  # a run folder keeps copies by those names
        message = f"the recipe is named '{values['name']}', its file '{file.name}'"
        problem = Problem("name-differs", message, place(("name",), False), ("name",), "give both the same name")
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
    """Exactly one of 4-bit and 8-bit, and only its own options."""
    quantization = values.get("quantization") or {}
    widths = [key for key in ("load_in_4bit", "load_in_8bit") if quantization.get(key)]
    if quantization and len(widths) != 1:
        found = "both 4-bit and 8-bit are on" if widths else "neither 4-bit nor 8-bit is on"
        yield ("quantization",), found, "set one of load_in_4bit and load_in_8bit to true"
    elif quantization:
        others = ("bnb_4bit_",) if widths == ["load_in_8bit"] else ("llm_int8_threshold", "llm_int8_has_fp16_weight")
        for key in quantization:
            if key.startswith(others):
                yield ("quantization", key), f"has no effect with {widths[0]}", "remove the key"


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
    pinned = re.fullmatch(r"[0-9a-f]{40}", model["revision"])
    if model["trust_remote_code"] and not pinned and not Path(model["name_or_path"]).is_absolute():
        fix = "set model.revision to a full commit hash"
        yield ("model", "trust_remote_code"), "remote code from a revision that can change", fix


def local_model(values: Values) -> Found:
    """A local folder has no revision, and a hub id is not the name of a folder here."""
    name = values["model"]["name_or_path"]
    if Path(name).is_absolute():
        if values["model"]["revision"] != "main":
            yield ("model", "revision"), "a local folder has no revision", "remove the key"
    elif Path(name).is_dir():
        found = f"the folder {name} in the current folder would be taken for the hub id"
        yield ("model", "name_or_path"), found, f"write its path ({Path(name).absolute()}), or work in another folder"


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


def ignored_keys(values: Values) -> Found:
    """Fields that upstream does not look at, given the others (transformers' TrainingArguments, TRL's SFTConfig)."""
    training = values["training"]
    ignored = {
        "num_train_epochs": training.get("max_steps", -1) > 0 and "max_steps is set",
        "eval_steps": training.get("eval_strategy", "no") != "steps" and "eval_strategy is not steps",
        "save_steps": training.get("save_strategy", "steps") != "steps" and "save_strategy is not steps",
        "logging_steps": training.get("logging_strategy", "steps") != "steps" and "logging_strategy is not steps",
        "packing_strategy": not (training.get("packing") or training.get("eval_packing")) and "packing is off",
    }
    for key, reason in ignored.items():
        if key in training and reason:
            yield ("training", key), f"has no effect: {reason}", "remove the key"


def compute_dtype(values: Values) -> Found:
    """4-bit weights are computed in the precision of training, or every layer converts twice."""
    computed = (values.get("quantization") or {}).get("bnb_4bit_compute_dtype")
    mixed = next((name for key, name in _MIXED.items() if values["training"].get(key)), None)
    if computed and mixed and computed != mixed:
        found = f"4-bit weights are computed in {computed}, training is in {mixed}"
        yield ("quantization", "bnb_4bit_compute_dtype"), found, f"write {mixed}"


def fused_projections(values: Values) -> Found:
    """Phi-3 fuses its projections: the names of Llama's match nothing. Source: transformers/models/phi3."""
    targets = (values.get("peft") or {}).get("target_modules")
    if re.search(r"phi-?3", Path(values["model"]["name_or_path"]).name.lower()) and isinstance(targets, list):
        for index, target in enumerate(targets):
            if fused := _PHI3_FUSED.get(target):
                yield ("peft", "target_modules", index), f"Phi-3 has no '{target}'", f"use '{fused}', or all-linear"


def context_length(values: Values) -> Found:
    """Tokens beyond the model's context are out of its range; some hub ids say how long that is (4k, 128k)."""
    said = re.search(r"-(\d+)k(-|$)", values["model"]["name_or_path"].lower())
    length = values["training"].get("max_length")
    if said and length and length > int(said[1]) * 1024:
        yield ("training", "max_length"), f"{length} tokens, the model's context is {said[1]}k", "lower it"


def learning_rate(values: Values) -> Found:
    """Adapters take a tenfold higher rate than full fine-tuning.

    Source: QLoRA (arXiv 2305.14314) trains adapters at 1e-4 to 2e-4; TRL's default for full fine-tuning is 2e-5. The
    ranges here are wider by a factor of ten or more.
    """
    low, high = (2e-6, 6e-3) if values.get("peft") else (2e-7, 1e-3)
    rate = values["training"].get("learning_rate")
    if rate is not None and not low <= rate <= high:
        method = "an adapter" if values.get("peft") else "full fine-tuning"
        yield ("training", "learning_rate"), f"{rate:g} is unusual for {method}", f"usual: {low:g} to {high:g}"


_MIXED = {"bf16": "bfloat16", "fp16": "float16"}
_PHI3_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}

RULES: dict[str, Callable[[Values], Found]] = {
    "quantized-full-training": quantization_without_peft,
    "quantization-width": quantization_width,
    "precision-conflict": precision_conflict,
    "eval-without-data": eval_without_data,
    "eval-data-unused": eval_data_unused,
    "best-model-schedule": best_model_schedule,
    "packing-without-length": packing_without_length,
    "remote-code-unpinned": remote_code_unpinned,
    "local-model": local_model,
    "ignored-key": ignored_keys,
    "compute-dtype": compute_dtype,
    "fused-projections": fused_projections,
    "context-length": context_length,
    "unusual-learning-rate": learning_rate,
    "wrong-column-role": column_roles,
    "mixture-weight": mixture_weights,
    "wrong-source": source_files,
    "template-use": template_use,
}

# What may be meant: it is said, and never fails a run.
WARNINGS = {"ignored-key", "context-length", "unusual-learning-rate"}


def sources(values: Values) -> Iterator[tuple[KeyPath, Values]]:
    """Every data source of a recipe, with its key path."""
    for key in ("train", "eval"):
        entry = values["dataset"].get(key, {})
        if isinstance(entry, list):
            yield from ((("dataset", key, index), source) for index, source in enumerate(entry))
        elif "source" in entry:
            yield ("dataset", key), entry
