"""Rules about `training`, alone and against the other sections. One small function a rule."""

from collections.abc import Mapping
from typing import Any

from recipe_runner.methods import METHODS
from recipe_runner.problems.problem import Found
from recipe_runner.problems.words import suggest
from recipe_runner.recipe.sections import DatasetSection, RunSection, UpstreamSection
from recipe_runner.stages import Stage

# transformers 5.23, trainer_optimizer.py: optimizers that are not given adam_beta1, adam_beta2 and adam_epsilon;
# optimization.py: schedules that go by what evaluations measure, and so have no warm-up.
_NOT_ADAM = ("adafactor", "adagrad", "adalomo", "galore", "grokadamw", "lomo", "rmsprop", "schedule_free_sgd", "sgd")
_SMOOTHED = {"aot", "aot_unpaired", "exo_pair", "robust"}  # TRL 1.16, DPOTrainer: losses that label_smoothing is for
_OF_EVALUATION = ("bf16_full_eval", "fp16_full_eval", "include_for_metrics", "batch_eval_metrics")
_MEASURING = ("greedy", "reduce_lr_on_plateau")
_FALLING = ("loss", "entropy", "kl", "runtime")  # measures of which less is better; of others more is
_RISING = ("mean_token_accuracy", "rewards/accuracies", "rewards/margins", "accuracy", "margin")


def precision_conflict(training: UpstreamSection) -> Found:
    """One mixed precision at a time."""
    if training["bf16"] and training["fp16"]:
        yield ("training", "fp16"), "both bf16 and fp16 are on", "keep one"


def eval_without_data(training: UpstreamSection, dataset: DatasetSection) -> Found:
    """Evaluation needs data."""
    strategy = training["eval_strategy"]
    fix = "add 'eval: {fraction: 0.02}' to dataset"
    if strategy != "no" and not dataset.has_eval:
        found = f"eval_strategy is {strategy}, but there is no evaluation data"
        yield ("training", "eval_strategy"), found, fix
    if training["eval_on_start"] and not dataset.has_eval:
        yield ("training", "eval_on_start"), "there is no evaluation data", fix


def eval_data_unused(training: UpstreamSection, dataset: DatasetSection) -> Found:
    """Held-out data that is never evaluated is data lost."""
    if dataset.has_eval and training["eval_strategy"] == "no":
        fix = "set training.eval_strategy to steps or epoch, or remove eval"
        yield ("dataset", "eval"), "the evaluation data is never used", fix


def best_model_schedule(training: UpstreamSection) -> Found:
    """load_best_model_at_end compares checkpoints: both schedules must agree (transformers' TrainingArguments)."""
    if not training["load_best_model_at_end"]:
        return
    path = ("training", "load_best_model_at_end")
    save, evaluate = training["save_strategy"], training["eval_strategy"]
    if save != evaluate and save != "best":
        yield path, f"save_strategy is {save}, eval_strategy is {evaluate}", "give both the same value"
    elif save == "steps" and isinstance(training["save_steps"], int):
        steps = training["eval_steps"] or training["logging_steps"]
        if training["save_steps"] % steps:
            found = f"save_steps ({training['save_steps']}) is not a multiple of eval_steps ({steps})"
            yield path, found, "make it one"


def early_stopping(training: UpstreamSection, run: RunSection) -> Found:
    """It looks at evaluations, and the last weights are not the best ones: which are kept must be said."""
    if not run.early_stopping:
        return
    path = ("run", "early_stopping")
    if training["eval_strategy"] == "no":
        yield path, "nothing is evaluated, so nothing can stop improving", "set dataset.eval and training.eval_strategy"
    if "load_best_model_at_end" not in training.said:
        fix = "set training.load_best_model_at_end: true for the best ones, or false for the last"
        yield path, "the weights at the end are not the best ones, and the recipe does not say which it wants", fix


