"""From the configuration of TRL's own commands, and of the alignment-handbook, to a recipe."""

import re
from pathlib import Path
from typing import Any

from recipe_runner.importing import common
from recipe_runner.importing.draft import CONVERTED, IGNORED, NONE, SAME, Draft, number, show, true
from recipe_runner.importing.sharding import convert_sharding
from recipe_runner.recipe.local import BUILDERS, is_saved, suffix_of
from recipe_runner.stages import DPO, FORMATS, KTO, PRETRAIN, REWARD, SFT

OF_DPO = ("beta", "loss_type", "max_prompt_length", "precompute_ref_log_probs")
MARKS = {  # keys that one stage alone has
    KTO: ("desirable_weight", "undesirable_weight"),
    REWARD: ("center_rewards_coefficient",),
    SFT: ("assistant_only_loss", "completion_only_loss", "dataset_text_field", "packing", "max_seq_length"),
}
SOURCES = ("dataset_name", "dataset_config", "dataset_mixture", "dataset_mixer", "datasets")


def convert(draft: Draft) -> None:
    """Fills the draft's recipe with what its file says."""
    stage = _choose_stage(draft)
    draft.recipe = {"stage": stage}
    common.convert_model(draft, "model_name_or_path", "model_revision")
    common.convert_attention(draft, draft.get("attn_implementation"), "attn_implementation")
    dtype = draft.get("dtype") or draft.get("torch_dtype")
    draft.convert("model.dtype", str(dtype or "float32"), "dtype", "torch_dtype")
    draft.origins.setdefault("model.dtype", "trl's default")
    _put_adapter(draft)
    _put_data(draft)
    _put_training(draft)
    convert_sharding(draft)


def _choose_stage(draft: Draft) -> str:
    """By keys that one stage alone has, or by the file's name, or its folder's, as the handbook's are called."""
    if draft.get("reward_funcs"):
        raise draft.refuse("its rewards are Python functions", "write a recipe with `rewards`")
    for stage, keys in MARKS.items():
        if found := next((key for key in keys if key in draft.values), ""):
            return _say_stage(draft, stage, f"by the key {found}")
    for name in (draft.file.stem, *draft.file.resolve().parts[-2:-1]):
        for word in re.findall(r"[a-z]+", name.lower()):
            if word in draft.tool.no_stages:
                raise draft.refuse(f"{word.upper()} can't be converted: {draft.tool.no_stages[word]}")
            if word in draft.tool.stages:
                return _say_stage(draft, draft.tool.stages[word], f"by the name {name}")
    if any(key in draft.values for key in OF_DPO):
        return _say_stage(draft, DPO, "by the keys of preferences")
    return _say_stage(draft, SFT, "as nothing says another: TRL is told by its command, trl sft")


def _say_stage(draft: Draft, stage: str, why: str) -> str:
    draft.say(CONVERTED, "(the command)", f"stage: {stage}, {why}")
    return stage


def _put_adapter(draft: Draft) -> None:
    names = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    names |= {"lora_target_modules": "target_modules", "lora_target_parameters": "target_parameters"}
    names |= {"lora_modules_to_save": "modules_to_save", "use_rslora": "use_rslora", "use_dora": "use_dora"}
    bits = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")
    if not true(draft.get("use_peft")):
        draft.note(IGNORED, "use_peft is not there: all weights are trained", *names)
        draft.note(SAME, "all weights are trained", "use_peft")
        draft.note(NONE, "transformers refuses to train quantized weights without an adapter (use_peft)", *bits)
        return
    draft.convert("peft.method", "lora", "use_peft")
    defaults = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
    for key, ours in names.items():
        value = draft.get(key) if draft.get(key) is not None else defaults.get(key)
        if value in (None, False):
            draft.note(SAME, "off", key)
            continue
        value = "all-linear" if value == ["all-linear"] else value
        draft.convert(f"peft.{ours}", number(value) if isinstance(value, str) else value, key)
        draft.origins.setdefault(f"peft.{ours}", "trl's default")
    if true(draft.get("load_in_4bit")) or true(draft.get("load_in_8bit")):
        size, double = 4 if true(draft.get("load_in_4bit")) else 8, true(draft.get("use_bnb_nested_quant"))
        common.convert_bits(draft, size, double, *bits, kind=draft.get("bnb_4bit_quant_type"))
    draft.note(SAME, "16 bits", *bits)


