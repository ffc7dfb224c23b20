"""From axolotl's configuration to a recipe."""

import re

from recipe_runner.importing import common
from recipe_runner.importing.axolotl_data import put_data
from recipe_runner.importing.draft import CONVERTED, IGNORED, NONE, SAME, Draft, as_list, number, true
from recipe_runner.importing.sharding import convert_sharding
from recipe_runner.stages import DPO, KTO, PRETRAIN, REWARD, SFT

UNTRAINED = "added there, and their embeddings not trained: model.add_special_tokens, with peft.modules_to_save"


def convert(draft: Draft) -> None:
    """Fills the draft's recipe with what its file says."""
    _choose_stage(draft)
    for step in (_put_model, _put_adapter, put_data, _put_training, _put_saving):
        step(draft)
    convert_sharding(draft)


def _choose_stage(draft: Draft) -> None:
    rl = draft.get("rl")
    if why := draft.tool.no_stages.get(str(rl)):
        raise draft.refuse(f"rl: {rl} can't be converted: {why}")
    if rl and str(rl) not in draft.tool.stages:
        raise draft.refuse(f"rl: {rl} is not known here")
    for key in ("process_reward_model", "diffusion", "distill", "kd_trainer"):
        if draft.get(key):
            raise draft.refuse(f"{key}: there is no such stage here")
    stage = REWARD if true(draft.get("reward_model")) else draft.tool.stages.get(str(rl), SFT)
    if draft.get("pretraining_dataset"):
        stage = PRETRAIN
    draft.recipe |= {"stage": stage}
    nested = draft.mapping("trl")
    betas = {
        "trl": number(nested.get("beta")),
        "rl_beta": draft.number("rl_beta"),
        "dpo_beta": draft.number("dpo_beta"),
    }
    if stage in (DPO, KTO) and (key := next((key for key, beta in betas.items() if beta is not None), "")):
        draft.convert("training.beta", betas[key], key)
        draft.note(IGNORED, f"{key} goes before it", "rl_beta", "dpo_beta")
    left = ", ".join(str(name) for name in nested if name != "beta")
    draft.note(NONE if left else IGNORED, f"{left}: of stages that generate" if left else "of preferences only", "trl")
    if rl == "ipo":
        draft.put("training.loss_type", ["ipo"], "rl")
    draft.note(CONVERTED, f"stage: {stage}", "rl", "reward_model")


def _put_model(draft: Draft) -> None:
    common.convert_model(draft, "base_model", "revision_of_model")
    if isinstance(adapter := draft.get("lora_model_dir"), str):
        draft.convert("model.adapter", draft.place_model(adapter), "lora_model_dir")
    keys = ("attn_implementation", "flash_attention", "sdp_attention", "eager_attention", "flex_attention")
    names = dict(zip(keys[1:], ("flash_attention_2", "sdpa", "eager", "flex_attention"), strict=True))
    chosen = next((name for key, name in names.items() if true(draft.get(key))), None)
    common.convert_attention(draft, draft.get("attn_implementation") or chosen, *keys, "xformers_attention")
    special = draft.mapping("special_tokens")
    end = special.get("eos_token") if draft.recipe["stage"] in (SFT, PRETRAIN, REWARD) else None
    if end:
        draft.put("training.eos_token", end, "special_tokens")
    if isinstance(draft.get("tokens"), dict):
        draft.note(IGNORED, "a mapping is of older versions: 0.18 takes a list", "tokens")
    more = [str(token) for token in as_list(special.get("additional_special_tokens"))]
    if more and (not draft.get("adapter") or draft.get("lora_modules_to_save")):
        draft.put("model.add_special_tokens", more, "special_tokens")
    elif more:
        draft.say(NONE, "special_tokens.additional_special_tokens", UNTRAINED)
    done = {"eos_token": end, "additional_special_tokens": more}
    left = ", ".join(str(name) for name in special if not done.get(str(name)))
    said = [f"training.eos_token: {end}"] if end else []
    said += [f"model.add_special_tokens: {', '.join(more)}"] if "add_special_tokens" in draft.recipe["model"] else []
    said += [f"{left}: as the tokenizer has it"] if left else []
    draft.note(
        CONVERTED if end or "add_special_tokens" in draft.recipe["model"] else NONE,
        "; ".join(said) or "none",
        "special_tokens",
    )


