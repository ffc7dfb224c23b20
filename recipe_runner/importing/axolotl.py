"""From axolotl's configuration to a recipe."""

import re
from pathlib import Path
from typing import Any

from recipe_runner.data.look import look_at
from recipe_runner.importing import common
from recipe_runner.importing.draft import CONVERTED, IGNORED, NONE, SAME, Draft, Line, number, show, true
from recipe_runner.recipe.local import is_file_source, is_saved
from recipe_runner.stages import DPO, KTO, PRETRAIN, REWARD, SFT

ALPACA = "Below is an instruction that describes a task"
BEGIN = {
    "with_input": f"{ALPACA}, paired with an input that provides further context. Write a response that appropriately"
    " completes the request.",
    "without_input": f"{ALPACA}. Write a response that appropriately completes the request.",
}
# AlpacaPrompter in axolotl/prompters.py: what stands around a row, by the part of a type after its colon.
STYLES = {
    "instruct": {
        "system": "{system}\n\n",
        "with_input": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}",
        "without_input": "### Instruction:\n{instruction}\n\n### Response:\n{output}",
    },
    "chat": {
        "system": "SYSTEM: {system}\n",
        "with_input": "USER: {instruction}\n{input}\nASSISTANT:{output}",
        "without_input": "USER: {instruction}\nASSISTANT:{output}",
    },
    "chatml": {
        "system": "<|im_start|>system\n{system}<|im_end|>\n",
        "with_input": "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n{output}",
        "without_input": "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n{output}",
    },
    "phi": {
        "system": "<|system|>\n{system}<|end|>\n",
        "with_input": "<|user|>\n{instruction}<|end|>{input}<|assistant|>{output}",
        "without_input": "<|user|>\n{instruction}<|end|>\n<|assistant|>\n{output}",
    },
}
BECOMES = {"to": CONVERTED, "ignored": IGNORED, "none": NONE, "same": SAME}
OWN = ("tokenizer_default", "jinja")
# Layouts by the last part of a type: role -> column; `system` is found by itself. Source: prompt_strategies/
PAIRS = {
    "intel": {"prompt": "question", "chosen": "chosen", "rejected": "rejected"},
    "icr": {"prompt": "input", "chosen": "chosen", "rejected": "rejected"},
    "prompt_pairs": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    "ultra": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    "argilla_chat": {"chosen": "chosen", "rejected": "rejected"},
}
JUDGED = {
    "argilla": {"prompt": "instruction", "completion": "completion", "label": "label"},
    "argilla_chat": {"completion": "completion", "label": "label"},
    "intel": {"prompt": "question", "completion": "completion", "label": "label"},
    "prompt_pairs": {"prompt": "prompt", "completion": "completion", "label": "label"},
    "ultra": {"prompt": "prompt", "completion": "completion", "label": "label"},
}


def convert(draft: Draft) -> None:
    """Fills the draft's recipe with what its file says."""
    _choose_stage(draft)
    for step in (_put_model, _put_adapter, _put_data, _put_training, _put_saving):
        step(draft)
    common.convert_sharding(draft)


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
        local = adapter.startswith((".", "/")) or Path(adapter).is_dir()
        draft.convert("model.adapter", draft.place(adapter) if local else adapter, "lora_model_dir")
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
    left = ", ".join(str(name) for name in special if not (end and name == "eos_token"))
    said = [f"training.eos_token: {end}"] if end else []
    said += [f"{left}: as the tokenizer has it"] if left else []
    draft.note(CONVERTED if end else NONE, "; ".join(said) or "none", "special_tokens")


def _put_adapter(draft: Draft) -> None:
    method = draft.get("adapter")
    bits = 8 if true(draft.get("load_in_8bit")) else 4 if true(draft.get("load_in_4bit")) or method == "qlora" else 0
    if method not in (None, "lora", "qlora"):
        raise draft.refuse(f"adapter: {method} is not converted: see recipe-run explain method")
    keys = ("load_in_8bit", "load_in_4bit", "bnb_config_kwargs")
    if method and bits == 8:
        draft.convert("quantization", {"load_in_8bit": True}, *keys)
    elif method and bits:
        made = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        made |= {key: value for key, value in draft.mapping("bnb_config_kwargs").items() if key.startswith("bnb_4bit")}
        draft.convert("quantization", {**made, "bnb_4bit_compute_dtype": common.compute_dtype(draft)}, *keys)
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
        draft.note(
            SAME if targets is None else IGNORED, "lora_target_linear takes all linear layers", "lora_target_modules"
        )
    elif targets is not None:
        found = "all-linear" if targets in ("all-linear", ["all-linear"]) else targets
        draft.convert("peft.target_modules", found, "lora_target_modules")
    draft.note(SAME, "off", "lora_target_linear", "lora_target_modules")