def _put_data(draft: Draft) -> None:
    stage = draft.recipe["stage"]
    form = {SFT: "chat", PRETRAIN: "text", KTO: "unpaired_preference"}.get(stage, "preference")
    sources, held = _read_sources(draft)
    named = {name for source in sources for name in source.pop("columns", ())}
    text = draft.get("dataset_text_field") or ("text" if "text" in named and "messages" not in named else None)
    if stage == SFT and text:
        form, draft.recipe["stage"] = "text", PRETRAIN
    elif stage == SFT and {"prompt", "completion"} <= named:
        form = "instruction"
    roles = {"text": str(text)} if form == "text" and text else {name: name for name in FORMATS[form].roles}
    roles |= {"instruction": "prompt", "output": "completion"} if form == "instruction" else {}
    columns = {role: name for role, name in roles.items() if role == "text" or name in named}
    for source in (*sources, *(held if isinstance(held, list) else ())):
        source |= {"columns": columns} if set(FORMATS[form].required) <= columns.keys() else {}
    draft.recipe["dataset"] = {"format": form, "train": common.one_or_all(sources)}
    told = f"dataset: format {form}, {len(sources)} source(s)"
    if stage == SFT and form == "chat" and "messages" not in named:
        told += "; the layout is a guess: TRL looks at the columns. Of texts write stage: pretrain and format: text, of"
        told += " prompt and completion format: instruction"
    if form == "instruction":
        draft.put("dataset.template", "{instruction}{output}", "TRL writes texts as they are")
        told += "; of texts: turns as prompt and completion are format chat, with train_on: completion"
    if draft.recipe["stage"] in (DPO, KTO, REWARD):
        told += "; texts are taken as they are there, here the model's chat template makes turns of them"
    draft.note(CONVERTED, told, *SOURCES)
    if held:
        draft.put("dataset.eval", common.one_or_all(held) if isinstance(held, list) else held, "dataset_test_split")
    draft.note(CONVERTED, "dataset.train and dataset.eval", "dataset_splits", "dataset_train_split")
    draft.note(CONVERTED, "dataset.eval", "dataset_test_split")
    draft.note(CONVERTED, "dataset.train.columns", "dataset_text_field")
    if draft.recipe["stage"] == SFT:
        chosen = "assistant" if true(draft.get("assistant_only_loss")) else "all"
        whole = draft.get("completion_only_loss") is False
        if true(draft.get("completion_only_loss")) or (form == "instruction" and not whole):
            chosen = "completion"
        draft.convert("dataset.train_on", chosen, "assistant_only_loss", "completion_only_loss")
        draft.origins.setdefault("dataset.train_on", "trl's default, of turns")
    _put_template(draft)


def _put_template(draft: Draft) -> None:
    template = draft.get("chat_template")
    if template and "{" in str(template):
        draft.template = str(template)
        draft.put("training.chat_template_path", "NAME.jinja", "chat_template")
        draft.note(CONVERTED, "NAME.jinja, beside the recipe", "chat_template")
    elif template:
        draft.note(NONE, f"{show(template)}: name a file: training.chat_template_path", "chat_template")
    path = draft.get("chat_template_path")
    if isinstance(path, str) and not path.startswith("trl/"):
        draft.convert("training.chat_template_path", draft.place(path), "chat_template_path")
    skipped = (draft.get("dataset_kwargs") or {}) if isinstance(draft.get("dataset_kwargs"), dict) else {}
    draft.note(
        IGNORED if set(skipped) <= {"add_special_tokens", "append_concat_token"} else NONE,
        "TRL 1.16 reads skip_prepare_dataset alone: rows are prepared before",
        "dataset_kwargs",
    )


