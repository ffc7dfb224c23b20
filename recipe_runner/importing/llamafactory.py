"""From LLaMA-Factory's configuration to a recipe."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe_runner.importing import common
from recipe_runner.importing.draft import CONVERTED, IGNORED, NONE, SAME, Draft, as_list, number, show, true
from recipe_runner.importing.sharding import convert_sharding
from recipe_runner.problems.words import suggest
from recipe_runner.stages import DPO, FORMATS, KTO, PRETRAIN, REWARD, SFT

INFO = "dataset_info.json"
DEFAULTS = {"prompt": "instruction", "query": "input", "response": "output"}  # columns that a dataset need not name
# Roles of columns: LLaMA-Factory's name -> ours, by layout.
ALPACA = {
    "instruction": {"prompt": "instruction", "query": "input", "response": "output"},
    "preference": {"prompt": "prompt", "query": "input"},
    "unpaired_preference": {"prompt": "prompt", "query": "input", "response": "completion"},
}
CONTEXT = ("system", "history", "tools", "images")
# Keys and roles of turns: LLaMA-Factory's name of them -> how they may be called.
TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "tool_call"),
    "system_tag": ("system",),
}
LOSSES = ("sigmoid", "hinge", "ipo")
OFT = {"oft_block_size": "oft_block_size", "oft_rank": "r"}


def convert(draft: Draft) -> None:
    """Fills the draft's recipe with what its file says."""
    stage = str(draft.get("stage") or SFT)
    if draft.get("export_dir"):
        raise draft.refuse("it merges an adapter, and trains nothing", "recipe-run merge RUN")
    if not true(draft.get("do_train")):
        told = "recipe-run generate, evaluate, or serve with another program: see docs/after-training.md"
        raise draft.refuse("it trains nothing (do_train is not there, or false)", told)
    if stage not in draft.tool.stages:
        why = draft.tool.no_stages.get(stage, "it is not known here")
        raise draft.refuse(f"stage: {stage} can't be converted: {why}")
    if draft.get("pref_loss") in ("orpo", "simpo") and draft.tool.stages[stage] == DPO:
        raise draft.refuse(f"pref_loss: {draft.get('pref_loss')} can't be converted: TRL 1 has no such stage")
    draft.recipe = {"stage": draft.tool.stages[stage]}
    draft.note(CONVERTED, f"stage: {draft.tool.stages[stage]}", "stage")
    for step in (_put_model, _put_adapter, _put_data, _put_training):
        step(draft)
    convert_sharding(draft)


def _put_model(draft: Draft) -> None:
    common.convert_model(draft, "model_name_or_path", "model_revision")
    common.convert_attention(draft, draft.get("flash_attn"), "flash_attn")
    for key in ("add_tokens", "add_special_tokens"):
        if tokens := draft.names(key):
            draft.convert(f"model.{key}", tokens, key)
    bits, keys = draft.number("quantization_bit"), ("quantization_bit", "quantization_type", "double_quantization")
    method = draft.get("quantization_method") or "bnb"
    if bits and method not in ("bnb", "bitsandbytes"):
        raise draft.refuse(f"quantization_method: {method} is not converted", "bitsandbytes alone trains here: bnb")
    if bits in (4, 8):
        double = draft.get("double_quantization") is not False
        kind = draft.get("quantization_type")
        common.convert_bits(draft, bits, double, *keys, "quantization_method", kind=kind)
    elif bits:
        raise draft.refuse(f"quantization_bit: {bits}: bitsandbytes has 4 and 8 bits")