def _put_unfreeze(draft: Draft) -> None:
    """Patterns that must match from the begin of a name on, where ours are looked for anywhere."""
    patterns = [str(pattern) for pattern in _list(draft.get("unfrozen_parameters"))]
    if any(re.search(r"\[\d*(:\d*)?\]$", pattern) for pattern in patterns):
        told = "a part of the rows of a matrix can't be trained alone: leave [...] out, and write unfreeze"
        draft.note(NONE, told, "unfrozen_parameters")
    elif patterns:
        begun = [pattern if pattern.startswith("^") else f"^{pattern}" for pattern in patterns]
        draft.convert("unfreeze", begun, "unfrozen_parameters")


def _put_data(draft: Draft) -> None:
    training = draft.get("pretraining_dataset") or draft.get("datasets")
    if not training:
        raise draft.refuse("it names no datasets")
    said = "pretraining_dataset" if draft.get("pretraining_dataset") else "datasets"
    entries = [_open_entry(draft, said, entry) for entry in _list(training)]
    sections = [_read_dataset(draft, entry) for entry in entries]
    first = sections[0]
    for other in sections[1:]:
        if any(other[key] != first[key] for key in ("format", "template")):
            kinds = " and ".join(dict.fromkeys(show(entry.get("type", "text")) for entry in entries))
            raise draft.refuse(
                f"its datasets have rows of several layouts ({kinds})", "convert them into turns (format chat)"
            )
    if first["format"] == "text" and draft.recipe["stage"] == SFT:
        draft.recipe["stage"] = PRETRAIN
    sources = [source for section in sections for source in section["sources"]]
    draft.recipe["dataset"] = {"format": first["format"], "train": common.one_or_all(sources)}
    if first["template"]:
        draft.put("dataset.template", first["template"], "datasets.type")
    if said == "pretraining_dataset":
        draft.put("dataset.streaming", True, said)
    draft.note(CONVERTED, f"dataset: format {first['format']}, {len(sources)} source(s)", said)
    draft.note(NONE, "pretraining_dataset goes before it", "datasets")
    if draft.get("test_datasets"):
        tests = [_open_entry(draft, "test_datasets", entry) for entry in _list(draft.get("test_datasets"))]
        held = [source for entry in tests for source in _read_dataset(draft, entry)["sources"]]
        draft.convert("dataset.eval", common.one_or_all(held), "test_datasets")
    elif said != "pretraining_dataset":
        common.hold_out(draft, "val_set_size")
    draft.note(SAME if not draft.number("val_set_size") else IGNORED, "nothing is held out", "val_set_size")
    if draft.get("processor_type"):
        draft.put("dataset.images", "marked", "processor_type")
        draft.note(CONVERTED, "dataset.images: marked", "processor_type")
    _put_masks(draft, entries, first["format"])
    _put_template(draft, entries)
    _report_entries(draft, said, entries)


def _report_entries(draft: Draft, said: str, entries: list[dict[str, Any]]) -> None:
    """Says what became of the keys of datasets."""
    for key in dict.fromkeys(key for entry in entries for key in entry):
        if draft.said(f"{said}.{key}"):
            continue
        known = draft.tool.keys.get(f"datasets.{key}", {"ignored": draft.tool.unknown})
        values = [entry[key] for entry in entries if entry.get(key) is not None]
        kind, text = next((kind, known[name]) for name, kind in BECOMES.items() if name in known)
        if not values or all(value in known.get("holds", ()) for value in values):
            kind, text = SAME, "as it is here" if values else "empty"
        elif key.startswith("chat_template") and "chat_template_path" not in draft.recipe.get("training", {}):
            own = str(values[0]).startswith(OWN)
            kind = IGNORED if draft.recipe["dataset"]["format"] != "chat" else SAME if own else NONE
            text = "rows of this layout are not written by it" if kind == IGNORED else "the model's own is used"
        elif key == "roles_to_train" and draft.recipe["dataset"].get("train_on") == "all":
            text = "dataset.train_on: all: what stands around turns, and the turns of other roles, are learned as well"
        draft.lines.append(Line(f"{said}.{key}", kind, text))