def samples(training: UpstreamSection, run: RunSection, has_eval: bool, stage: Stage) -> Found:
    """Answers at each evaluation need evaluations, rows need data that is held out; a reward model writes none."""
    asked, path = run.samples or {}, ("run", "samples")
    if asked and stage.scores:
        yield path, f"a model of stage {stage.name} gives numbers, and writes no answers", "remove the key"
        return
    if asked.get("every") == "eval" and training["eval_strategy"] == "no":
        fix = "set training.eval_strategy, or every: 100 (steps)"
        yield (*path, "every"), "nothing is evaluated, so nothing would be written", fix
    if asked.get("rows") and not has_eval:
        yield (*path, "rows"), "there is no evaluation data to take rows from", "set dataset.eval, or write prompts"


def best_metric(stage: Stage, training: UpstreamSection) -> Found:
    """The best checkpoint is chosen by what evaluations measure; transformers looks for it after the first one."""
    metric = training.said.get("metric_for_best_model")
    known = ["loss", *stage.logged, "runtime", "samples_per_second", "steps_per_second"]
    if metric and str(metric).removeprefix("eval_") not in known:
        fix = suggest(str(metric), known) or f"measured: {', '.join(known)}"
        yield ("training", "metric_for_best_model"), f"evaluations of stage {stage.name} do not measure '{metric}'", fix
    greater = training.said.get("greater_is_better")
    name = str(metric or "loss").removeprefix("eval_")
    if (greater is True and name in _FALLING) or (greater is False and name in _RISING):
        found = f"of '{metric or 'loss'}' the {'greatest' if greater else 'smallest'} value is the worst"
        yield ("training", "greater_is_better"), found, f"remove the key, or set it to {str(not greater).lower()}"


def wrapped_packing(training: UpstreamSection, dataset: DatasetSection) -> Found:
    """TRL's `wrapped` makes one text of all rows: right for raw text only. Source: trl/data_utils.py 1.16.0."""
    if training["packing"] and training["packing_strategy"] == "wrapped" and dataset.format != "text":
        found = "rows are cut anywhere, and each sees the ones before it: it is meant for raw text"
        yield ("training", "packing_strategy"), found, "use bfd, or bfd_split to lose no token"


def least_rate(training: UpstreamSection) -> Found:
    """What a schedule falls to is no more than what it begins with. `min_lr_rate` is a share of the learning rate."""
    options, rate = training["lr_scheduler_kwargs"] or {}, training["learning_rate"]
    for key, most in (("min_lr_rate", 1), ("min_lr", rate)):
        value = options.get(key) if isinstance(options, Mapping) else None
        if isinstance(value, int | float) and isinstance(most, int | float) and value > most:
            found = (
                f"{key} is {value:g}: the learning rate would rise, to {value if key == 'min_lr' else value * rate:g}"
            )
            yield ("training", "lr_scheduler_kwargs"), found, f"take at most {most:g}"


def warmup_length(training: UpstreamSection, steps: int) -> Found:
    """A warm-up as long as the training: the learning rate that the recipe asks for is never reached."""
    warmup = training["warmup_steps"] or 0
    if 1 < steps <= warmup:
        found = f"a warm-up of {warmup:g} steps in {steps:,} steps of training: the learning rate is never reached"
        yield ("training", "warmup_steps"), found, "make it shorter (below 1: a share of all steps)"


def never_evaluated(training: UpstreamSection, steps: int) -> Found:
    """Evaluations that come after the end. Below 1, eval_steps is a share of all steps."""
    first = training["eval_steps"] or training["logging_steps"]
    if training["eval_strategy"] == "steps" and 0 < steps < first:
        found = f"the first evaluation would come after step {first:,}, of {steps:,}: nothing is evaluated"
        found += ", and no best checkpoint chosen" * bool(training["load_best_model_at_end"])
        yield ("training", "eval_steps"), found, "make it smaller (below 1: a share of all steps)"