def _put_adapter(draft: Draft) -> None:
    kind = draft.get("finetuning_type") or "lora"
    if kind == "full":
        draft.note(CONVERTED, "no section peft: all weights are trained", "finetuning_type")
        _ignore_others(draft, "lora_", "oft_", "pissa_", "freeze_trainable", "freeze_extra")
    elif kind == "freeze":
        _ignore_others(draft, "lora_", "oft_", "pissa_")
        layers = int(draft.number("freeze_trainable_layers") or 2)
        patterns = [f"layers[{-layers}:]" if layers > 0 else f"layers[:{-layers}]"]
        patterns += draft.names("freeze_extra_modules")
        keys = ("freeze_trainable_layers", "freeze_extra_modules", "finetuning_type")
        draft.convert("unfreeze", patterns, *keys)
        if str(draft.get("freeze_trainable_modules") or "all") != "all":
            draft.note(NONE, "whole layers are trained: see unfreeze for patterns of names", "freeze_trainable_modules")
        draft.note(SAME, "whole layers are trained", "freeze_trainable_modules")
    elif kind == "oft":
        _ignore_others(draft, "lora_", "freeze_trainable", "freeze_extra", "pissa_")
        draft.convert("peft.method", "oft", "finetuning_type")
        for theirs, ours in OFT.items():
            if draft.get(theirs):
                draft.convert(f"peft.{ours}", draft.get(theirs), theirs)
        if not draft.get("oft_rank") and not draft.get("oft_block_size"):
            draft.put("peft.oft_block_size", 32, "llamafactory's default")
        _put_targets(draft, "oft_target")
    elif kind == "lora":
        _ignore_others(draft, "oft_", "freeze_trainable", "freeze_extra")
        draft.convert("peft.method", "lora", "finetuning_type")
        rank = int(draft.number("lora_rank") or 8)
        draft.convert("peft.r", rank, "lora_rank")
        draft.convert("peft.lora_alpha", draft.number("lora_alpha") or 2 * rank, "lora_alpha")
        draft.convert("peft.lora_dropout", draft.number("lora_dropout") or 0.0, "lora_dropout")
        for path in ("peft.r", "peft.lora_alpha", "peft.lora_dropout"):
            draft.origins.setdefault(path, "llamafactory's default")
        _put_targets(draft, "lora_target")
        for key in ("use_rslora", "use_dora"):
            if true(draft.get(key)):
                draft.convert(f"peft.{key}", True, key)
        if true(draft.get("pissa_init")):
            turns = draft.number("pissa_iter")
            name = "pissa" if turns == -1 else f"pissa_niter_{turns or 16}"
            draft.convert("peft.init_lora_weights", name, "pissa_init", "pissa_iter")
    else:
        raise draft.refuse(f"finetuning_type: {kind} is not known here")
    if names := draft.names("additional_target"):
        draft.convert("peft.modules_to_save", names, "additional_target")


def _ignore_others(draft: Draft, *begins: str) -> None:
    """Keys of other ways of tuning than the file's."""
    kind = draft.get("finetuning_type") or "lora"
    for key in [key for key in draft.values if key.startswith(begins)]:
        draft.note(IGNORED, f"finetuning_type: {kind} does not read it", key)


def _put_targets(draft: Draft, key: str) -> None:
    names = draft.names(key) or ["all"]
    draft.convert("peft.target_modules", "all-linear" if "all" in names else names, key)
    draft.origins.setdefault("peft.target_modules", "llamafactory's default")


