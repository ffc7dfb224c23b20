"""Rules about a recipe under a launch configuration: where they contradict each other. One small function a rule.

The same rules are applied to a file, and to what `accelerate launch` put into the environment when a run begins.
"""

from collections.abc import Iterator
from typing import Any

from recipe_runner.launch.configuration import Launch
from recipe_runner.methods import METHODS
from recipe_runner.problems.problem import Found, Mark, Problem, as_warning, sort_problems
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.rules.adapter import FROM_DATA
from recipe_runner.recipe.sections import RunSection, UpstreamSection

WARNINGS = {"fsdp1-deprecated"}


def apply_rules(launch: Launch, recipe: Recipe) -> Iterator[tuple[str, Found]]:
    """Every rule by its code, applied to a launch configuration and the sections that it is about."""
    training, quantization = recipe.training, recipe.quantization
    yield "fsdp-quantized-storage", fsdp_quantized_storage(launch, quantization)
    yield "sharded-8bit", sharded_8bit(launch, quantization)
    yield "method-not-sharded", method_not_sharded(launch, recipe.peft, training)
    yield "samples-not-sharded", samples_not_sharded(launch, recipe.run, recipe.peft)
    yield "deepspeed-optimizer", deepspeed_optimizer(launch, training)
    yield "launcher-precision", launcher_precision(launch, training)
    yield "pinned-by-launcher", pinned_by_deepspeed(launch, training, recipe.run)
    yield "checkpointing-twice", checkpointing_twice(launch, training)
    yield "fsdp1-deprecated", fsdp_version(launch)
    yield "saves-nothing", saves_nothing(launch)
    yield "one-process-only", one_process_only(launch)
    yield "uneven-machines", machines(launch)


def check_launch(launch: Launch, recipe: Recipe) -> list[Problem]:
    """What contradicts a launch configuration in a recipe, or in the stages of a pipeline."""
    problems = []
    for stage in recipe.stages or (recipe,):
        for code, found in apply_rules(launch, stage):
            for path, message, fix in found:
                mark = launch.marks.get(path, launch.marks.get(path[:1], Mark(launch.name)))
                problem = Problem(code, message, mark, path, fix)
                problems.append(as_warning(problem) if code in WARNINGS else problem)
    return sort_problems(problems)


def fsdp_quantized_storage(launch: Launch, quantization: UpstreamSection) -> Found:
    """FSDP shards tensors of one dtype: 4-bit weights must be stored in the dtype of computation.

    Source: bitsandbytes' documentation, "FSDP-QLoRA"; accelerate 1.15 warns only, and leaves uint8 whole.
    """
    storage = quantization["bnb_4bit_quant_storage"] or "uint8"  # what BitsAndBytesConfig makes of None
    compute = quantization["bnb_4bit_compute_dtype"] or "float32"
    if launch.kind == "FSDP" and quantization["load_in_4bit"] and storage != compute:
        found = f"FSDP shards 4-bit weights only if bnb_4bit_quant_storage ({storage}) is the compute dtype ({compute})"
        yield ("distributed_type",), found, f"set quantization.bnb_4bit_quant_storage: {compute} in the recipe"


def sharded_8bit(launch: Launch, quantization: UpstreamSection) -> Found:
    """8-bit weights can't be sharded. Source: PEFT's documentation, "DeepSpeed" and "FSDP" (4-bit only)."""
    sharded = "FSDP" if launch.kind == "FSDP" else "ZeRO-3" if launch.zero_stage == 3 else ""
    if sharded and quantization["load_in_8bit"]:
        yield (
            ("distributed_type",),
            f"{sharded} can't shard 8-bit weights",
            "take 4-bit weights, or ddp or deepspeed_zero2",
        )


def method_not_sharded(launch: Launch, peft: UpstreamSection, training: UpstreamSection) -> Found:
    """What looks at whole weights or gradients can't be sharded.

    Source: PEFT 0.21: AdaLoRA reads gradients after the optimizer's step, which DeepSpeed has dropped by then; the
    initialisations read and change whole weights; its optimizers look at whole matrices.
    """
    sharded = launch.kind == "FSDP" or launch.zero_stage == 3
    engine = "DeepSpeed" if launch.is_deepspeed else "FSDP"
    begun = str(peft["init_lora_weights"])
    found = ""
    if peft["method"] == "adalora" and (launch.is_deepspeed or sharded):
        found = f"with {engine} AdaLoRA does not see the gradients by which it moves ranks"
    elif sharded and begun in (*FROM_DATA, "loftq"):
        found = f"{begun} reads whole weights before training, and {engine} shards them"
    elif training["peft_optimizer"] and (launch.is_deepspeed or sharded):
        found = f"training.peft_optimizer looks at LoRA's matrices, which {engine} flattens or shards"
    if found:
        yield ("distributed_type",), found, "take accelerate_configs/ddp.yaml"


def samples_not_sharded(launch: Launch, run: RunSection, peft: UpstreamSection) -> Found:
    """Answers while a model trains need its weights, which FSDP shards by layer, and ZeRO-3 gathers in its modules.

    Source: transformers 5.23, generate; PEFT 0.21 reads virtual tokens outside of them.
    """
    method = METHODS.get(str(peft["method"]))
    if run.samples and launch.kind == "FSDP":
        yield ("distributed_type",), "FSDP can't answer run.samples", "take ddp or deepspeed_zero3"
    elif run.samples and launch.zero_stage == 3 and method and method.is_prompt:
        yield (
            ("distributed_type",),
            "with ZeRO-3 virtual tokens can't answer run.samples",
            "take ddp or deepspeed_zero2",
        )


