"""What axolotl's configuration says of data: layouts, columns, masks, chat templates."""

from pathlib import Path
from typing import Any

from recipe_runner.data.look import look_at
from recipe_runner.importing import common
from recipe_runner.importing.draft import CONVERTED, IGNORED, NONE, SAME, Draft, as_list, is_there, show, true
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
NO_CONTEXT: dict[str, Any] = {
    "system": None,
    "history": None,
}  # columns that these layouts do not read, whatever they hold
AS_TURNS = "texts are taken as they are there; here the model's chat template makes turns of them"
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


def put_data(draft: Draft) -> None:
    """Fills the section dataset, and what of the training is about it: masks, the chat template."""
    training = draft.get("pretraining_dataset") or draft.get("datasets")
    if not training:
        raise draft.refuse("it names no datasets")
    said = "pretraining_dataset" if draft.get("pretraining_dataset") else "datasets"
    entries = [_open_entry(draft, said, entry) for entry in as_list(training)]
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
        tests = [_open_entry(draft, "test_datasets", entry) for entry in as_list(draft.get("test_datasets"))]
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
        draft.say(kind, f"{said}.{key}", text)


def _open_entry(draft: Draft, key: str, entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"path": entry}
    if isinstance(entry, dict):
        return entry
    raise draft.refuse(f"{key} is {show(entry)}, no list of datasets", "write a list: - path: OWNER/NAME")


def _read_dataset(draft: Draft, entry: dict[str, Any]) -> dict[str, Any]:
    """The layout of a dataset, and its sources: one for each file."""
    path = entry.get("path")
    if not isinstance(path, str):
        raise draft.refuse(f"a dataset has no path: {show(entry)}")
    files = as_list(entry.get("data_files"))
    paths = [path]
    if files:
        folder = Path(path).is_dir() or (draft.file.parent / path).is_dir()
        local = folder or path in ("json", "csv", "parquet", "text")
        inside = [f"{path}/{file}" if folder and is_there(Path(path), str(file)) else str(file) for file in files]
        paths = [draft.place(file) for file in inside] if local else [f"hf://datasets/{path}/{file}" for file in files]
    elif is_file_source(path) or Path(path).exists():
        paths = [draft.place(path.rstrip("/")) + "/" * (Path(path).is_dir() and not is_saved(Path(path)))]
    source: dict[str, Any] = {}
    names = {"name": "subset", "split": "split", "revision": "revision"}
    source |= {ours: str(entry[theirs]) for theirs, ours in names.items() if entry.get(theirs)}
    if "://" in path and not path.startswith("hf://"):
        raise draft.refuse(f"the dataset {path} is at an address that is not read from", "copy it, and name the file")
    form, columns, template = _read_layout(draft, entry)
    if columns:
        source["columns"] = columns
    return {"sources": [{"source": each, **source} for each in paths], "format": form, "template": template}


def _read_layout(draft: Draft, entry: dict[str, Any]) -> tuple[str, dict[str, Any], Any]:
    """Format, columns and plain-text template of a dataset's type."""
    kind, stage = entry.get("type"), draft.recipe["stage"]
    if stage == PRETRAIN:
        field = entry.get("text_column") or entry.get("field") or "text"
        return "text", {"text": field}, None
    if stage in (DPO, REWARD, KTO):
        return _read_preference(draft, entry, stage)
    if isinstance(kind, dict):
        return _read_own_prompt(draft, entry, kind)
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
        columns = {name: name for name in ("instruction", "input", "output")} | NO_CONTEXT
        return "instruction", columns, template
    raise draft.refuse(
        f"the dataset type {show(kind)} is a prompt written in Python there{_name_columns(draft, entry)}",
        "write its rows as turns (format chat), or as instruction, input and output",
    )


def _name_columns(draft: Draft, entry: dict[str, Any]) -> str:
    """The columns of rows that are here, for a message."""
    columns = _list_columns(draft, entry)
    return f"; its rows have the columns {', '.join(columns)}" if columns else ""


def _list_columns(draft: Draft, entry: dict[str, Any]) -> list[str]:
    """The columns of rows that are here; none of others."""
    files = [str(file) for file in as_list(entry.get("data_files")) or [entry.get("path")]]
    here = [place for place in (Path(files[0]), draft.file.parent / files[0]) if place.is_file()]
    look = look_at(here[:1]) if here else None
    return list(look.columns) if look else []


