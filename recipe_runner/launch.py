"""Launch configurations: reading accelerate's file strictly, and checking it against a recipe. No ML stack.

accelerate ignores unknown keys in a section, and a contradiction between its file and a recipe shows late or never. The
same rules are applied to what `accelerate launch` put into the environment, when a run begins.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from recipe_runner import schema
from recipe_runner.document import read_document
from recipe_runner.errors import UserError, user_error
from recipe_runner.library import SUFFIXES, shelf
from recipe_runner.problem import KeyPath, Mark, Problem, as_warning, sort_problems
from recipe_runner.validate import suggest

Values = Mapping[str, Any]
Found = Iterator[tuple[KeyPath, str, str]]  # key path in the launch configuration, message, suggestion


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

    def fsdp(self, key: str, default: Any = None) -> Any:
        """A key of `fsdp_config`, with or without its prefix; None when FSDP is off."""
        if self.values.get("distributed_type") != "FSDP":
            return None
        section = self.values.get("fsdp_config") or {}
        return section.get(f"fsdp_{key}", section.get(key, default))

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed trains."""
        return bool(self.values.get("distributed_type") == "DEEPSPEED")

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


def read_launch(file: Path) -> Launch:
    """Reads a launch configuration, and refuses what accelerate would ignore or read otherwise.

    Raises:
        UserError: It can't be read, is no accelerate configuration, or has unknown keys.
    """
    document = read_document(file)
    values, problems = document.values, list(document.problems)
    mark = Mark(str(file))

    def place(path: KeyPath) -> Mark:
        return document.key_marks.get(path, mark)

    if not {"distributed_type", "num_processes", "compute_environment"} & set(values):
        message = "this is no launch configuration of accelerate: it has no distributed_type and no num_processes"
        raise user_error("launch-file", message, "make one with `accelerate config`, or take a shipped one", mark)
    for error in Draft202012Validator(schema.load("upstream/accelerate_config.schema.json")).iter_errors(values):
        path: KeyPath = tuple(error.absolute_path)
        if error.validator != "additionalProperties":
            problems.append(Problem("launch-file", error.message, place(path), path))
            continue
        known = error.schema["properties"]
        for key in error.instance:
            if key not in known and f"fsdp_{key}" not in known:
                at = (*path, key)
                problems.append(Problem("launch-unknown-key", "unknown key", place(at), at, suggest(key, known)))
    read_by_accelerate = yaml.safe_load(document.text)
    for key, value in values.items():
        if read_by_accelerate.get(key) != value:  # YAML 1.1: NO is false
            message = f"accelerate reads {value} as {json.dumps(read_by_accelerate.get(key))} here (YAML 1.1)"
            problems.append(Problem("launch-file", message, place((key,)), (key,), f"write '{value}', in quotes"))
    deepspeed, found = _read_deepspeed(values, file)
    path = ("deepspeed_config", "deepspeed_config_file")
    problems += [Problem("launch-file", message, place(path), path, fix) for message, fix in found]
    if problems:
        raise UserError(sort_problems(problems))
    return Launch(str(file), values, deepspeed, document.key_marks)