def _put_data(draft: Draft) -> None:
    names = draft.names("dataset")
    if not names:
        raise draft.refuse("it names no dataset")
    if len(draft.names("adapter_name_or_path")) > 1:
        raise draft.refuse("adapter_name_or_path names several adapters", "merge all but the last: recipe-run merge")
    info, folder = _find_info(draft)
    made = [_read_entry(draft, name, info, folder) for name in names]
    held = [_read_entry(draft, name, info, folder) for name in draft.names("eval_dataset")]
    form = _find_format(draft, [*made, *held])
    most = draft.number("max_samples")
    for section in [*made, *held]:
        if most:
            section["source"]["limit"] = min(int(most), section["source"].get("limit", int(most)))
    sources = [section["source"] for section in made]
    draft.recipe["dataset"] = {"format": form, "train": common.one_or_all(sources)}
    if any(source["columns"].get("input") for source in sources):
        draft.put("dataset.input_separator", "\n", "llamafactory's own")
    draft.note(CONVERTED, f"dataset: format {form}, {len(sources)} source(s), by {INFO}", "dataset", "dataset_dir")
    draft.note(CONVERTED, f"limit: {most}, of each source, drawn by the seed", "max_samples")
    if any(section["images"] for section in made):
        draft.put("dataset.images", "marked", "dataset")
        where = str(draft.get("media_dir") or folder)
        draft.put("dataset.image_folder", draft.place(where), "media_dir" if draft.get("media_dir") else "dataset_dir")
    if held:
        draft.convert("dataset.eval", common.one_or_all([section["source"] for section in held]), "eval_dataset")
    else:
        common.hold_out(draft, "val_size")
    if draft.recipe["stage"] == SFT:
        last, all_of_it = true(draft.get("mask_history")), true(draft.get("train_on_prompt"))
        chosen = "all" if all_of_it else "last" if last else "assistant"
        draft.convert("dataset.train_on", chosen, "train_on_prompt", "mask_history")
        draft.origins.setdefault("dataset.train_on", "llamafactory's default")
    _put_template(draft)
    probabilities = [number(part) for part in draft.names("interleave_probs")]
    mixes = str(draft.get("mix_strategy") or "concat").startswith("interleave")
    if mixes and len(probabilities) == len(made) > 1 and all(isinstance(part, int | float) for part in probabilities):
        for section, share in zip(made, probabilities, strict=True):
            section["source"]["weight"] = share
        note = "" if draft.get("mix_strategy") == "interleave_over" else ", rows are drawn until all were seen"
        draft.note(CONVERTED, f"dataset.train.weight{note}", "interleave_probs", "mix_strategy")
    draft.note(IGNORED if not mixes else NONE, "datasets are joined, not interleaved", "interleave_probs")


def _find_format(draft: Draft, made: list[dict[str, Any]]) -> str:
    """The layout of all datasets; of instructions beside conversations, each of those says its own.

    Raises:
        UserError: They have others that are not mixed.
    """
    forms = sorted({section["format"] for section in made})
    if forms == ["chat", "instruction"] and not any(section["images"] for section in made):
        for section in made:
            section["source"] |= {"format": "instruction"} if section["format"] == "instruction" else {}
        return "chat"
    if len(forms) > 1:
        message = f"its datasets have rows of several layouts ({', '.join(forms)})"
        raise draft.refuse(message, "make turns of all (format chat)")
    return str(forms[0])


def _put_template(draft: Draft) -> None:
    """LLaMA-Factory's own text of the turns, as a chat template beside the recipe."""
    stage, name = draft.recipe["stage"], str(draft.get("template"))
    parts = draft.tool.templates.get(name)
    sources = as_list(draft.recipe["dataset"]["train"])
    tools = any(source["columns"].get("tools") for source in sources)  # which code writes there
    if stage == PRETRAIN:
        draft.note(IGNORED, "texts are not written by a chat template", "template")
    elif isinstance(parts, Mapping) and stage == SFT and not draft.recipe["dataset"].get("images") and not tools:
        draft.template = common.write_template(parts)
        draft.put("training.chat_template_path", "NAME.jinja", "template")
        told = f"NAME.jinja, beside the recipe: {name}, as LLaMA-Factory writes it"
        told += (
            "; it ends the last answer alone: of several turns set dataset.train_on: last" if "last" in parts else ""
        )
        draft.note(CONVERTED, told, "template")
    told = "the model's own chat template is used: compare rows by recipe-run preview"
    draft.note(NONE, told, "template")