def packing_without_length(training: UpstreamSection) -> Found:
    """Packing fills rows up to max_length."""
    if training["packing"] and training["max_length"] is None:
        yield ("training", "max_length"), "packing needs a length to fill", "set max_length"


def synced_reference(training: UpstreamSection, peft: UpstreamSection) -> Found:
    """With an adapter the reference is the model without it: there is nothing to sync. Source: TRL 1.16, DPOTrainer."""
    if training["sync_ref_model"] and peft:
        found = "an adapter's reference is the base model, or a frozen copy"
        yield ("training", "sync_ref_model"), found, "remove the key"


def packed_evaluation(stage: Stage, training: UpstreamSection, dataset: DatasetSection) -> Found:
    """Packed evaluation rows give another eval_loss than single ones: the recipe says which it means.

    Source: TRL 1.16, SFTConfig.eval_packing (left out: as `packing`); transformers averages the loss over batches.
    """
    if not stage.packs and training["packing"] and dataset.has_eval and training["eval_packing"] is None:
        found = "evaluation rows are packed, too: eval_loss is then a mean over packed rows, not over documents"
        yield ("training", "packing"), found, "set training.eval_packing to true or false"


def paged_optimizer_on_cpu(training: UpstreamSection, peft: UpstreamSection) -> Found:
    """A paged optimizer moves its states from the GPU to CPU memory: on a CPU there is nothing to move."""
    if "paged" in training["optim"] and training["use_cpu"] and not peft:
        found = f"{training['optim']} pages nothing on a CPU: the states of all weights stay in memory"
        yield ("training", "optim"), found, "write optim: adamw_torch, or adafactor for less memory"


def global_batch_size(training: UpstreamSection, run: RunSection) -> Found:
    """Accumulation has one owner, and a step holds whole batches of a device."""
    size, device = run.global_batch_size, training["per_device_train_batch_size"]
    if size and "gradient_accumulation_steps" in training.said:
        found = "run.global_batch_size derives it"
        yield ("training", "gradient_accumulation_steps"), found, "remove one of them"
    elif size and size % device:
        found = f"{size} rows are not a multiple of per_device_train_batch_size ({device})"
        yield ("run", "global_batch_size"), found, "make it one"