def _read_deepspeed(values: Values, file: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The DeepSpeed JSON file that a launch configuration names, relative to the current folder, as for accelerate."""
    name = (values.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if name is None:
        return {}, []
    try:
        read = json.loads(Path(os.path.expanduser(str(name))).read_text(encoding="utf-8"))
    except OSError as error:
        return {}, [(f"the DeepSpeed file {name} can't be read: {error.strerror}", f"it is looked for in {Path.cwd()}")]
    except ValueError as error:
        return {}, [(f"the DeepSpeed file {name} is not JSON: {error}", "mend the file")]
    return (read, []) if isinstance(read, dict) else ({}, [(f"the DeepSpeed file {name} is no JSON object", "")])


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


def check_launch(launch: Launch, recipe: Values) -> list[Problem]:
    """Applies every rule about a recipe under a launch configuration."""
    problems = []
    for code, rule in RULES.items():
        for path, message, fix in rule(launch, recipe):
            mark = launch.marks.get(path, launch.marks.get(path[:1], Mark(launch.name)))
            problem = Problem(code, message, mark, path, fix)
            problems.append(as_warning(problem) if code in WARNINGS else problem)
    return sort_problems(problems)


def fsdp_quantized_storage(launch: Launch, recipe: Values) -> Found:
    """FSDP shards tensors of one dtype: 4-bit weights must be stored in the dtype of computation.

    Source: bitsandbytes' documentation, "FSDP-QLoRA"; accelerate 1.15 warns only, and leaves uint8 whole.
    """
    quantization = recipe.get("quantization") or {}
    storage, compute = (quantization.get(f"bnb_4bit_{key}") for key in ("quant_storage", "compute_dtype"))
    if launch.values.get("distributed_type") == "FSDP" and quantization.get("load_in_4bit") and storage != compute:
        found = f"FSDP shards 4-bit weights only if bnb_4bit_quant_storage ({storage or 'uint8'}) is the compute dtype"
        wanted = compute or "bfloat16"
        yield ("distributed_type",), found, f"set quantization.bnb_4bit_quant_storage: {wanted} in the recipe"


def sharded_8bit(launch: Launch, recipe: Values) -> Found:
    """8-bit weights can't be sharded. Source: PEFT's documentation, "DeepSpeed" and "FSDP" (4-bit only)."""
    sharded = "FSDP" if launch.values.get("distributed_type") == "FSDP" else "ZeRO-3" if launch.zero_stage == 3 else ""
    if sharded and (recipe.get("quantization") or {}).get("load_in_8bit"):
        yield (
            ("distributed_type",),
            f"{sharded} can't shard 8-bit weights",
            "take 4-bit weights, or ddp or deepspeed_zero2",
        )


def deepspeed_optimizer(launch: Launch, recipe: Values) -> Found:
    """An optimizer in DeepSpeed's file goes before the recipe's; offloading needs one that computes on the CPU.

    Source: transformers 5.23, integrations/deepspeed.py, deepspeed_optim_sched; DeepSpeed 0.19, ZeRO-Offload takes
    DeepSpeedCPUAdam, which accelerate 1.15 puts in place of AdamW and of nothing else.
    """
    optim = recipe["training"].get("optim")
    for key, ours in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if launch.is_deepspeed and key in launch.deepspeed and ours in recipe["training"]:
            found = f"the DeepSpeed file has its own {key}: training.{ours} would be ignored"
            yield ("deepspeed_config",), found, "remove one of them"
    offload = launch.pinned("offload_optimizer_device")
    zero = launch.deepspeed.get("zero_optimization")
    if isinstance(zero, dict) and isinstance(zero.get("offload_optimizer"), dict):
        offload = zero["offload_optimizer"].get("device", offload)
    if offload in ("cpu", "nvme") and optim and not optim.startswith("adamw_torch"):
        found = f"DeepSpeed moves the optimizer's states to the {offload}: {optim} has its own way"
        yield ("deepspeed_config",), found, "set training.optim: adamw_torch in the recipe"


def launcher_precision(launch: Launch, recipe: Values) -> Found:
    """Precision has one owner. Source: transformers 5.23, TrainingArguments (the launcher's where it has none)."""
    asked = launch.values.get("mixed_precision", "no")
    said = next((name for name in ("bf16", "fp16") if recipe["training"].get(name)), None)
    off = any(recipe["training"].get(name) is False for name in ("bf16", "fp16"))
    if asked not in (None, "no") and asked != said and (said or off):
        yield ("mixed_precision",), f"the launcher asks for {asked}, the recipe for {said or 'none'}", "write 'no' here"


def pinned_by_deepspeed(launch: Launch, recipe: Values) -> Found:
    """What a recipe says, DeepSpeed's configuration may not say otherwise: `auto` takes it from the recipe.

    Source: transformers 5.23, integrations/deepspeed.py, HfTrainerDeepSpeedConfig, which refuses it late.
    """
    training = recipe["training"]
    names = {
        "gradient_accumulation_steps": ("gradient_accumulation_steps", 1),
        "gradient_clipping": ("max_grad_norm", 1.0),
        "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", 8),
    }
    for key, (ours, default) in names.items():
        value = launch.pinned(key)
        if value is not None and float(value) != float(training.get(ours, default)):
            found = f"pinned to {value}, but training.{ours} is {training.get(ours, default)}"
            yield ("deepspeed_config", key), found, "write auto"
    if launch.pinned("gradient_accumulation_steps") is not None and recipe["run"].get("global_batch_size"):
        found = "pinned, but run.global_batch_size derives it"
        yield ("deepspeed_config", "gradient_accumulation_steps"), found, "write auto"


def checkpointing_twice(launch: Launch, recipe: Values) -> Found:
    """Activations are checkpointed by FSDP or by the trainer. Source: transformers 5.23, trainer.py, refuses both."""
    if launch.fsdp("activation_checkpointing") is True and recipe["training"].get("activation_checkpointing", True):
        found = "activation checkpointing is on here, and in the recipe (TRL's default)"
        path = ("fsdp_config", "fsdp_activation_checkpointing")
        yield path, found, "turn it off here, or set training.activation_checkpointing: false"


def fsdp_version(launch: Launch, recipe: Values) -> Found:
    """FSDP1 is deprecated. Source: accelerate 1.15, FullyShardedDataParallelPlugin; its default is still version 1."""
    version = launch.fsdp("version", 1)
    if version is not None and str(version) != "2":
        yield ("fsdp_config",), "FSDP1 is deprecated in PyTorch and accelerate", "set fsdp_version: 2"


def saves_nothing(launch: Launch, recipe: Values) -> Found:
    """The result of a run is one whole adapter or model.

    Source: transformers 5.23, Trainer.save_model writes nothing with FSDP's SHARDED_STATE_DICT, and needs
    zero3_save_16bit_model with ZeRO-3.
    """
    kind = launch.fsdp("state_dict_type", "SHARDED_STATE_DICT" if str(launch.fsdp("version", 1)) == "2" else "FULL")
    if kind is not None and "FULL" not in str(kind):
        found = f"with {kind} transformers saves no model at the end"
        yield ("fsdp_config",), found, "set fsdp_state_dict_type: FULL_STATE_DICT"
    zero = launch.deepspeed.get("zero_optimization") if launch.deepspeed else None
    saves = launch.pinned("zero3_save_16bit_model")
    if isinstance(zero, dict):
        saves = zero.get("stage3_gather_16bit_weights_on_model_save", saves)
    if launch.zero_stage == 3 and str(saves).lower() != "true":
        found = "with ZeRO-3 and without zero3_save_16bit_model no model is saved that can be loaded"
        yield ("deepspeed_config", "zero3_save_16bit_model"), found, "set it to true"


def one_process_only(launch: Launch, recipe: Values) -> Found:
    """Processes that would train alone, or unsharded. Source: accelerate 1.15, commands/launch.py and state.py."""
    values = launch.values
    count = values.get("num_processes", 1)
    if values.get("distributed_type") in ("MULTI_CPU", "NO") and not values.get("mpirun_config") and count > 1:
        found = f"{values['distributed_type']} starts one process, not {count} (accelerate 1.15)"
        yield ("distributed_type",), found, "take accelerate_configs/cpu_2proc.yaml or ddp.yaml as a start"
    if values.get("distributed_type") == "FSDP" and values.get("use_cpu"):
        yield ("distributed_type",), "on a CPU accelerate 1.15 does not shard: it would be plain DDP", "take cpu_2proc"


def machines(launch: Launch, recipe: Values) -> Found:
    """Several machines share the processes evenly. Source: accelerate 1.15, launch.py, prepare_multi_gpu_env."""
    count, processes = launch.values.get("num_machines", 1), launch.values.get("num_processes", 1)
    if count > 1 and processes % count:
        yield ("num_processes",), f"{processes} processes can't be shared by {count} machines", "make it a multiple"


RULES: dict[str, Callable[[Launch, Values], Found]] = {
    "fsdp-quantized-storage": fsdp_quantized_storage,
    "sharded-8bit": sharded_8bit,
    "deepspeed-optimizer": deepspeed_optimizer,
    "launcher-precision": launcher_precision,
    "pinned-by-launcher": pinned_by_deepspeed,
    "checkpointing-twice": checkpointing_twice,
    "fsdp1-deprecated": fsdp_version,
    "saves-nothing": saves_nothing,
    "one-process-only": one_process_only,
    "uneven-machines": machines,
}
WARNINGS = {"fsdp1-deprecated"}