def _read_sources(draft: Draft) -> tuple[list[dict[str, Any]], Any]:
    """Training sources, with the names of the columns that are taken of them; and held-out data where there is some."""
    if mixture := draft.get("dataset_mixture"):
        if not isinstance(mixture, dict):
            raise draft.refuse(f"dataset_mixture is {show(mixture)}, no mapping with datasets")
        return _read_mixture(draft, mixture)
    if mixer := draft.get("dataset_mixer"):
        return _read_mixer(draft, mixer)
    if draft.get("datasets"):
        entries = draft.get("datasets")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise draft.refuse("datasets is no list of mappings", "write a list: - path: OWNER/NAME")
        made = [_read_dataset(draft, entry) for entry in entries]
        return made, _hold_out(draft, made, draft.get("test_split_size"), "test_split_size")
    name = draft.get("dataset_name")
    if not isinstance(name, str):
        raise draft.refuse("it names no dataset_name" if name is None else f"dataset_name is {show(name)}, no name")
    split, test = str(draft.get("dataset_train_split") or "train"), str(draft.get("dataset_test_split") or "test")
    if Path(name).is_dir() and not is_saved(Path(name)):
        wanted = "no" not in str(draft.get("eval_strategy") or draft.get("evaluation_strategy") or "no")
        return [_find_split(draft, name, split)], [_find_split(draft, name, test)] if wanted else None
    source = {"source": draft.place(name) if Path(name).exists() else name}
    source |= {"subset": str(draft.get("dataset_config"))} if draft.get("dataset_config") else {}
    source |= {"split": split} if split != "train" else {}
    return [source], [{**source, "split": test}]


def _find_split(draft: Draft, folder: str, split: str) -> dict[str, Any]:
    """The file of a split in a folder of files.

    Raises:
        UserError: There is none, or several.
    """
    found = [file for file in sorted(Path(folder).glob(f"{split}*")) if suffix_of(file.name) in BUILDERS]
    if len(found) != 1:
        told = ", ".join(file.name for file in found) or "none"
        raise draft.refuse(
            f"the split {split} of the folder {folder} is in one file, or {told}", "name a file: data_files"
        )
    return {"source": draft.place(str(found[0]))}