def _put_adapter(draft: Draft) -> None:
    method = draft.get("adapter")
    bits = 8 if true(draft.get("load_in_8bit")) else 4 if true(draft.get("load_in_4bit")) or method == "qlora" else 0
    if method not in (None, "lora", "qlora"):
        raise draft.refuse(f"adapter: {method} is not converted: see recipe-run explain method")
    keys = ("load_in_8bit", "load_in_4bit", "bnb_config_kwargs")
    if method and bits:
        more = {
            key: value for key, value in draft.mapping("bnb_config_kwargs").items() if str(key).startswith("bnb_4bit")
        }
        common.convert_bits(draft, bits, True, *keys, more=more)
    draft.note(
        IGNORED if bits else SAME, "without an adapter weights are trained as they are" if bits else "16 bits", *keys
    )
    _put_unfreeze(draft)
    if not method:
        for key in draft.values:
            if key.startswith(("lora_", "peft_")) and draft.get(key) is not None and key != "lora_model_dir":
                draft.note(IGNORED, "adapter is empty: all weights are trained", key)
        draft.note(SAME, "all weights are trained", "adapter")
        return
    draft.convert("peft.method", "lora", "adapter")
    targets = draft.get("lora_target_modules")
    if true(draft.get("lora_target_linear")):
        draft.convert("peft.target_modules", "all-linear", "lora_target_linear")
        told = "all linear layers have adapters; of others (embed_tokens) name all modules in peft.target_modules"
        draft.note(SAME if targets is None else NONE, told, "lora_target_modules")
    elif targets is not None:
        found = "all-linear" if targets in ("all-linear", ["all-linear"]) else targets
        draft.convert("peft.target_modules", found, "lora_target_modules")
    draft.note(SAME, "off", "lora_target_linear", "lora_target_modules")


def _put_unfreeze(draft: Draft) -> None:
    """Patterns that must match from the begin of a name on, where ours are looked for anywhere."""
    patterns = [str(pattern) for pattern in as_list(draft.get("unfrozen_parameters"))]
    if any(re.search(r"\[\d*(:\d*)?\]$", pattern) for pattern in patterns):
        told = "a part of the rows of a matrix can't be trained alone: leave [...] out, and write unfreeze"
        draft.note(NONE, told, "unfrozen_parameters")
    elif patterns:
        begun = [pattern if pattern.startswith("^") else f"^{pattern}" for pattern in patterns]
        draft.convert("unfreeze", begun, "unfrozen_parameters")


def _put_training(draft: Draft) -> None:
    for step in (_put_packing, _put_schedule, _put_precision, _put_checkpointing):
        step(draft)
    common.convert_batches(draft)
    if draft.recipe["dataset"].get("eval"):
        size = draft.number("eval_batch_size") or draft.number("micro_batch_size") or 1
        draft.convert("training.per_device_eval_batch_size", size, "eval_batch_size")
        draft.origins.setdefault("training.per_device_eval_batch_size", "axolotl's default: micro_batch_size")
    draft.note(IGNORED, "nothing is evaluated", "eval_batch_size")
    _put_simple(draft)


