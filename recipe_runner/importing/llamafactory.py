"""From LLaMA-Factory's configuration to a recipe."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe_runner.importing import common
from recipe_runner.importing.draft import CONVERTED, IGNORED, NONE, Draft, true
from recipe_runner.problems.words import suggest
from recipe_runner.stages import DPO, KTO, PRETRAIN, REWARD, SFT

INFO = "dataset_info.json"
# Roles of columns: LLaMA-Factory's name -> ours, by layout.
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
SHAREGPT = {"messages": "messages", "system": "system", "tools": "tools", "images": "images"}
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
    if draft.get("pref_loss") in ("orpo", "simpo"):
        raise draft.refuse(f"pref_loss: {draft.get('pref_loss')} can't be converted: TRL 1 has no such stage")
    draft.recipe = {"stage": draft.tool.stages[stage]}
    draft.note(CONVERTED, f"stage: {draft.tool.stages[stage]}", "stage")
    for step in (_put_model, _put_adapter, _put_data, _put_training):
        step(draft)
    common.convert_sharding(draft)


def _put_model(draft: Draft) -> None:
    common.convert_model(draft, "model_name_or_path", "model_revision")
    common.convert_attention(draft, draft.get("flash_attn"), "flash_attn")
    for key in ("add_tokens", "add_special_tokens"):
        if tokens := draft.names(key):
            draft.convert(f"model.{key}", tokens, key)
    bits, keys = draft.get("quantization_bit"), ("quantization_bit", "quantization_type", "double_quantization")
    method = draft.get("quantization_method") or "bnb"
    if bits and method not in ("bnb", "bitsandbytes"):
        raise draft.refuse(f"quantization_method: {method} is not converted", "bitsandbytes alone trains here: bnb")
    if bits == 8:
        draft.convert("quantization", {"load_in_8bit": True}, *keys, "quantization_method")
    elif bits == 4:
        made = {"load_in_4bit": True, "bnb_4bit_quant_type": draft.get("quantization_type") or "nf4"}
        made["bnb_4bit_use_double_quant"] = draft.get("double_quantization") is not False
        draft.convert(
            "quantization",
            {**made, "bnb_4bit_compute_dtype": common.compute_dtype(draft)},
            *keys,
            "quantization_method",
        )
    elif bits:
        raise draft.refuse(f"quantization_bit: {bits}: bitsandbytes has 4 and 8 bits")


def _put_adapter(draft: Draft) -> None:
    kind = draft.get("finetuning_type") or "lora"
    if kind == "full":
        draft.note(CONVERTED, "no section peft: all weights are trained", "finetuning_type")
        for key in draft.values:
            if key.startswith(("lora_", "oft_", "freeze_trainable", "freeze_extra")):
                draft.note(IGNORED, "all weights are trained", key)
    elif kind == "freeze":
        layers = int(draft.number("freeze_trainable_layers") or 2)
        patterns = [f"layers[{-layers}:]" if layers > 0 else f"layers[:{-layers}]"]
        patterns += draft.names("freeze_extra_modules")
        keys = ("freeze_trainable_layers", "freeze_extra_modules", "finetuning_type")
        draft.convert("unfreeze", patterns, *keys)
        if str(draft.get("freeze_trainable_modules") or "all") != "all":
            draft.note(NONE, "whole layers are trained: see unfreeze for patterns of names", "freeze_trainable_modules")
    elif kind == "oft":
        draft.convert("peft.method", "oft", "finetuning_type")
        for theirs, ours in OFT.items():
            if draft.get(theirs):
                draft.convert(f"peft.{ours}", draft.get(theirs), theirs)
        if not draft.get("oft_rank") and not draft.get("oft_block_size"):
            draft.put("peft.oft_block_size", 32, "llamafactory's default")
        _put_targets(draft, "oft_target")
    elif kind == "lora":
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
            turns = draft.get("pissa_iter")
            name = "pissa" if turns == -1 else f"pissa_niter_{turns or 16}"
            draft.convert("peft.init_lora_weights", name, "pissa_init", "pissa_iter")
    else:
        raise draft.refuse(f"finetuning_type: {kind} is not known here")
    if names := draft.names("additional_target"):
        draft.convert("peft.modules_to_save", names, "additional_target")


def _put_targets(draft: Draft, key: str) -> None:
    names = draft.names(key) or ["all"]
    draft.convert("peft.target_modules", "all-linear" if "all" in names else names, key)
    draft.origins.setdefault("peft.target_modules", "llamafactory's default")


def _put_data(draft: Draft) -> None:
    names = draft.names("dataset")
    if not names:
        raise draft.refuse("it names no dataset")
    info, folder = _find_info(draft)
    made = [_read_entry(draft, name, info, folder) for name in names]
    forms = {section["format"] for section in made}
    if len(forms) > 1:
        raise draft.refuse(
            f"its datasets have rows of several layouts ({', '.join(sorted(forms))})", "make turns of all (format chat)"
        )
    most = draft.number("max_samples")
    for section in made:
        if most:
            section["source"]["limit"] = int(most)
    sources = [section["source"] for section in made]
    draft.recipe["dataset"] = {"format": made[0]["format"], "train": common.one_or_all(sources)}
    draft.note(
        CONVERTED, f"dataset: format {made[0]['format']}, {len(sources)} source(s), by {INFO}", "dataset", "dataset_dir"
    )
    draft.note(CONVERTED, f"limit: {most}, of each source, drawn by the seed", "max_samples")
    if any(section["images"] for section in made):
        draft.put("dataset.images", "marked", "dataset")
        if not draft.get("media_dir"):
            draft.put("dataset.image_folder", str(folder), "dataset_dir")
    if names := draft.names("eval_dataset"):
        sources = [_read_entry(draft, name, info, folder)["source"] for name in names]
        draft.convert("dataset.eval", common.one_or_all(sources), "eval_dataset")
    else:
        common.hold_out(draft, "val_size")
    if draft.recipe["stage"] == SFT:
        last, all_of_it = true(draft.get("mask_history")), true(draft.get("train_on_prompt"))
        chosen = "all" if all_of_it else "last" if last or made[0]["format"] == "instruction" else "assistant"
        draft.convert("dataset.train_on", chosen, "train_on_prompt", "mask_history")
        draft.origins.setdefault("dataset.train_on", "llamafactory's default")
    _put_template(draft)
    draft.note(NONE, "name weights: dataset.train: [{source: ..., weight: 1}]", "mix_strategy", "interleave_probs")


def _put_template(draft: Draft) -> None:
    """LLaMA-Factory's own text of the turns, as a chat template beside the recipe."""
    stage, name = draft.recipe["stage"], str(draft.get("template"))
    parts = draft.tool.templates.get(name)
    if stage == PRETRAIN:
        draft.note(IGNORED, "texts are not written by a chat template", "template")
    elif isinstance(parts, Mapping) and stage == SFT and not draft.recipe["dataset"].get("images"):
        draft.template = common.write_template(parts)
        draft.put("training.chat_template_path", "NAME.jinja", "template")
        draft.note(CONVERTED, f"NAME.jinja, beside the recipe: {name}, as LLaMA-Factory writes it", "template")
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