def _read_dataset(draft: Draft, entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of TRL's own `datasets`."""
    path, files = str(entry.get("path")), entry.get("data_files")
    if isinstance(files, dict | list) or entry.get("data_dir"):
        raise draft.refuse(f"the dataset {path} names folders or lists of files", "name one file: data_files: FILE")
    local = path in ("json", "csv", "parquet", "text")
    source: dict[str, Any] = {"source": path}
    if files:
        source["source"] = draft.place(str(files)) if local else f"hf://datasets/{path}/{files}"
    source |= {ours: str(entry[key]) for key, ours in (("name", "subset"), ("split", "split")) if entry.get(key)}
    told = {"path": "source", "data_files": "source", "name": "subset", "split": "split", "columns": "columns"}
    share = number(entry.get("fraction"))
    if isinstance(share, int | float):
        source["weight"] = share
        note = "dataset.train.weight; there no row is taken twice, here smaller sources are until all rows were seen"
        draft.say(CONVERTED, "datasets.fraction", note)
    for key, ours in told.items():
        if key in entry:
            draft.say(CONVERTED, f"datasets.{key}", f"dataset.train.{ours}")
    return source | ({"columns": entry["columns"]} if isinstance(entry.get("columns"), list) else {})


def _read_mixture(draft: Draft, mixture: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    """The handbook's `dataset_mixture`, whose weights are shares of each dataset's own rows."""
    entries = mixture.get("datasets")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise draft.refuse("dataset_mixture names no datasets")
    sources = []
    for entry in entries:
        source: dict[str, Any] = {"source": str(entry.get("id"))}
        source |= {ours: str(entry[key]) for key, ours in (("config", "subset"), ("split", "split")) if entry.get(key)}
        source |= {"columns": entry["columns"]} if isinstance(entry.get("columns"), list) else {}
        share = number(entry.get("weight"))
        if share is not None and not isinstance(share, int | float):
            raise draft.refuse(f"dataset_mixture: weight is {show(share)}, no number")
        if share not in (None, 1):
            source["epochs"] = share
            draft.say(
                CONVERTED, "dataset_mixture.weight", "dataset.train.epochs: the share of a source's rows, by the seed"
            )
        sources.append(source)
    held = _hold_out(draft, sources, mixture.get("test_split_size"), "dataset_mixture.test_split_size")
    if "seed" in mixture:
        draft.say(NONE, "dataset_mixture.seed", "run.seed draws rows, too")
    return sources, held


def _read_mixer(draft: Draft, mixer: Any) -> tuple[list[dict[str, Any]], Any]:
    """The handbook's mixture before 2025: name -> share of its rows; and splits, those of evaluation with `test`."""
    if not isinstance(mixer, dict):
        raise draft.refuse(f"dataset_mixer is {show(mixer)}, no mapping of names to shares")
    splits = [str(split) for split in draft.names("dataset_splits") or ["train"]]
    sources, held = [], []
    for name, share in mixer.items():
        share = number(share)
        if share is not None and not isinstance(share, int | float):
            raise draft.refuse(f"dataset_mixer: the share of {name} is {show(share)}, no number")
        for split in splits:
            if "test" in split:
                held.append({"source": str(name), "split": split})
            else:
                sources.append(
                    {"source": str(name), "split": split} | ({"epochs": share} if share not in (None, 1) else {})
                )
    if not sources:
        raise draft.refuse("dataset_splits names no split to train on")
    return sources, held or None


def _hold_out(draft: Draft, sources: list[dict[str, Any]], said: Any, key: str) -> Any:
    """A share of the rows, or a number of them: of one source by its split, of several as a hundredth of each."""
    size = number(said)
    if not isinstance(size, int | float) or not size > 0:
        return None
    if size < 1:
        draft.say(CONVERTED, key, f"dataset.eval: {{fraction: {size}}}, of each source, by run.seed")
        return {"fraction": size}
    split = sources[0].get("split") or "train"
    if len(sources) == 1 and "[" not in split:
        sources[0]["split"] = f"{split}[{int(size)}:]"
        draft.say(CONVERTED, key, f"the first {int(size):,} rows are held out; there others, by the seed")
        held = {key: value for key, value in sources[0].items() if key != "epochs"}
        return [{**held, "split": f"{split}[:{int(size)}]"}]
    told = f"dataset.eval: {{fraction: 0.01}}: of each source; there {int(size):,} rows of all"
    draft.say(CONVERTED, key, told)
    return {"fraction": 0.01}


def _put_training(draft: Draft) -> None:
    common.convert_batches(draft)
    common.convert_warm_up(draft)
    if draft.recipe["stage"] == DPO and isinstance(draft.get("loss_type"), str):
        draft.convert("training.loss_type", [draft.get("loss_type")], "loss_type")
    if draft.get("packing_strategy") == "ffd":
        draft.convert("training.packing_strategy", "bfd", "packing_strategy", note="the name that TRL 0.18 had for it")
    common.convert_precision(draft)
    common.convert_tf32(draft)
    common.convert_report_to(draft)
    if draft.get("optim"):
        common.convert_optimizer(draft, "optim", "adamw_torch_fused")
    on = draft.get("gradient_checkpointing")
    common.convert_checkpointing(draft, on is None or true(on), "gradient_checkpointing")
    if kwargs := draft.get("gradient_checkpointing_kwargs"):
        if true(on) and kwargs != {"use_reentrant": False}:
            told = "use_reentrant: true loses gradients beside an adapter; false is TRL's own"
            draft.note(NONE, told, "gradient_checkpointing_kwargs")
        draft.note(SAME, "TRL's own", "gradient_checkpointing_kwargs")
    strategy = draft.get("eval_strategy") or draft.get("evaluation_strategy") or "no"
    keys = ("eval_strategy", "evaluation_strategy", "eval_steps", "do_eval")
    common.evaluate_as_said(draft, strategy, draft.number("eval_steps"), *keys)
    draft.note(NONE, "training.max_length holds for prompt and answer together", "max_completion_length")
