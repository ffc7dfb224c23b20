"""From the configuration of TRL's own commands, and of the alignment-handbook, to a recipe."""

from typing import Any

from recipe_runner.importing import common
from recipe_runner.importing.draft import CONVERTED, IGNORED, NONE, SAME, Draft, number, show, true
from recipe_runner.stages import DPO, KTO, PRETRAIN, SFT

OF_DPO = ("beta", "loss_type", "max_prompt_length", "precompute_ref_log_probs", "truncation_mode")
COLUMNS = {
    "messages": "messages",
    "chosen": "chosen",
    "rejected": "rejected",
    "prompt": "prompt",
    "completion": "completion",
    "label": "label",
    "text": "text",
}


def convert(draft: Draft) -> None:
    """Fills the draft's recipe with what its file says."""
    stage = _choose_stage(draft)
    draft.recipe = {"stage": stage}
    common.convert_model(draft, "model_name_or_path", "model_revision")
    common.convert_attention(draft, draft.get("attn_implementation"), "attn_implementation")
    dtype = draft.get("dtype") or draft.get("torch_dtype")
    if dtype:
        draft.convert("model.dtype", str(dtype), "dtype", "torch_dtype")
    _put_adapter(draft)
    _put_data(draft)
    _put_training(draft)
    common.convert_sharding(draft)


def _choose_stage(draft: Draft) -> str:
    """By the file's name, as the handbook's are called, or by keys that one stage alone has."""
    name = "/".join(draft.file.parts[-2:]).lower()
    for word, why in draft.tool.no_stages.items():
        if word in name:
            raise draft.refuse(f"{word.upper()} can't be converted: {why}")
    if draft.get("reward_funcs"):
        raise draft.refuse("its rewards are Python functions", "write a recipe with `rewards`")
    for word, stage in draft.tool.stages.items():
        if word in name:
            return stage
    if any(key in draft.values for key in OF_DPO):
        return KTO if "desirable_weight" in draft.values else DPO
    return SFT


def _put_adapter(draft: Draft) -> None:
    names = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    names |= {"lora_target_modules": "target_modules", "lora_target_parameters": "target_parameters"}
    names |= {"lora_modules_to_save": "modules_to_save", "use_rslora": "use_rslora", "use_dora": "use_dora"}
    bits = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")
    if not true(draft.get("use_peft")):
        draft.note(IGNORED, "use_peft is not there: all weights are trained", *names)
        draft.note(SAME, "all weights are trained", "use_peft")
        draft.note(IGNORED, "without an adapter weights are trained as they are", *bits)
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
    if true(draft.get("load_in_4bit")):
        made = {"load_in_4bit": True, "bnb_4bit_quant_type": draft.get("bnb_4bit_quant_type") or "nf4"}
        made["bnb_4bit_use_double_quant"] = true(draft.get("use_bnb_nested_quant"))
        draft.convert("quantization", {**made, "bnb_4bit_compute_dtype": common.compute_dtype(draft)}, *bits)
    elif true(draft.get("load_in_8bit")):
        draft.convert("quantization", {"load_in_8bit": True}, *bits)
    draft.note(SAME, "16 bits", *bits)