def _put_packing(draft: Draft) -> None:
    """Rows of a batch: packed, cut, dropped, sorted by length."""
    packs = true(draft.get("sample_packing"))
    pieces = draft.recipe["stage"] == PRETRAIN and not draft.get("pretraining_dataset")
    if draft.recipe["stage"] in (SFT, PRETRAIN):
        told = "long texts are cut into pieces, as there, and pieces are packed" * (pieces and not packs)
        draft.convert("training.packing", packs or pieces, "sample_packing", note=told)
        draft.origins.setdefault("training.packing", told or "axolotl's default")
        if pieces:
            draft.put("training.packing_strategy", "bfd_split", "long texts are cut into pieces")
        if draft.get("eval_sample_packing") is not None and draft.recipe["dataset"].get("eval"):
            draft.convert("training.eval_packing", true(draft.get("eval_sample_packing")), "eval_sample_packing")
    draft.note(IGNORED, "of training, and with held-out rows, only", "eval_sample_packing")
    draft.note(IGNORED, "rows of this stage are not packed", "sample_packing")
    strategy = draft.get("excess_length_strategy") or "drop"
    whole = draft.recipe["dataset"]["format"] == "text"
    if not whole:
        ours = {"drop": "drop", "truncate": "truncate", "raise": "error"}.get(str(strategy), "drop")
        draft.convert("dataset.on_overlong", ours, "excess_length_strategy")
        draft.origins.setdefault("dataset.on_overlong", "axolotl's default")
    draft.note(SAME, "texts are cut into pieces of max_length", "excess_length_strategy")
    if true(draft.get("group_by_length")) and not packs:
        draft.convert("training.train_sampling_strategy", "group_by_length", "group_by_length")
    draft.note(SAME if not packs else IGNORED, "packed rows are all as long" if packs else "off", "group_by_length")


def _put_schedule(draft: Draft) -> None:
    common.convert_optimizer(draft, "optimizer", "adamw_torch_fused")
    schedule = str(draft.get("lr_scheduler") or "cosine")
    if draft.get("cosine_min_lr_ratio") is not None and schedule == "cosine":
        draft.convert("training.lr_scheduler_type", "cosine_with_min_lr", "lr_scheduler")
        ratio = {"min_lr_rate": draft.number("cosine_min_lr_ratio")}
        draft.convert("training.lr_scheduler_kwargs", ratio, "cosine_min_lr_ratio")
    elif schedule in ("one_cycle", "rex", "log_sweep"):
        draft.convert("training.lr_scheduler_type", "cosine", "lr_scheduler", note=f"transformers has no {schedule}")
    else:
        draft.convert("training.lr_scheduler_type", schedule, "lr_scheduler")
        draft.origins.setdefault("training.lr_scheduler_type", "axolotl's default")
    draft.note(IGNORED, "read with the schedule cosine only", "cosine_min_lr_ratio")
    _put_warm_up(draft)


def _put_precision(draft: Draft) -> None:
    """Axolotl loads weights in bfloat16 unless it is told otherwise."""
    said = str(draft.values.get("bf16", "auto")).lower()
    half = said in ("auto", "true", "full", "none")
    if half and (said != "none" or not true(draft.get("fp16"))):
        draft.convert(
            "model.dtype", "bfloat16", "bf16", note="as weights are loaded there, also those that are trained"
        )
        draft.origins.setdefault("model.dtype", "axolotl's default: bf16: auto")
    elif true(draft.get("fp16")) and draft.recipe.get("peft"):
        draft.put("model.dtype", "float16", "fp16")
    common.convert_precision(draft)
    common.convert_tf32(draft)


def _put_checkpointing(draft: Draft) -> None:
    said = draft.get("gradient_checkpointing")
    common.convert_checkpointing(draft, said not in (None, False, "false"), "gradient_checkpointing")
    offloads = said in ("offload", "offload_disk") or draft.get("activation_offloading")
    if offloads and draft.recipe["stage"] in (SFT, PRETRAIN, DPO):
        draft.convert("training.activation_offloading", True, "activation_offloading")
    told = "use_reentrant: false, as TRL has it: true loses gradients beside an adapter"
    draft.note(SAME, told, "gradient_checkpointing_kwargs")
    draft.note(SAME, "off", "activation_offloading")