def _open_entry(draft: Draft, key: str, entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"path": entry}
    if isinstance(entry, dict):
        return entry
    raise draft.refuse(f"{key} is {show(entry)}, no list of datasets", "write a list: - path: OWNER/NAME")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _read_dataset(draft: Draft, entry: dict[str, Any]) -> dict[str, Any]:
    """The layout of a dataset, and its sources: one for each file."""
    path = entry.get("path")
    if not isinstance(path, str):
        raise draft.refuse(f"a dataset has no path: {show(entry)}")
    files = _list(entry.get("data_files"))
    paths = [path]
    if files:
        local = path in ("json", "csv", "parquet", "text")
        paths = [draft.place(str(file)) if local else f"hf://datasets/{path}/{file}" for file in files]
    elif is_file_source(path) or Path(path).exists():
        paths = [draft.place(path) + "/" * (Path(path).is_dir() and not is_saved(Path(path)))]
    source: dict[str, Any] = {}
    names = {"name": "subset", "split": "split", "revision": "revision"}
    source |= {ours: str(entry[theirs]) for theirs, ours in names.items() if entry.get(theirs)}
    if "://" in path and not path.startswith("hf://"):
        raise draft.refuse(f"the dataset {path} is at an address that is not read from", "copy it, and name the file")
    form, columns, template = _read_layout(draft, entry)
    if columns:
        source["columns"] = columns
    return {"sources": [{"source": each, **source} for each in paths], "format": form, "template": template}


def _read_layout(draft: Draft, entry: dict[str, Any]) -> tuple[str, dict[str, str], Any]:
    """Format, columns and plain-text template of a dataset's type."""
    kind, stage = entry.get("type"), draft.recipe["stage"]
    if stage == PRETRAIN:
        field = entry.get("text_column") or entry.get("field") or "text"
        return "text", {"text": field}, None
    if stage in (DPO, REWARD, KTO):
        return _read_preference(draft, entry, stage)
    if isinstance(kind, dict):
        return _read_own_prompt(draft, kind)
    name, _, style = str(kind or "").partition(":")
    name, _, loader = name.partition(".")
    if name in ("chat_template", "sharegpt", ""):
        default = "conversations" if name == "sharegpt" else "messages"
        columns = {"messages": str(entry.get("field_messages") or default)}
        return "chat", columns | ({"tools": str(entry["field_tools"])} if entry.get("field_tools") else {}), None
    if name == "completion":
        return "text", {"text": str(entry.get("field") or "text")}, None
    if name == "input_output":
        return "segments", {"segments": "segments"}, None
    own = STYLES.get(style or "instruct") if name in ("alpaca", "alpaca_instruct") else None
    if own and loader in ("", "load", "load_no_prompt"):
        begin = dict.fromkeys(BEGIN, "") if loader == "load_no_prompt" else BEGIN
        template = {
            part: own["system"].replace("{system}", begin[part]) * bool(begin[part]) + own[part] for part in BEGIN
        }
        return "instruction", {"instruction": "instruction", "input": "input", "output": "output"}, template
    raise draft.refuse(
        f"the dataset type {show(kind)} is a prompt written in Python there{_name_columns(draft, entry)}",
        "write its rows as turns (format chat), or as instruction, input and output",
    )


def _name_columns(draft: Draft, entry: dict[str, Any]) -> str:
    """The columns of rows that are here, for a message."""
    files = [str(file) for file in _list(entry.get("data_files")) or [entry.get("path")]]
    here = [place for place in (Path(files[0]), draft.file.parent / files[0]) if place.is_file()]
    look = look_at(here[:1]) if here else None
    return f"; its rows have the columns {', '.join(look.columns)}" if look else ""


def _read_own_prompt(draft: Draft, kind: dict[str, Any]) -> tuple[str, dict[str, str], Any]:
    """A prompt that the file itself describes."""
    columns = {
        "instruction": str(kind.get("field_instruction") or "instruction"),
        "input": str(kind.get("field_input") or "input"),
        "output": str(kind.get("field_output") or "output"),
    }
    form = str(kind.get("format") or "{instruction} {input} ")
    plain = str(kind.get("no_input_format") or "{instruction} ")
    begin = str(kind.get("system_format") or "{system}").replace("{system}", str(kind.get("system_prompt") or ""))
    if "{input}" not in form:
        return "instruction", {key: columns[key] for key in ("instruction", "output")}, f"{begin}{form}{{output}}"
    return (
        "instruction",
        columns,
        {"with_input": f"{begin}{form}{{output}}", "without_input": f"{begin}{plain}{{output}}"},
    )