def _put_data(draft: Draft) -> None:
    stage = draft.recipe["stage"]
    form = {SFT: "chat", PRETRAIN: "text", KTO: "unpaired_preference"}.get(stage, "preference")
    sources, held = _read_sources(draft, stage)
    columns = sources[0].get("columns") or {}
    text = draft.get("dataset_text_field")
    if stage == SFT and (text or "text" in columns):
        form, draft.recipe["stage"] = "text", PRETRAIN
        for source in sources:
            source["columns"] = {"text": str(text or "text")}
    draft.recipe["dataset"] = {"format": form, "train": common.one_or_all(sources)}
    draft.note(
        CONVERTED,
        f"dataset: format {form}, {len(sources)} source(s)",
        "dataset_name",
        "dataset_config",
        "dataset_mixture",
    )
    keys = (
        "datasets",
        "dataset_mixer",
        "dataset_splits",
        "dataset_train_split",
        "dataset_test_split",
        "dataset_text_field",
    )
    if held:
        draft.put("dataset.eval", held, "dataset_test_split")
    draft.note(CONVERTED, "dataset.train and dataset.eval", *keys)
    if draft.recipe["stage"] == SFT:
        chosen = "assistant" if true(draft.get("assistant_only_loss")) else "all"
        if true(draft.get("completion_only_loss")):
            chosen = "completion"
        draft.convert("dataset.train_on", chosen, "assistant_only_loss", "completion_only_loss")
        draft.origins.setdefault("dataset.train_on", "trl's default, of turns")
    template = draft.get("chat_template")
    if template and "{" in str(template):
        draft.template = str(template)
        draft.put("training.chat_template_path", "NAME.jinja", "chat_template")
        draft.note(CONVERTED, "NAME.jinja, beside the recipe", "chat_template")
    elif template:
        draft.note(NONE, f"{show(template)}: name a file: training.chat_template_path", "chat_template")
    skipped = (draft.get("dataset_kwargs") or {}) if isinstance(draft.get("dataset_kwargs"), dict) else {}
    draft.note(
        IGNORED if set(skipped) <= {"add_special_tokens", "append_concat_token"} else NONE,
        "TRL 1.16 reads skip_prepare_dataset alone: rows are prepared before",
        "dataset_kwargs",
    )


def _read_sources(draft: Draft, stage: str) -> tuple[list[dict[str, Any]], Any]:
    """Training sources, and held-out data where the file names some."""
    if mixture := draft.get("dataset_mixture"):
        entries = mixture.get("datasets") if isinstance(mixture, dict) else None
        if not entries:
            raise draft.refuse("dataset_mixture names no datasets")
        sources = []
        for entry in entries:
            source: dict[str, Any] = {"source": str(entry.get("id"))}
            source |= {
                ours: str(entry[theirs])
                for theirs, ours in (("config", "subset"), ("split", "split"))
                if entry.get(theirs)
            }
            columns = {COLUMNS[name]: name for name in entry.get("columns") or () if name in COLUMNS}
            wanted = {SFT: ("messages", "text"), DPO: ("prompt", "chosen", "rejected")}.get(stage, tuple(COLUMNS))
            columns = {role: name for role, name in columns.items() if role in wanted}
            if stage == DPO and isinstance(columns.get("prompt"), str) and "chosen" not in columns:
                columns = {}
            source |= {"columns": columns} if columns else {}
            sources.append(
                source | ({"weight": float(entry["weight"])} if entry.get("weight") not in (None, 1, 1.0) else {})
            )
        if any("weight" in source for source in sources):
            for source in sources:
                source.setdefault("weight", 1.0)
            if len(sources) == 1:
                share = sources[0].pop("weight")
                draft.note(
                    NONE, f"a share of {share} of the rows: dataset.train.limit takes so many", "dataset_mixture"
                )
        size = number(mixture.get("test_split_size"))
        held = {"fraction": size} if isinstance(size, float) and 0 < size < 1 else None
        return sources, held
    if mixer := draft.get("dataset_mixer"):
        splits = draft.get("dataset_splits") or ["train"]
        return [{"source": str(name), "split": str(splits[0])} for name in mixer], (
            {"source": str(next(iter(mixer))), "split": str(splits[1])} if len(splits) > 1 and len(mixer) == 1 else None
        )
    name = draft.get("dataset_name")
    if not name:
        raise draft.refuse("it names no dataset_name")
    source = {"source": str(name)}
    source |= {"subset": str(draft.get("dataset_config"))} if draft.get("dataset_config") else {}
    split = draft.get("dataset_train_split")
    source |= {"split": str(split)} if split and split != "train" else {}
    test = draft.get("dataset_test_split") or "test"
    return [source], {**source, "split": str(test)}


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
