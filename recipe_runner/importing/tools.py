"""Other tools as data: what each of their keys becomes, by a file a tool beside this one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.problems.words import suggest
from recipe_runner.recipe import schema
from recipe_runner.stages import STAGES

FOLDER = Path(__file__).parent
NAMES = ("axolotl", "llamafactory", "trl", "handbook")  # the handbook's keys are in TRL's file
MOST_BYTES = 2**20
MIXTURES = ("dataset_mixture", "dataset_mixer")  # of the handbook's
# Of values, not of templates: what a program would fill in before a tool reads the file.
VARIABLE = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\$\{\w+\}|^\$[A-Z_]{3,}(?![^/])|(?<=/)\$[A-Z_]{3,}(?![^/])")


# What keys become that are read together, by the name of what they are about.
BECOMES = {
    "adapter": "the section peft (or unfreeze)",
    "attention": "model.attn_implementation",
    "beta": "training.beta",
    "by_length": "training.train_sampling_strategy",
    "checkpointing": "training.activation_checkpointing",
    "completion_length": "training.max_length",
    "datasets": "the section dataset",
    "dtype": "model.dtype",
    "early_stopping": "run.early_stopping",
    "end_of_turn": "the end of a turn in the chat template",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "evaluating": "training.eval_strategy and eval_steps",
    "held_out": "dataset.eval",
    "images": "dataset.images",
    "length": "training.max_length",
    "loss": "training.loss_type",
    "masks": "dataset.train_on",
    "mixture": "weights of the sources",
    "optimizer": "training.optim and optim_args",
    "overlong": "dataset.on_overlong",
    "packing": "training.packing",
    "plugins": "nothing of its own: kernels for the same result",
    "precision": "training.bf16, fp16 and model.dtype",
    "preference": "training.beta and loss_type",
    "prepared": "what the runner does itself",
    "quantization": "the section quantization",
    "remote_code": "model.trust_remote_code",
    "report_to": "training.report_to",
    "saving": "training.save_strategy and save_steps",
    "schedule": "training.lr_scheduler_type and lr_scheduler_kwargs",
    "seed": "run.seed",
    "sharding": "a launch configuration beside the recipe",
    "special_tokens": "training.eos_token",
    "stage": "stage",
    "targets": "peft.target_modules",
    "template": "training.chat_template_path",
    "tensorboard": "training.report_to",
    "tf32": "training.tf32",
    "tokens": "model.add_tokens and add_special_tokens",
    "unfreeze": "unfreeze",
    "wandb": "training.report_to",
    "warm_up": "training.warmup_steps",
}


@dataclass(frozen=True)
class Tool:
    """A tool whose configurations are known.

    Attributes:
        name: As `--from` has it.
        version: That its keys were read of.
        source: Where.
        unknown: Why a key that it does not know had no effect; empty where it refuses the file.
        marks: Keys by which a file of it is recognised.
        stages: What it calls a way to train -> our stage.
        no_stages: What it calls one that is not here -> why.
        templates: Name of a chat template that is the tool's own -> its parts, or a file of TRL that writes the same.
        keys: Key -> what it becomes (see axolotl.yaml).
    """

    name: str
    version: str
    source: str
    unknown: str
    marks: tuple[str, ...]
    stages: Mapping[str, str]
    no_stages: Mapping[str, str]
    templates: Mapping[str, Mapping[str, str] | str]
    keys: Mapping[str, Mapping[str, Any]]


@cache
def read_tool(name: str) -> Tool:
    """A tool by its name."""
    file = FOLDER / f"{'trl' if name == 'handbook' else name}.yaml"
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    unknown = "" if values["unknown"] == "none" else values["unknown"]
    version = values["handbook"].partition(" ")[0] if name == "handbook" else values["version"]
    told = (version, values["source"], unknown, tuple(values["marks"]))
    return Tool(name, *told, values["stages"], values["no_stages"], values.get("templates", {}), values["keys"])


def read_configuration(file: Path) -> dict[str, Any]:
    """The values of another tool's file.

    Raises:
        UserError: It is no YAML mapping, or a program has to fill it in first.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise user_error("unreadable-file", f"{file}: {error.strerror}", "check the path") from error
    if len(content) > MOST_BYTES or b"\0" in content:
        raise user_error("import-unreadable", f"{file} is no configuration, but a binary or a huge file")
    try:
        text = content.decode("utf-8-sig")
        values = yaml.safe_load(text)
        twice = _find_twice(yaml.compose(text, yaml.SafeLoader))
    except UnicodeDecodeError:
        raise user_error("import-unreadable", f"{file} is no text in UTF-8", "name a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        told = first_line(error)
        if VARIABLE.search(content.decode("utf-8-sig")):
            fix = "fill in what a program would: {{ ... }}, ${...}"
            raise user_error(
                "import-variable", f"{file} is no YAML before its variables are filled in: {told}", fix
            ) from error
        raise user_error("import-unreadable", f"{file} is no YAML: {told}", "name a YAML file") from error
    if twice:
        raise user_error("import-unreadable", f"{file}: {twice} is there twice", "remove one of the two")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise user_error("import-unreadable", f"{file} holds no keys with values", "name a tool's configuration")
    try:
        texts = _list_texts(values)
    except RecursionError:
        raise user_error("import-unreadable", f"{file} holds a value that is within itself", "write it out") from None
    for key, text in texts:
        if (found := VARIABLE.search(text)) and "template" not in key and "format" not in key:
            message = f"{file}: {key} holds a variable, {found[0]}"
            raise user_error("import-variable", message, "write the value that a program would fill in")
    return values


def _find_twice(node: Any) -> str:
    """A key that is there twice in one mapping, with its line: YAML takes the last one without a word."""
    seen: set[str] = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value in seen:
            return f"{key.value} (line {key.start_mark.line + 1})"
        seen.add(key.value)
    return ""


def _list_texts(values: Any, path: str = "") -> list[tuple[str, str]]:
    """All texts in some values, with their keys."""
    if isinstance(values, str):
        return [(path, values)]
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [found for key, value in pairs for found in _list_texts(value, f"{path}.{key}".lstrip("."))]


def recognise(values: Mapping[str, Any], file: Path) -> Tool:
    """The tool that a file is of, by its keys.

    Raises:
        UserError: It is of none that is known, or of two at once.
    """
    if "compute_environment" in values or "distributed_type" in values:
        message = f"{file} is a launch configuration of accelerate's, not one of a training"
        raise user_error("import-unknown", message, f"use it as it is: recipe-run RECIPE --accelerate-config {file}")
    if "schema_version" in values and "stage" in values:
        raise user_error("import-unknown", f"{file} is a recipe already", f"recipe-run validate {file}")
    if "train_dataset" in values and "model" in values:
        message = f"{file} is in the layout of LLaMA-Factory's next version (v1), which is not settled"
        raise user_error("import-unknown", message, "name a file in the layout of 0.9")
    found = {name: [key for key in read_tool(name).marks if key in values] for name in NAMES[:3]}
    if {"base_model", "model_name_or_path"} <= values.keys() or _are_two(found):
        other = max(NAMES[1:3], key=lambda name: len(found[name]))
        own = next((key for key in found["axolotl"] if key not in read_tool(other).keys), "base_model")
        theirs = next((key for key in found[other] if key not in read_tool("axolotl").keys), "model_name_or_path")
        names = other if theirs != "model_name_or_path" else "LLaMA-Factory's or TRL"
        message = f"{file} has keys of two tools: {own} is axolotl's, {theirs} is {names}'s"
        raise user_error("import-two-tools", message, "name the one that reads it: --from")
    best = max(NAMES[:3], key=lambda name: len(found[name]))
    if not found[best] and "model_name_or_path" in values:
        best, found["trl"] = "trl", ["model_name_or_path"]
    if not found[best]:
        near = suggest(next(iter(values), ""), [*read_tool("axolotl").keys, *read_tool("llamafactory").keys])
        message = f"{file} is of no tool that is known: axolotl, LLaMA-Factory, TRL, alignment-handbook"
        raise user_error("import-unknown", message, near or "name it: --from")
    return read_tool("handbook" if best == "trl" and any(key in values for key in MIXTURES) else best)


def _are_two(found: Mapping[str, list[str]]) -> bool:
    """Whether a file has several keys that only axolotl knows, and several that only another tool knows."""
    for name in NAMES[1:3]:
        own = [key for key in found["axolotl"] if key not in read_tool(name).keys]
        others = [key for key in found[name] if key not in read_tool("axolotl").keys]
        if len(own) > 1 and len(others) > 1:
            return True
    return False


def explain_key(name: str) -> str:
    """Where a key of another tool went: `axolotl.micro_batch_size`; empty for what is no such key.

    Raises:
        UserError: The tool has no such key.
    """
    tool_name, _, key = name.partition(".")
    if tool_name not in NAMES or not key:
        return ""
    tool = read_tool(tool_name)
    entry = tool.keys.get(key)
    if entry is None and tool_name != "axolotl":
        stages = [stage for stage in STAGES if key in schema.section_keys("training", stage)]
        if stages:
            return f"{name} ({tool.name} {tool.version})\n  is training.{key} here, of stages {', '.join(stages)}"
    if entry is None:
        hint = suggest(key, list(tool.keys))
        raise user_error("unknown-key", f"{tool.name} {tool.version} has no key '{key}' that is known here", hint)
    lines = [f"{name} ({tool.name} {tool.version})", f"  {describe_entry(entry)}"]
    if "default" in entry:
        lines.append(f"  its default there: {entry['default']}")
    return "\n".join([*lines, f"  source: {entry['at']}, in {tool.source}"])


def describe_entry(entry: Mapping[str, Any]) -> str:
    """What a key becomes, in a line."""
    if "to" in entry:
        note = f"; {entry['note']}" if "note" in entry else ""
        return f"is {entry['to']} here{note}"
    if "ignored" in entry:
        return f"had no effect there: {entry['ignored']}"
    if "none" in entry:
        unless = f" (nothing to do for {' or '.join(map(str, entry['holds']))})" if "holds" in entry else ""
        return f"no counterpart: {entry['none']}{unless}"
    if "same" in entry:
        return f"the same by default: {entry['same']}"
    told = f"becomes {BECOMES[entry['by']]} here, with other keys"
    return f"{told}; {entry['note']}" if "note" in entry else told
