"""Launch configurations: accelerate's file, read strictly, and what its launcher puts into the environment.

accelerate ignores unknown keys in a section, and reads YAML 1.1. `launch/rules.py` checks what is read here.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from recipe_runner.files import read_json
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.problems.problem import KeyPath, Mark, Problem, at_most, sort_problems
from recipe_runner.problems.words import suggest
from recipe_runner.recipe import schema
from recipe_runner.recipe.document import read_document
from recipe_runner.recipe.library import SUFFIXES, shelf


@dataclass(frozen=True)
class Launch:
    """How processes are started.

    Attributes:
        name: The file, or where else it comes from.
        values: Keys of accelerate's configuration file.
        deepspeed: The DeepSpeed JSON file that it names, if it does.
        marks: Where each key was written; empty when it comes from the environment.
    """

    name: str
    values: dict[str, Any]
    deepspeed: dict[str, Any] = field(default_factory=dict)
    marks: Mapping[KeyPath, Mark] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Accelerate's distributed type."""
        return str(self.values.get("distributed_type") or "NO")

    @property
    def processes(self) -> int:
        """Processes on all machines together."""
        return int(self.values.get("num_processes") or 1)

    @property
    def machines(self) -> int:
        """Machines that take part."""
        return int(self.values.get("num_machines") or 1)

    def fsdp(self, key: str, default: Any = None) -> Any:
        """A key of `fsdp_config`, with or without its prefix; None when FSDP is off."""
        if self.kind != "FSDP":
            return None
        section = self.values.get("fsdp_config") or {}
        return section.get(f"fsdp_{key}", section.get(key, default))

    @property
    def precision(self) -> str:
        """Mixed precision that the launcher asks for: no, bf16 or fp16."""
        return str(self.values.get("mixed_precision") or "no").lower()

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed trains."""
        return self.kind == "DEEPSPEED"

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
        section = self.values.get("deepspeed_config") or {}
        zero = self.deepspeed.get("zero_optimization")
        stage = zero.get("stage", 0) if isinstance(zero, dict) else section.get("zero_stage", 2)
        return int(stage) if self.is_deepspeed and str(stage).isdigit() else 0

    def pinned(self, key: str) -> Any:
        """A value of DeepSpeed's that is set, and not left to the recipe (`auto`)."""
        section = self.values.get("deepspeed_config") or {}
        value = self.deepspeed.get(key, section.get(key))
        return None if not self.is_deepspeed or value in (None, "auto", "none", "None") else value