def _read_own_prompt(draft: Draft, entry: dict[str, Any], kind: dict[str, Any]) -> tuple[str, dict[str, Any], Any]:
    """A prompt that the file itself describes."""
    columns: dict[str, Any] = {
        "instruction": str(kind.get("field_instruction") or "instruction"),
        "input": str(kind.get("field_input") or "input"),
        "output": str(kind.get("field_output") or "output"),
    }
    form = str(kind.get("format") or "{instruction} {input} ")
    plain = str(kind.get("no_input_format") or "{instruction} ")
    begin = str(kind.get("system_format") or "{system}").replace("{system}", str(kind.get("system_prompt") or ""))
    columns |= NO_CONTEXT
    there = _list_columns(draft, entry)
    system = str(kind.get("field_system") or "system")
    if "field_system" in kind or system in there:
        told = f"a row's own '{system}' stands there for system_prompt; a text has no place for it here: make turns"
        draft.say(NONE, "datasets.type.field_system", told)
    if "{input}" not in form:
        bare = there and columns["input"] not in there
        if bare and plain != form:
            told = f"rows without an input are written by no_input_format, which is {show(plain)}"
            draft.say(IGNORED, "datasets.type.format", told)
        elif plain != form:
            told = f"here of all rows; there those without an input are written by no_input_format, {show(plain)}"
            draft.say(CONVERTED, "datasets.type.format", told)
        return "instruction", {**columns, "input": None}, f"{begin}{plain if bare else form}{{output}}"
    return (
        "instruction",
        columns,
        {"with_input": f"{begin}{form}{{output}}", "without_input": f"{begin}{plain}{{output}}"},
    )


def _read_preference(draft: Draft, entry: dict[str, Any], stage: str) -> tuple[str, dict[str, Any], Any]:
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
            told = "the model's chat template writes prompt and answers: take marks of turns out of the rows"
            for key in written:
                draft.say(NONE, f"datasets.type.{key}", told)
        draft.say(CONVERTED, "datasets.type", f"dataset.format: {form}; {AS_TURNS}")
        return form, columns, None
    family, _, last = str(kind or "").rpartition(".")
    if str(kind).startswith(("chat_template", "bradley_terry.chat_template")):
        if stage == REWARD:
            return form, dict(PAIRS["icr"]), None
        fields = {"chosen": "field_chosen", "rejected": "field_rejected", "prompt": "field_messages"}
        return form, {role: str(entry[key]) for role, key in fields.items() if entry.get(key)}, None
    if kind in (None, "passthrough", "passthrough.default", "user_defined.default"):
        draft.say(CONVERTED, "datasets.type", f"dataset.format: {form}; {AS_TURNS}")
        return form, {}, None
    if last in known and family in ("chatml", "llama3", "bradley_terry.llama3"):
        told = (
            f"columns {', '.join(known[last].values())}; the model's own chat template writes the turns, not {family}"
        )
        draft.say(CONVERTED, "datasets.type", told)
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
    there = _list_columns(draft, entry)
    found = {role: next((name for name in of if name in there), "") for role, of in names.items()}
    told = "the model's own chat template writes the turns; columns are found by their names: see dataset.train.columns"
    draft.say(CONVERTED, "datasets.type", told)
    return {role: name for role, name in found.items() if name} if form == "preference" else {}


def _put_masks(draft: Draft, entries: list[dict[str, Any]], form: str) -> None:
    if draft.recipe["stage"] != SFT:
        draft.note(SAME, "the stage decides", "train_on_inputs")
        return
    if form in ("instruction", "segments"):
        own = "labelled" if form == "segments" else "completion"
        chosen = "all" if true(draft.get("train_on_inputs")) else own
    else:
        roles = {str(role) for entry in entries for role in as_list(entry.get("roles_to_train"))}
        for entry in entries:
            if entry.get("roles_to_train") == []:
                told = "there only turns are learned that say so; here all of the assistant's but those that say no"
                draft.say(NONE, "datasets.roles_to_train", told)
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
    told = "the model's own; where it has none, name a file: training.chat_template_path"
    draft.note(NONE if "fallback" in str(name) else SAME, told, "chat_template", "chat_template_jinja")
    draft.note(SAME, "where generation stops is the end of a turn", "eot_tokens")
