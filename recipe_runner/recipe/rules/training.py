"""Rules across sections: what each section allows, but the whole does not. One small function a rule."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipe_runner.problems.problem import KeyPath, Mark, Problem, as_warning
from recipe_runner.recipe.rules import adapter as adapter_rules
from recipe_runner.recipe.rules import data as data_rules
from recipe_runner.recipe.rules import model as model_rules
from recipe_runner.recipe.rules.data import Found, Values
from recipe_runner.recipe.rules.packages import missing_packages


def check_rules(values: Values, place: Callable[[KeyPath, bool], Mark], file: Path) -> list[Problem]:
    """Applies every rule to a recipe that passed the schema, with defaults and absolute paths filled in."""
    problems = []
    for code, rule in RULES.items():
        for path, message, suggestion in rule(values):
            problem = Problem(code, message, place(path, True), path, suggestion)
            problems.append(as_warning(problem) if code in WARNINGS else problem)
    return problems + check_name(values, place, file)


def check_name(values: Values, place: Callable[[KeyPath, bool], Mark], file: Path) -> list[Problem]:
    """A recipe and its file have one name."""
    if file.stem in (values.get("name"), "recipe", "resolved"):  # a run folder keeps copies by those names
        return []
    message = f"the recipe is named '{values.get('name')}', its file '{file.name}'"
    return [as_warning(Problem("name-differs", message, place(("name",), False), ("name",), "give both the same name"))]


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


def synced_reference(values: Values) -> Found:
    """With an adapter the reference is the model without it: there is nothing to sync. Source: TRL 1.16, DPOTrainer."""
    if values["training"].get("sync_ref_model") and values.get("peft"):
        yield (
            ("training", "sync_ref_model"),
            "an adapter's reference is the base model, or a frozen copy",
            "remove the key",
        )


def packed_evaluation(values: Values) -> Found:
    """Packed evaluation rows give another eval_loss than single ones: the recipe says which it means.

    Source: TRL 1.16, SFTConfig.eval_packing (left out: as `packing`); transformers averages the loss over batches.
    """
    training = values["training"]
    documents = values["stage"] != "pretrain"  # there, packed rows are what is meant
    if documents and training.get("packing") and "eval" in values["dataset"] and training.get("eval_packing") is None:
        found = "evaluation rows are packed, too: eval_loss is then a mean over packed rows, not over documents"
        yield ("training", "packing"), found, "set training.eval_packing to true or false"


def paged_optimizer_on_cpu(values: Values) -> Found:
    """A paged optimizer moves its states from the GPU to CPU memory: on a CPU there is nothing to move."""
    training = values["training"]
    if "paged" in training.get("optim", "") and training.get("use_cpu") and not values.get("peft"):
        found = f"{training['optim']} pages nothing on a CPU: the states of all weights stay in memory"
        yield ("training", "optim"), found, "write optim: adamw_torch, or adafactor for less memory"


def global_batch_size(values: Values) -> Found:
    """Accumulation has one owner, and a step holds whole batches of a device."""
    size, training = values["run"].get("global_batch_size"), values["training"]
    device = training.get("per_device_train_batch_size", 8)
    if size and "gradient_accumulation_steps" in training:
        found = "run.global_batch_size derives it"
        yield ("training", "gradient_accumulation_steps"), found, "remove one of them"
    elif size and size % device:
        found = f"{size} rows are no multiple of per_device_train_batch_size ({device})"
        yield ("run", "global_batch_size"), found, "make it one"


def ignored_keys(values: Values) -> Found:
    """Fields that upstream does not look at, given the others (transformers' TrainingArguments, TRL's SFTConfig)."""
    training = values["training"]
    ignored: dict[str, Any] = {
        "num_train_epochs": training.get("max_steps", -1) > 0 and "max_steps is set",
        "eval_steps": training.get("eval_strategy", "no") != "steps" and "eval_strategy is not steps",
        "save_steps": training.get("save_strategy", "steps") != "steps" and "save_strategy is not steps",
        "logging_steps": training.get("logging_strategy", "steps") != "steps" and "logging_strategy is not steps",
        "packing_strategy": not (training.get("packing") or training.get("eval_packing")) and "packing is off",
    }
    if "eval" not in values["dataset"]:
        evaluating = ("eval_strategy", "eval_on_start")  # errors of their own: eval-without-data
        options = [key for key in training if key.startswith(("eval_", "per_device_eval")) and key not in evaluating]
        ignored |= dict.fromkeys(options, "there is no evaluation data")
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


def learning_rate(values: Values) -> Found:
    """Adapters take a tenfold higher rate than full fine-tuning.

    Source: QLoRA (arXiv 2305.14314) trains adapters at 1e-4 to 2e-4; TRL's default for full fine-tuning is 2e-5. The
    ranges here are wider by a factor of ten or more.
    """
    low, high = (2e-6, 6e-3) if values.get("peft") else (2e-7, 1e-3)
    if values["stage"] == "dpo":
        low, high = low / 20, high / 20
    rate = values["training"].get("learning_rate")
    if rate is not None and not low <= rate <= high:
        method = "an adapter" if values.get("peft") else "full fine-tuning"
        source = "QLoRA, arXiv 2305.14314, takes 1e-4 to 2e-4" if values.get("peft") else "TRL 1.16's default is 2e-5"
        source = "TRL 1.16's default for DPO is 1e-6" if values["stage"] == "dpo" else source
        fix = f"usual: {low:g} to {high:g} ({source})"
        yield ("training", "learning_rate"), f"{rate:g} is unusual for {method}", fix


_MIXED = {"bf16": "bfloat16", "fp16": "float16"}
RULES: dict[str, Callable[[Values], Found]] = {
    "quantized-full-training": quantization_without_peft,
    "quantization-width": quantization_width,
    "precision-conflict": precision_conflict,
    "eval-without-data": eval_without_data,
    "eval-data-unused": eval_data_unused,
    "best-model-schedule": best_model_schedule,
    "packing-without-length": packing_without_length,
    "synced-reference": synced_reference,
    "packed-evaluation": packed_evaluation,
    "paged-optimizer-on-cpu": paged_optimizer_on_cpu,
    "missing-package": missing_packages,
    "global-batch-size": global_batch_size,
    "remote-code-unpinned": model_rules.remote_code_unpinned,
    "local-model": model_rules.local_model,
    "ignored-key": ignored_keys,
    "compute-dtype": compute_dtype,
    "fused-projections": model_rules.fused_projections,
    "context-length": model_rules.context_length,
    "unusual-learning-rate": learning_rate,
    "adapter-not-found": adapter_rules.adapter_folder,
    "adapter-without-peft": adapter_rules.adapter_needs_peft,
    "adapter-base-differs": adapter_rules.adapter_base,
    "adapter-config-differs": adapter_rules.adapter_config,
    "wrong-column-role": data_rules.column_roles,
    "mixture-weight": data_rules.mixture_weights,
    "wrong-source": data_rules.source_files,
    "template-use": data_rules.template_use,
}

# What may be meant: it is said, and never fails a run.
WARNINGS = {
    "ignored-key",
    "context-length",
    "unusual-learning-rate",
    "packed-evaluation",
    "paged-optimizer-on-cpu",
    "missing-package",
}