def _put_warm_up(draft: Draft) -> None:
    """Axolotl counts steps itself: a share is rounded down, 3 % are 100 steps at most, and one step becomes two."""
    ratio, steps = draft.number("warmup_ratio"), draft.number("max_steps")
    if draft.number("warmup_steps") is None and isinstance(steps, int) and steps > 0:
        count = min(int(0.03 * steps), 100) if ratio is None else int(ratio * steps)
        key = "axolotl's default" if ratio is None else "warmup_ratio"
        draft.put("training.warmup_steps", 2 if count == 1 else count, key)
        draft.note(CONVERTED, f"training.warmup_steps: {2 if count == 1 else count}, of {steps} steps", "warmup_ratio")
        return
    if draft.number("warmup_steps") == 1:
        draft.convert("training.warmup_steps", 2, "warmup_steps", note="as axolotl makes two of one")
        return
    common.convert_warm_up(draft, 0.03)
    told = "there rounded down, here up" + "; 100 steps at most there" * (ratio is None)
    if 0 < draft.recipe["training"]["warmup_steps"] < 1:
        draft.origins["training.warmup_steps"] += f"; {told}"


def _put_simple(draft: Draft) -> None:
    """The plugins, and trackers."""
    known = ("liger", "cut_cross_entropy", "kernels", "spectrum")
    told = "kernels for the same result: TRL makes the loss without all logits at once"
    names = [str(name) for name in as_list(draft.get("plugins"))]
    other = [name for name in names if not any(part in name for part in known)]
    draft.note(NONE, f"{', '.join(other)}: no plugins here" if other else told, "plugins")
    if draft.get("wandb_project") or true(draft.get("use_wandb")):
        draft.put("training.report_to", ["wandb"], "wandb_project")
        draft.note(CONVERTED, "training.report_to: [wandb]; set WANDB_PROJECT", "wandb_project", "use_wandb")
    elif true(draft.get("use_tensorboard")):
        draft.convert("training.report_to", ["tensorboard"], "use_tensorboard")
    draft.note(SAME, "off", "wandb_project", "use_wandb", "use_tensorboard", "plugins")


def _put_saving(draft: Draft) -> None:
    epochs = float(draft.number("num_epochs") or 1)
    each = draft.number("saves_per_epoch")
    strategy = draft.get("save_strategy")
    if strategy == "no":
        draft.note(IGNORED, "nothing is saved before the end", "save_total_limit")
    elif most := draft.number("save_total_limit"):
        draft.convert("training.save_total_limit", most, "save_total_limit")
    else:
        draft.put("training.save_total_limit", 4, "axolotl's default")
    if strategy in ("no", "epoch"):
        draft.convert("training.save_strategy", strategy, "save_strategy")
    elif each:
        if each * epochs <= 1:
            draft.convert("training.save_strategy", "epoch", "saves_per_epoch", note="at the end of each")
        else:
            share = round(1 / (each * epochs), 6)
            draft.convert("training.save_steps", share, "saves_per_epoch", note="a share of all steps")
    elif draft.get("save_steps"):
        draft.convert("training.save_steps", draft.number("save_steps"), "save_steps")
    else:
        draft.put("training.save_strategy", "epoch", "axolotl's default")
    draft.note(IGNORED, "another key says when is saved", "save_steps", "saves_per_epoch", "save_strategy")
    each, steps = draft.number("evals_per_epoch"), draft.number("eval_steps")
    strategy = draft.get("eval_strategy") or draft.get("evaluation_strategy")
    keys = ("evals_per_epoch", "eval_steps", "eval_strategy", "evaluation_strategy")
    if each and not strategy and each * epochs > 1:
        strategy, steps = "steps", round(1 / (each * epochs), 6)
    elif not steps and not strategy and draft.recipe["dataset"].get("eval"):
        draft.put("training.eval_strategy", "epoch", "at each epoch; there nothing is evaluated without eval_steps")
        draft.note(IGNORED, "once in all epochs is never; here each epoch is evaluated", "evals_per_epoch")
    strategy = strategy or ("steps" if steps else "epoch")
    common.evaluate_as_said(draft, strategy, steps, *keys)
    if (patience := draft.number("early_stopping_patience")) and draft.recipe["dataset"].get("eval"):
        draft.convert("run.early_stopping", {"patience": int(patience)}, "early_stopping_patience")
        best = true(draft.get("load_best_model_at_end"))
        draft.convert("training.load_best_model_at_end", best, "load_best_model_at_end")
    draft.note(SAME, "off, or nothing is evaluated", "early_stopping_patience")