def _read_preference(draft: Draft, entry: dict[str, Any], stage: str) -> tuple[str, dict[str, str], Any]:
    """Pairs, and judged answers."""
    kind = entry.get("type")
    form, known = ("unpaired_preference", JUDGED) if stage == KTO else ("preference", PAIRS)
    if isinstance(kind, dict):
        roles = ("prompt", "completion", "label") if stage == KTO else ("prompt", "chosen", "rejected")
        columns = {role: str(kind.get(f"field_{role}") or role) for role in roles}
        if "{system}" in str(kind.get("prompt_format")) and kind.get("field_system") not in (None, "system"):
            columns["system"] = str(kind["field_system"])
        written = [
            key for key in ("prompt_format", "chosen_format", "rejected_format", "completion_format") if kind.get(key)
        ]
        if written:
            told = "the model's chat template writes prompt and answers: take the marks of turns out"
            draft.lines.append(Line(f"datasets.type.{written[0]}", NONE, told))
        return form, columns, None
    family, _, last = str(kind or "").rpartition(".")
    if str(kind).startswith(("chat_template", "bradley_terry.chat_template")):
        if stage == REWARD:
            return form, dict(PAIRS["icr"]), None
        fields = {"chosen": "field_chosen", "rejected": "field_rejected", "prompt": "field_messages"}
        return form, {role: str(entry[key]) for role, key in fields.items() if entry.get(key)}, None
    if kind in (None, "passthrough", "passthrough.default", "user_defined.default"):
        return form, {}, None
    if last in known and family in ("chatml", "llama3", "bradley_terry.llama3"):
        told = (
            f"columns {', '.join(known[last].values())}; the model's own chat template writes the turns, not {family}"
        )
        draft.lines.append(Line("datasets.type", CONVERTED, told))
        return form, dict(known[last]), None
    if last in ("chatml", "llama3", "default", "argilla") and (family in ("", "chatml", "llama3")):
        return form, _guess_pairs(draft, entry, form), None
    raise draft.refuse(
        f"the dataset type {show(kind)} is written in Python there{_name_columns(draft, entry)}",
        "write rows of prompt, chosen and rejected" if form == "preference" else "write prompt, completion and label",
    )


def _guess_pairs(draft: Draft, entry: dict[str, Any], form: str) -> dict[str, str]:
    """The columns that axolotl finds by their names, of rows that are here; none of others: look at them."""
    names = {"prompt": ("prompt", "input", "question", "instruction"), "chosen": ("chosen", "chosen_response")}
    names |= {"rejected": ("rejected", "rejected_response")}
    there = _name_columns(draft, entry).rpartition("columns ")[2].split(", ")
    found = {role: next((name for name in of if name in there), "") for role, of in names.items()}
    told = "the model's own chat template writes the turns; columns are found by their names: see dataset.train.columns"
    draft.lines.append(Line("datasets.type", CONVERTED, told))
    return {role: name for role, name in found.items() if name} if form == "preference" else {}


def _put_masks(draft: Draft, entries: list[dict[str, Any]], form: str) -> None:
    if draft.recipe["stage"] != SFT:
        draft.note(SAME, "the stage decides", "train_on_inputs")
        return
    if form in ("instruction", "segments"):
        own = "labelled" if form == "segments" else "completion"
        chosen = "all" if true(draft.get("train_on_inputs")) else own
    else:
        roles = {str(role) for entry in entries for role in _list(entry.get("roles_to_train"))}
        chosen = "all" if true(draft.get("train_on_inputs")) or not roles <= {"assistant", "gpt"} else "assistant"
    told = "what stands around turns is learned as well" if chosen == "all" and form == "chat" else ""
    draft.convert("dataset.train_on", chosen, "train_on_inputs", note=told)
    if "train_on_inputs" not in draft.values:
        draft.origins["dataset.train_on"] = "axolotl's default"