def _find_info(draft: Draft) -> tuple[dict[str, Any], Path]:
    """The file that says what datasets are, and its folder: beside the configuration, or above it."""
    name = str(draft.get("dataset_dir") or "data")
    places = [draft.file.parent, Path.cwd(), *draft.file.resolve().parents]
    for place in places:
        for folder in (place / name, place):
            if (folder / INFO).is_file():
                try:
                    found = json.loads((folder / INFO).read_text(encoding="utf-8"))
                except ValueError as error:
                    raise draft.refuse(f"{folder / INFO} is no JSON: {error}") from error
                return (found if isinstance(found, dict) else {}), folder
    raise draft.refuse(
        f"{INFO} is not there, which says what '{draft.get('dataset')}' is", f"put it beside the file, or into {name}/"
    )


def _read_source(draft: Draft, name: str, entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Where the rows of a dataset are, and how many of them are taken."""
    if entry.get("file_name"):
        file = folder / str(entry["file_name"])
        source: dict[str, Any] = {"source": draft.place(str(file)) + "/" * file.is_dir()}
    elif entry.get("hf_hub_url"):
        source = {"source": str(entry["hf_hub_url"])}
    else:
        raise draft.refuse(
            f"the dataset {name} is on no hub that is read from, nor a file", "copy it, and name the file"
        )
    if entry.get("folder"):
        raise draft.refuse(f"the dataset {name} is a folder of a hub dataset", "copy it, and name its files")
    source |= {key: str(entry[key]) for key in ("subset", "split") if entry.get(key)}
    if isinstance(entry.get("num_samples"), int):
        source["limit"] = entry["num_samples"]
    return source


def _read_entry(draft: Draft, name: str, info: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Format and source of a dataset that LLaMA-Factory's file describes."""
    entry = info.get(name)
    if not isinstance(entry, dict):
        raise draft.refuse(f"{folder / INFO} has no dataset '{name}'", suggest(name, list(info)))
    source = _read_source(draft, name, entry, folder)
    form = entry.get("formatting", "alpaca")
    if form not in ("alpaca", "sharegpt", "openai"):
        raise draft.refuse(f"the dataset {name} has the formatting {show(form)}, which is not known here")
    if form == "sharegpt":
        _check_tags(draft, name, entry.get("tags"))
    said, stage = entry.get("columns"), draft.recipe["stage"]
    if said is not None and not isinstance(said, dict):
        raise draft.refuse(f"the dataset {name}: columns is {show(said)}, no mapping")
    said = DEFAULTS if said is None else {theirs: column for theirs, column in said.items() if column}
    if any(said.get(kind) for kind in ("videos", "audios")):
        raise draft.refuse(f"the dataset {name} has videos or sounds, which are not trained on")
    turns = form != "alpaca"
    if stage == PRETRAIN:
        return {"format": "text", "source": source | {"columns": {"text": said.get("prompt", "text")}}, "images": False}
    layout, columns = "chat" if turns else "instruction", dict[str, Any]()
    if entry.get("ranking") and stage not in (DPO, REWARD, KTO):
        raise draft.refuse(f"the dataset {name} has pairs (ranking), and stage {stage} learns one answer a row")
    if entry.get("ranking") or stage in (DPO, REWARD):
        layout = "preference"
        columns = {role: said.get(role, role) for role in ("chosen", "rejected")}
    elif stage == KTO:
        layout, columns = "unpaired_preference", {"label": said.get("kto_tag", "label")}
    if turns:
        role = {"preference": "prompt", "unpaired_preference": "completion"}.get(layout, "messages")
        columns[role] = said.get("messages", "messages" if form == "openai" else "conversations")
    else:
        columns |= {ours: said[theirs] for theirs, ours in ALPACA[layout].items() if theirs in said}
    # a column that it does not name is not read there, whatever it is called
    columns |= {role: said.get(role) for role in FORMATS[layout].roles if role in CONTEXT and role not in columns}
    if layout != "chat" and not turns:
        columns.setdefault("input", None)
    if "images" not in said:
        columns.pop("images", None)
    return {"format": layout, "source": source | {"columns": columns}, "images": "images" in said}


def _check_tags(draft: Draft, name: str, tags: Any) -> None:
    """The names of keys and roles in turns, which are found by themselves where they are the usual ones.

    Raises:
        UserError: They are others.
    """
    for tag, value in tags.items() if isinstance(tags, dict) else ():
        if tag in TAGS and value not in TAGS[tag]:
            message = f"the dataset {name}: {tag} is {show(value)}, which turns are not read by here"
            raise draft.refuse(message, f"rename it in the rows: {' or '.join(TAGS[tag])}")


def _put_training(draft: Draft) -> None:
    stage = draft.recipe["stage"]
    if stage in (SFT, PRETRAIN):
        packs = draft.get("packing") if draft.get("packing") is not None else stage == PRETRAIN
        packs = true(packs) or true(draft.get("neat_packing"))
        sees = packs and stage == SFT and not true(draft.get("neat_packing"))
        note = "rows of a pack do not see each other" if sees else ""
        draft.convert("training.packing", packs, "packing", "neat_packing", note=note)
        if packs and stage == PRETRAIN:  # texts after each other, cut at cutoff_len
            draft.put("training.packing_strategy", "wrapped", "packing")
        draft.origins.setdefault("training.packing", "llamafactory's default")
    draft.note(IGNORED, "rows of this stage are not packed", "packing", "neat_packing")
    if stage in (DPO, KTO):
        draft.convert("training.beta", draft.number("pref_beta") or 0.1, "pref_beta")
        loss = str(draft.get("pref_loss") or "sigmoid")
        if stage == DPO and loss in LOSSES:
            draft.convert("training.loss_type", [loss], "pref_loss")
        elif stage == DPO:
            told = f"TRL 1 has no {loss} in DPO: sigmoid is written; stage kto takes the answers of pairs one by one"
            draft.note(NONE, told, "pref_loss")
        draft.note(IGNORED, "of DPO only", "pref_loss")
        if draft.number("pref_ftx"):
            draft.note(NONE, "see training.loss_type: [sigmoid, sft], with training.loss_weights", "pref_ftx")
    draft.note(IGNORED, "of preferences only", "pref_beta", "pref_loss", "pref_ftx", "dpo_label_smoothing")
    length = "training.max_length: {}; longer rows are cut at their end, or dropped: there the question is cut first"
    draft.put("training.max_length", draft.number("cutoff_len") or 2048, "cutoff_len")
    draft.origins["training.max_length"] = "cutoff_len" if "cutoff_len" in draft.values else "llamafactory's default"
    draft.note(CONVERTED, length.format(draft.recipe["training"]["max_length"]), "cutoff_len")
    if true(draft.get("use_dft_loss")) and stage == SFT:
        draft.convert("training.loss_type", "dft", "use_dft_loss")
    common.convert_batches(draft)
    common.convert_warm_up(draft)
    common.convert_precision(draft)
    if draft.recipe.get("peft") and draft.recipe["training"].get("bf16"):
        draft.put("model.dtype", "bfloat16", "bf16")  # as its base is loaded; what is trained is in float32
    common.convert_tf32(draft)
    common.convert_optimizer(draft, "optim", "adamw_torch_fused")
    common.convert_report_to(draft)
    off = true(draft.get("disable_gradient_checkpointing"))
    common.convert_checkpointing(draft, not off, "disable_gradient_checkpointing", "gradient_checkpointing")
    strategy, steps = draft.get("eval_strategy"), draft.number("eval_steps")
    common.evaluate_as_said(
        draft, strategy or ("steps" if steps else "epoch"), steps, "eval_strategy", "eval_steps", "do_eval"
    )
    patience = draft.number("early_stopping_steps")
    if patience and draft.recipe["dataset"].get("eval"):
        draft.convert("run.early_stopping", {"patience": int(patience)}, "early_stopping_steps")
    draft.note(IGNORED, "nothing is evaluated", "early_stopping_steps")