def ignored_keys(stage: Stage, training: UpstreamSection, dataset: DatasetSection) -> Found:
    """Fields that upstream does not look at, given the others (transformers' TrainingArguments, TRL's SFTConfig)."""
    optim, scheduler, best = training["optim"], training["lr_scheduler_type"], training["load_best_model_at_end"]
    best = best or training["save_strategy"] == "best" or scheduler in _MEASURING
    ignored: dict[str, Any] = {
        "num_train_epochs": training["max_steps"] > 0 and "max_steps is set",
        "eval_steps": training["eval_strategy"] != "steps" and "eval_strategy is not steps",
        "save_steps": training["save_strategy"] != "steps" and "save_strategy is not steps",
        "save_total_limit": training["save_strategy"] == "no" and "save_strategy is no",
        "logging_steps": training["logging_strategy"] != "steps" and "logging_strategy is not steps",
        "packing_strategy": not (training["packing"] or training["eval_packing"]) and "packing is off",
        "warmup_steps": scheduler in ("constant", *_MEASURING) and f"lr_scheduler_type is {scheduler}",
        "lr_scheduler_kwargs": scheduler.startswith("constant") and f"lr_scheduler_type is {scheduler}",
        "optim_target_modules": not optim.startswith(("galore", "apollo")) and f"optim is {optim}",
        "adam_beta1": optim.startswith(_NOT_ADAM) and f"optim is {optim}",
        "adam_beta2": optim.startswith(_NOT_ADAM) and f"optim is {optim}",
        "adam_epsilon": (optim.startswith(_NOT_ADAM) or "lion" in optim) and f"optim is {optim}",
        "metric_for_best_model": not best and "no best checkpoint is asked for: load_best_model_at_end",
        "greater_is_better": not best and "no best checkpoint is asked for: load_best_model_at_end",
        "gradient_checkpointing_kwargs": not training["gradient_checkpointing"] and "gradient_checkpointing is off",
        "dataloader_persistent_workers": not training["dataloader_num_workers"] and "dataloader_num_workers is 0",
        "dataloader_prefetch_factor": not training["dataloader_num_workers"] and "dataloader_num_workers is 0",
        "precompute_ref_batch_size": not training["precompute_ref_log_probs"] and "precompute_ref_log_probs is off",
        "ref_model_mixup_alpha": not training["sync_ref_model"] and "sync_ref_model is off",
        "ref_model_sync_steps": not training["sync_ref_model"] and "sync_ref_model is off",
        "f_alpha_divergence_coef": training["f_divergence_type"] != "alpha_divergence"
        and "f_divergence_type is not alpha_divergence",
        "label_smoothing": not _SMOOTHED & set(training["loss_type"] or ())
        and f"loss_type is none of {', '.join(sorted(_SMOOTHED))}",
        "label_smoothing_factor": stage.reference and f"stage {stage.name} has a loss of its own",
        "length_column_name": training["train_sampling_strategy"] != "group_by_length"
        and "train_sampling_strategy is not group_by_length",
        "discopop_tau": "discopop" not in str(training["loss_type"]) and "loss_type is not discopop",
    }
    if not dataset.has_eval:
        evaluating = ("eval_strategy", "eval_on_start")  # errors of their own: eval-without-data
        options = [
            key for key in training.said if key.startswith(("eval_", "per_device_eval")) or key in _OF_EVALUATION
        ]
        ignored |= {key: "there is no evaluation data" for key in options if key not in evaluating}
    for key, reason in ignored.items():
        if key in training.said and reason:
            yield ("training", key), f"has no effect: {reason}", "remove the key"


def learning_rate(stage: Stage, training: UpstreamSection, peft: UpstreamSection) -> Found:
    """Adapters take a tenfold higher rate than full fine-tuning, and preference tuning a lower one: see `stages`."""
    rates, rate = stage.adapter_rates if peft else stage.full_rates, training.said.get("learning_rate")
    method = METHODS.get(str(peft["method"]))
    high = max(rates.high, method.highest_rate) if method else rates.high
    if rate is not None and not rates.low <= rate <= high and not (method and method.tried):
        fix = f"usual: {rates.low:g} to {high:g}" + f" ({rates.source})" * (high == rates.high)
        which = "an adapter" if peft else "full fine-tuning"
        which = f"{which} of the method {method.name}" if method and method.highest_rate else which
        yield ("training", "learning_rate"), f"{rate:g} is unusual for {which}", fix


def peft_optimizer(training: UpstreamSection, peft: UpstreamSection) -> Found:
    """PEFT's optimizers are for LoRA's two matrices. Source: PEFT 0.21, optimizers/."""
    section, path = training["peft_optimizer"], ("training", "peft_optimizer")
    if not section:
        return
    name, said = section.get("name"), set(section) - {"name"}
    own = {"loraplus": {"loraplus_lr_ratio", "loraplus_lr_embedding"}, "riemannian": {"reg"}}.get(str(name), set())
    if peft["method"] != "lora":
        yield path, f"{name} is for LoRA's two matrices", "set peft.method: lora, or remove the key"
    for key in sorted(said - own):
        yield (*path, key), f"{name} does not look at it", "remove the key"
    if name == "loraplus" and "loraplus_lr_ratio" not in said:
        yield path, "loraplus needs loraplus_lr_ratio", "add 'loraplus_lr_ratio: 16'"
    if name == "lorafa" and peft["use_dora"]:
        yield path, "lorafa does not know DoRA's lengths", "remove one of them"
    if name == "lorafa":
        for key in ("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules"):
            if key in training.said:
                yield ("training", key), "lorafa is an optimizer of its own, and ignores it", "remove the key"