def find_launch(name: str) -> Path:
    """The file of a launch configuration: a path, or the name of one on the shelf.

    Raises:
        UserError: There is none.
    """
    path = Path(name)
    if path.suffix in (*SUFFIXES, ".json") or len(path.parts) > 1 or path.is_file():
        return path
    shipped = {file.stem: file for file in sorted((shelf() / "accelerate_configs").glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    hint = suggest(name, shipped) or f"shipped: {', '.join(shipped)}"
    raise user_error("launch-file", f"there is no file and no shipped launch configuration '{name}'", hint)


def change_launch(launch: Launch, options: Sequence[str]) -> Launch:
    """A launch configuration with options of the command line (`--num_processes=2`), which go before the file's."""
    given = dict(option.removeprefix("--").split("=", 1) for option in options)
    numbers = {key: int(value) if value.isdigit() else value for key, value in given.items()}
    return replace(launch, values=launch.values | numbers)


def read_launch(file: Path) -> Launch:
    """Reads a launch configuration, and refuses what accelerate would ignore or read otherwise.

    Raises:
        UserError: It can't be read, is no accelerate configuration, or has unknown keys.
    """
    values, marks, problems = _read_values(file)
    mark = Mark(str(file))

    def place(path: KeyPath) -> Mark:
        return marks.get(path, mark)

    if not {"distributed_type", "num_processes", "compute_environment"} & set(values):
        message = "this is not a launch configuration of accelerate: it has no distributed_type and no num_processes"
        raise user_error("launch-file", message, "make one with `accelerate config`, or take a shipped one", mark)
    for error in Draft202012Validator(schema.load("upstream/accelerate_config.schema.json")).iter_errors(values):
        path: KeyPath = tuple(error.absolute_path)
        if error.validator != "additionalProperties":
            problems.append(Problem("launch-file", error.message, place(path), path))
            continue
        known = error.schema["properties"]
        unknown = [(*path, key) for key in error.instance if key not in known and f"fsdp_{key}" not in known]
        problems += at_most(
            Problem("launch-unknown-key", "unknown key", place(at), at, suggest(str(at[-1]), known)) for at in unknown
        )
    if problems:
        raise UserError(sort_problems(problems))
    section = values.get("deepspeed_config") or {}
    if "deepspeed_config_file" in section and (beside := [*_said_twice(section), *_said_twice(values)]):
        message = f"accelerate takes {beside[0]} from the DeepSpeed file, and refuses it here"
        problems.append(
            Problem("launch-file", message, place(("deepspeed_config",)), ("deepspeed_config",), "remove it")
        )
    deepspeed, found = _read_deepspeed(values, file)
    path = ("deepspeed_config", "deepspeed_config_file")
    problems += [Problem("launch-file", message, place(path), path, fix) for message, fix in found]
    if problems:
        raise UserError(sort_problems(problems))
    return Launch(str(file), values, deepspeed, marks)


def _read_values(file: Path) -> tuple[dict[str, Any], Mapping[KeyPath, Mark], list[Problem]]:
    """Values and marks of a file, and where accelerate, whose YAML is 1.1, would read others."""
    mark = Mark(str(file))
    if file.suffix == ".json":
        try:
            values = read_json(file)
        except OSError as error:
            raise user_error("unreadable-file", str(error.strerror), "check the path", mark) from error
        except ValueError as error:
            raise user_error("launch-file", f"not JSON: {error}", "fix the file", mark) from error
        return (values, {}, []) if isinstance(values, dict) else ({}, {}, [])
    document = read_document(file)
    problems = list(document.problems)
    try:
        theirs = yaml.safe_load(document.text)
    except (yaml.YAMLError, ValueError) as error:
        raise user_error("launch-file", f"accelerate can't read it: {first_line(error)}", "fix it", mark) from error
    for key, value in document.values.items():
        if theirs.get(key) != value:  # NO is false, 1e3 is a text
            message = f"accelerate reads {value} as {json.dumps(theirs.get(key), default=str)} here (YAML 1.1)"
            at = document.key_marks.get((key,), mark)
            problems.append(Problem("launch-file", message, at, (key,), f"write '{value}', in quotes"))
    return document.values, document.key_marks, problems


def _said_twice(section: Mapping[str, Any]) -> list[str]:
    """What may not stand beside a DeepSpeed file. Source: accelerate 1.15, utils/dataclasses.py, DeepSpeedPlugin."""
    names = ["gradient_accumulation_steps", "gradient_clipping", "zero_stage", "offload_optimizer_device"]
    names += ["offload_param_device", "zero3_save_16bit_model", "mixed_precision"]
    return [name for name in names if name in section]


def _read_deepspeed(values: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The DeepSpeed JSON file that a launch configuration names, relative to the current folder, as for accelerate."""
    name = (values.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if name is None:
        return {}, []
    try:
        read = read_json(Path(os.path.expanduser(str(name))))
    except OSError as error:
        return {}, [(f"the DeepSpeed file {name} can't be read: {error.strerror}", f"it is looked for in {Path.cwd()}")]
    except ValueError as error:
        return {}, [(f"the DeepSpeed file {name} is not JSON: {error}", "fix the file")]
    return (read, []) if isinstance(read, dict) else ({}, [(f"the DeepSpeed file {name} is not a JSON object", "")])


def launch_from_environment(environment: Mapping[str, str]) -> Launch | None:
    """What `accelerate launch` has set up for this process; None when nothing did.

    Source: accelerate/utils/launch.py 1.15.0, prepare_multi_gpu_env and prepare_deepspeed_cmd_env.
    """
    on = {name for name in ("FSDP", "DEEPSPEED") if environment.get(f"ACCELERATE_USE_{name}", "").lower() == "true"}
    if "ACCELERATE_MIXED_PRECISION" not in environment and not on:
        return None
    values: dict[str, Any] = {"mixed_precision": environment.get("ACCELERATE_MIXED_PRECISION", "no")}
    values["distributed_type"] = next(iter(on)) if on else "NO"
    deepspeed: dict[str, Any] = {}
    if "FSDP" in on:
        values["fsdp_config"] = {
            key.lower(): value == "true" if value in ("true", "false") else value
            for key, value in environment.items()
            if key.startswith("FSDP_")
        }
    if "DEEPSPEED" in on:
        names = {
            "zero_stage": "DEEPSPEED_ZERO_STAGE",
            "gradient_accumulation_steps": "GRADIENT_ACCUMULATION_STEPS",
            "gradient_clipping": "GRADIENT_CLIPPING",
            "offload_optimizer_device": "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
            "zero3_save_16bit_model": "DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
            "deepspeed_config_file": "DEEPSPEED_CONFIG_FILE",
        }
        found = {
            key: environment[f"ACCELERATE_{name}"] for key, name in names.items() if f"ACCELERATE_{name}" in environment
        }
        values["deepspeed_config"] = {key: value for key, value in found.items() if value != "None"}
        deepspeed = _read_deepspeed(values, Path())[0]
    return Launch("the launcher", values, deepspeed)