def deepspeed_optimizer(launch: Launch, training: UpstreamSection) -> Found:
    """An optimizer in DeepSpeed's file goes before the recipe's; offloading needs one that computes on the CPU.

    Source: transformers 5.23, integrations/deepspeed.py, deepspeed_optim_sched; DeepSpeed 0.19, ZeRO-Offload takes
    DeepSpeedCPUAdam, which accelerate 1.15 puts in place of AdamW and of nothing else.
    """
    optim = training.said.get("optim")
    for key, ours in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if launch.is_deepspeed and key in launch.deepspeed and ours in training.said:
            found = f"the DeepSpeed file has its own {key}: training.{ours} would be ignored"
            yield ("deepspeed_config",), found, "remove one of them"
    offload = launch.pinned("offload_optimizer_device")
    zero = launch.deepspeed.get("zero_optimization")
    if isinstance(zero, dict) and isinstance(zero.get("offload_optimizer"), dict):
        offload = zero["offload_optimizer"].get("device", offload)
    if offload in ("cpu", "nvme") and optim and not optim.startswith("adamw_torch"):
        found = f"DeepSpeed moves the optimizer's states to the {offload}: {optim} has its own way"
        yield ("deepspeed_config",), found, "set training.optim: adamw_torch in the recipe"


def launcher_precision(launch: Launch, training: UpstreamSection) -> Found:
    """Precision has one owner. Source: transformers 5.23, TrainingArguments (the launcher's where it has none)."""
    asked = launch.values.get("mixed_precision", "no")
    said = next((name for name in ("bf16", "fp16") if training[name]), None)
    off = any(training.said.get(name) is False for name in ("bf16", "fp16"))
    if asked not in (None, "no") and asked != said and (said or off):
        yield ("mixed_precision",), f"the launcher asks for {asked}, the recipe for {said or 'none'}", "write 'no' here"
    for name in ("bf16", "fp16"):
        section = launch.deepspeed.get(name)
        if isinstance(section, dict) and section.get("enabled") is True and said != name:
            found = f"the DeepSpeed file turns on {name}, the recipe asks for {said or 'none'}"
            yield ("deepspeed_config",), found, "write 'enabled': 'auto' there"


def pinned_by_deepspeed(launch: Launch, training: UpstreamSection, run: RunSection) -> Found:
    """What a recipe says, DeepSpeed's configuration may not say otherwise: `auto` takes it from the recipe.

    Source: transformers 5.23, integrations/deepspeed.py, HfTrainerDeepSpeedConfig, which refuses it late.
    """
    names = {
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "gradient_clipping": "max_grad_norm",
        "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    }
    for key, ours in names.items():
        value = launch.pinned(key)
        if value is not None and _as_number(value) != float(training[ours]):
            found = f"pinned to {value}, but training.{ours} is {training[ours]}"
            yield ("deepspeed_config", key), found, "write auto"
    if (whole := launch.pinned("train_batch_size")) is not None:
        yield ("deepspeed_config",), f"the DeepSpeed file pins train_batch_size to {whole}", "write auto there"
    if launch.pinned("gradient_accumulation_steps") is not None and run.global_batch_size:
        found = "pinned, but run.global_batch_size derives it"
        yield ("deepspeed_config", "gradient_accumulation_steps"), found, "write auto"


def _as_number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def checkpointing_twice(launch: Launch, training: UpstreamSection) -> Found:
    """Activations are checkpointed by FSDP or by the trainer. Source: transformers 5.23, trainer.py, refuses both."""
    if launch.fsdp("activation_checkpointing") is True and training["activation_checkpointing"] is not False:
        found = "activation checkpointing is on here, and in the recipe (TRL's default)"
        path = ("fsdp_config", "fsdp_activation_checkpointing")
        yield path, found, "turn it off here, or set training.activation_checkpointing: false"


def fsdp_version(launch: Launch) -> Found:
    """FSDP1 is deprecated. Source: accelerate 1.15, FullyShardedDataParallelPlugin; its default is still version 1."""
    version = launch.fsdp("version", 1)
    if version is not None and str(version) != "2":
        yield ("fsdp_config",), "FSDP1 is deprecated in PyTorch and accelerate", "set fsdp_version: 2"


def saves_nothing(launch: Launch) -> Found:
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


def one_process_only(launch: Launch) -> Found:
    """Processes that would train alone, or unsharded. Source: accelerate 1.15, commands/launch.py and state.py."""
    values = launch.values
    if launch.kind in ("MULTI_CPU", "NO") and not values.get("mpirun_config") and launch.processes > 1:
        found = f"{launch.kind} starts one process, not {launch.processes} (accelerate 1.15)"
        yield ("distributed_type",), found, "take accelerate_configs/cpu_2proc.yaml or ddp.yaml as a start"
    if launch.kind == "FSDP" and values.get("use_cpu"):
        yield ("distributed_type",), "on a CPU accelerate 1.15 does not shard: it would be plain DDP", "take cpu_2proc"


def machines(launch: Launch) -> Found:
    """Several machines share the processes evenly. Source: accelerate 1.15, launch.py, prepare_multi_gpu_env."""
    if launch.processes % launch.machines:
        found = f"{launch.processes} processes can't be shared by {launch.machines} machines"
        yield ("num_processes",), found, "make it a multiple"