def _read_entry(draft: Draft, name: str, info: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Format and source of a dataset that LLaMA-Factory's file describes."""
    entry = info.get(name)
    if not isinstance(entry, dict):
        raise draft.refuse(f"{folder / INFO} has no dataset '{name}'", suggest(name, list(info)))
    if entry.get("file_name"):
        source: dict[str, Any] = {"source": str(folder / str(entry["file_name"]))}
    elif entry.get("hf_hub_url"):
        source = {"source": str(entry["hf_hub_url"])}
    else:
        raise draft.refuse(
            f"the dataset {name} is on no hub that is read from, nor a file", "copy it, and name the file"
        )
    source |= {key: str(entry[key]) for key in ("subset", "split") if entry.get(key)}
    said, stage = dict(entry.get("columns") or {}), draft.recipe["stage"]
    turns = entry.get("formatting") == "sharegpt"
    if any(said.get(kind) for kind in ("videos", "audios")):
        raise draft.refuse(f"the dataset {name} has videos or sounds, which are not trained on")
    if stage == PRETRAIN:
        return {"format": "text", "source": source | {"columns": {"text": said.get("prompt", "text")}}, "images": False}
    if entry.get("ranking") or stage in (DPO, REWARD):
        prompt = said.get("messages" if turns else "prompt", "conversations" if turns else "instruction")
        columns = {"prompt": prompt} | {role: said.get(role, role) for role in ("chosen", "rejected")}
        return {"format": "preference", "source": source | {"columns": columns}, "images": "images" in said}
    if stage == KTO:
        columns = {"label": said.get("kto_tag", "label")}
        if turns:
            columns["completion"] = said.get("messages", "conversations")
        else:
            columns |= {"prompt": said.get("prompt", "instruction"), "completion": said.get("response", "output")}
        return {"format": "unpaired_preference", "source": source | {"columns": columns}, "images": False}
    if turns:
        said = {"messages": "conversations"} | said
        columns = {ours: said[theirs] for theirs, ours in SHAREGPT.items() if theirs in said}
        return {"format": "chat", "source": source | {"columns": columns}, "images": "images" in said}
    said = said or {"prompt": "instruction", "query": "input", "response": "output"}
    columns = {ours: said[theirs] for theirs, ours in ALPACA.items() if theirs in said}
    return {"format": "instruction", "source": source | {"columns": columns}, "images": "images" in said}


def _put_training(draft: Draft) -> None:
    stage = draft.recipe["stage"]
    if stage in (SFT, PRETRAIN):
        packs = draft.get("packing") if draft.get("packing") is not None else stage == PRETRAIN
        packs = true(packs) or true(draft.get("neat_packing"))
        note = "rows of a pack do not see each other" if packs and not true(draft.get("neat_packing")) else ""
        draft.convert("training.packing", packs, "packing", "neat_packing", note=note)
        draft.origins.setdefault("training.packing", "llamafactory's default")
    draft.note(IGNORED, "rows of this stage are not packed", "packing", "neat_packing")
    if stage in (DPO, KTO):
        draft.convert("training.beta", draft.number("pref_beta") or 0.1, "pref_beta")
        loss = str(draft.get("pref_loss") or "sigmoid")
        if stage == DPO and loss in LOSSES:
            draft.convert("training.loss_type", [loss], "pref_loss")
        if draft.number("pref_ftx"):
            draft.note(NONE, "see training.loss_type: [sigmoid, sft], with training.loss_weights", "pref_ftx")
    draft.note(IGNORED, "of preferences only", "pref_beta", "pref_loss", "pref_ftx")
    if true(draft.get("use_dft_loss")) and stage == SFT:
        draft.convert("training.loss_type", "dft", "use_dft_loss")
    common.convert_batches(draft)
    common.convert_warm_up(draft)
    common.convert_precision(draft)
    if draft.recipe.get("peft") and draft.recipe["training"].get("bf16"):
        draft.put("model.dtype", "bfloat16", "bf16")  # as its base is loaded; what is trained is in float32
    common.convert_tf32(draft)
    common.convert_optimizer(draft, "optim", "adamw_torch")
    common.convert_report_to(draft)
    off = true(draft.get("disable_gradient_checkpointing"))
    common.convert_checkpointing(draft, not off, "disable_gradient_checkpointing", "gradient_checkpointing")
    strategy, steps = draft.get("eval_strategy"), draft.number("eval_steps")
    common.evaluate_as_said(
        draft, strategy or ("steps" if steps else "epoch"), steps, "eval_strategy", "eval_steps", "do_eval"
    )