def _put_template(draft: Draft, entries: list[dict[str, Any]]) -> None:
    names = {str(entry["chat_template"]): None for entry in entries if entry.get("chat_template")}
    if len(names) > 1:
        raise draft.refuse(f"its datasets have several chat templates ({', '.join(names)})", "a recipe has one")
    name = next(iter(names), draft.get("chat_template"))
    text = draft.get("chat_template_jinja") or next(
        (e["chat_template_jinja"] for e in entries if e.get("chat_template_jinja")), None
    )
    if draft.recipe["dataset"]["format"] in ("text", "segments") or draft.recipe["dataset"].get("template"):
        draft.note(
            IGNORED, "rows of this layout are not written by a chat template", "chat_template", "chat_template_jinja"
        )
    elif text and "{" in str(text):
        draft.template = str(text)
        draft.put("training.chat_template_path", "NAME.jinja", "chat_template_jinja")
        draft.note(CONVERTED, "NAME.jinja, beside the recipe", "chat_template_jinja", "chat_template")
    elif text:
        draft.convert("training.chat_template_path", draft.place(str(text)), "chat_template_jinja", "chat_template")
    elif isinstance(known := draft.tool.templates.get(str(name)), str):
        note = "compare rows by recipe-run preview"
        if name == "qwen3":
            note = "writes an empty block of thinking before each answer: dataset.thinking: mask, if rows have none"
        draft.convert("training.chat_template_path", known, "chat_template", note=note)
    elif known:
        draft.template = common.write_template(known)
        draft.put("training.chat_template_path", "NAME.jinja", "chat_template")
        draft.note(CONVERTED, f"NAME.jinja, beside the recipe: {name}, as axolotl writes it", "chat_template")
    elif name and not str(name).startswith(OWN):
        told = (
            "the model's own is used: compare rows by recipe-run preview, or name a file: training.chat_template_path"
        )
        draft.note(NONE, told, "chat_template")
    draft.note(SAME, "the model's own", "chat_template", "chat_template_jinja")
    draft.note(SAME, "where generation stops is the end of a turn", "eot_tokens")


def _put_training(draft: Draft) -> None:
    packs = true(draft.get("sample_packing"))
    if draft.recipe["stage"] in (SFT, PRETRAIN):
        draft.convert("training.packing", packs, "sample_packing")
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
    steps = draft.number("max_steps")
    common.convert_warm_up(draft, min(int(0.03 * steps), 100) if isinstance(steps, int) and steps > 0 else 0.03)
    if draft.origins.get("training.warmup_steps") == "axolotl's default":
        draft.origins["training.warmup_steps"] = "axolotl's default; there 100 steps at most"
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
    if said in ("true", "full"):
        draft.put("training.bf16", True, "bf16")
    common.convert_tf32(draft)
    said = draft.get("gradient_checkpointing")
    common.convert_checkpointing(draft, said not in (None, False, "false"), "gradient_checkpointing")
    offloads = said in ("offload", "offload_disk") or draft.get("activation_offloading")
    if offloads and draft.recipe["stage"] in (SFT, PRETRAIN, DPO):
        draft.convert("training.activation_offloading", True, "activation_offloading")
    told = "use_reentrant: false, as TRL has it: true loses gradients beside an adapter"
    draft.note(SAME, told, "gradient_checkpointing_kwargs")
    draft.note(SAME, "off", "activation_offloading")
    common.convert_batches(draft)
    if draft.recipe["dataset"].get("eval"):
        size = draft.number("eval_batch_size") or draft.number("micro_batch_size") or 1
        draft.convert("training.per_device_eval_batch_size", size, "eval_batch_size")
        draft.origins.setdefault("training.per_device_eval_batch_size", "axolotl's default: micro_batch_size")
    draft.note(IGNORED, "nothing is evaluated", "eval_batch_size")
    _put_simple(draft)


def _put_simple(draft: Draft) -> None:
    """The plugins, and trackers."""
    known = ("liger", "cut_cross_entropy", "kernels", "spectrum")
    told = "kernels for the same result: TRL makes the loss without all logits at once"
    names = [str(name) for name in _list(draft.get("plugins"))]
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
    draft.note(IGNORED, "another key says when is saved", "save_steps", "saves_per_epoch", "save_strategy")
    each, steps = draft.number("evals_per_epoch"), draft.number("eval_steps")
    strategy = draft.get("eval_strategy") or draft.get("evaluation_strategy")
    if each and not strategy:
        strategy, steps = ("epoch", None) if each * epochs <= 1 else ("steps", round(1 / (each * epochs), 6))
    strategy = strategy or ("steps" if steps else "epoch")
    keys = ("evals_per_epoch", "eval_steps", "eval_strategy", "evaluation_strategy")
    common.evaluate_as_said(draft, strategy, steps, *keys)
    if (patience := draft.number("early_stopping_patience")) and draft.recipe["dataset"].get("eval"):
        draft.convert("run.early_stopping", {"patience": int(patience)}, "early_stopping_patience")
        best = true(draft.get("load_best_model_at_end"))
        draft.convert("training.load_best_model_at_end", best, "load_best_model_at_end")
    draft.note(SAME, "off, or nothing is evaluated", "early_stopping_patience")
