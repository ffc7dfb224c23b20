"""Rules about `model.adapter`, the earlier run that training continues from. One small function a rule."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe_runner.files import hash_weights, list_runs, read_object, read_status
from recipe_runner.methods import METHODS
from recipe_runner.problems.problem import Found
from recipe_runner.recipe.sections import ModelSection, UpstreamSection
from recipe_runner.stages import Stage

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLACE = ("model", "adapter")
# What only a new adapter reads: a stage that goes on from the one before has no use for it.
BEGINNING = (
    "init_lora_weights",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "tinit",
    "tfinal",
    "deltaT",
    "total_step",
)
CHANGING_BASE = ("corda", "lora_ga")  # initialisations that look at rows, and then take a part of the base's weights
FROM_DATA = ("eva", *CHANGING_BASE)  # all that look at rows before training
MOST_ITERATIONS = 999  # of PiSSA's fast decomposition: 4 to 64 are usual
# Fields of the adapter's configuration that may differ, beside dropout: what is checked with the model.
_FREE = ("method", "target_modules")


def locate_adapter(folder: Path) -> Path:
    """The adapter's folder in a run folder; any other folder is given back as it is."""
    inside = folder / "adapter"
    return inside if (inside / CONFIG).is_file() else folder


def alters_base(peft: UpstreamSection) -> bool:
    """Whether the adapter's initialisation takes a part out of the base's weights: the adapter fits that base only."""
    return str(peft["init_lora_weights"]).lower().startswith(("pissa", "olora", *CHANGING_BASE))


def dropout_off(peft: UpstreamSection, training: UpstreamSection) -> Found:
    """Stages with a reference turn dropout off. Source: TRL 1.16, DPOConfig.disable_dropout, true by default."""
    if peft.said.get("lora_dropout") and training["disable_dropout"]:
        found = "it has no effect: training.disable_dropout is true, as TRL has it for this stage"
        yield ("peft", "lora_dropout"), found, "remove the key, or set training.disable_dropout: false"


def random_adapter(peft: UpstreamSection) -> Found:
    """`init_lora_weights: false` is for PEFT's own tests. Source: PEFT 0.21, tuners/lora/config.py."""
    if peft["init_lora_weights"] is False:
        found = "both matrices would begin at random, and the model as another than its base"
        yield ("peft", "init_lora_weights"), found, "remove the key: true is PEFT's default"


def initialisation(
    stage: Stage, peft: UpstreamSection, quantization: UpstreamSection, unfreeze: Sequence[str]
) -> Found:
    """Initialisations that can't be what they are called, or whose result could not be loaded right.

    Source: PEFT 0.21, tuners/lora/layer.py, update_layer; peft_model.py, save_pretrained, which converts the result.
    """
    path, name = ("peft", "init_lora_weights"), str(peft["init_lora_weights"]).lower()
    other = "use true, gaussian, orthogonal or eva, or pissa, olora, corda and lora_ga for sft and pretrain without"
    other += " quantization"
    for key in ("eva_config", "corda_config", "lora_ga_config"):
        if peft[key] is not None and key != f"{name}_config":
            yield ("peft", key), f"it has no effect with init_lora_weights: {name}", "remove the key"
    if name == "loftq" and not quantization["load_in_4bit"]:
        found = "loftq begins with what the base loses in 4 bits, and this base is not quantized to 4 bits"
        yield path, found, "add quantization: {load_in_4bit: true, ...}, or use another initialisation"
    elif name == "loftq" and peft["use_dora"]:
        yield path, "loftq changes the adapter after DoRA has measured it", "remove one of them"
    elif name.startswith("pissa_niter_") and int(name.removeprefix("pissa_niter_")) > MOST_ITERATIONS:
        yield path, f"{name} would iterate for hours", f"take about 4, at most {MOST_ITERATIONS}"
    for key in ("kasa_config", "layer_replication", "bias") if stage.reference else ():
        if peft[key] not in (None, "none"):
            yield ("peft", key), "it changes the base itself: the reference would not be the base", "remove the key"
    if alters_base(peft):
        found = f"{name} takes a part of the base's weights into the adapter"
        if stage.reference:
            yield path, f"{found}: with the adapter disabled, the reference would not be the base", other
        elif quantization:
            yield path, f"{found}: put back into quantized weights, the result would not be what was trained", other
        elif beside := [key for key in ("modules_to_save", "trainable_token_indices") if peft[key]]:
            yield path, f"{found}: it can't be put back beside {beside[0]}", "remove one of them"
        elif unfreeze or peft["bias"] != "none":
            beside_it = "unfreeze" if unfreeze else f"bias: {peft['bias']}"
            yield path, f"{found}: it can't be put back beside {beside_it}", "remove one of them"
        elif peft["use_dora"] or (peft["use_rslora"] and (peft["rank_pattern"] or peft["alpha_pattern"])):
            mixed = "use_dora" if peft["use_dora"] else "use_rslora with rank_pattern or alpha_pattern"
            yield path, f"{found}, which PEFT can't put back with {mixed}", "take one of them"


def prompt_learning(model: ModelSection, peft: UpstreamSection, training: UpstreamSection) -> Found:
    """Virtual tokens stand before every row, and know nothing of several documents in it.

    Source: PEFT 0.21, PeftModelForCausalLM.forward drops `position_ids`, by which packed documents are told apart; with
    activation checkpointing, transformers 5.23 keeps no cache, in which prefix tuning and cartridges put theirs.
    """
    name = str(peft["method"])
    if not peft or not METHODS[name].is_prompt:
        return
    for key in ("packing", "padding_free", "eval_packing"):
        if training[key]:
            found = f"{name} puts its tokens before a row, not before each document that is packed into it"
            yield ("training", key), found, "set it to false"
    if name in ("prefix_tuning", "cartridge") and training["activation_checkpointing"] is not False:
        found = f"{name} needs the model's cache, which activation checkpointing (TRL's default) turns off"
        yield ("training", "activation_checkpointing"), found, "set it to false"
    for key, needs, value in (
        ("prompt_tuning_init_text", "prompt_tuning_init", "TEXT"),
        ("encoder_hidden_size", "prefix_projection", True),
    ):
        if peft.said.get(key) is not None and needs in peft.defaults and peft[needs] != value:
            told = "true" if value is True else value
            yield ("peft", key), f"it has no effect without {needs}: {told}", f"add '{needs}: {told}', or remove it"
    tokens, length = peft["num_virtual_tokens"], training["max_length"]
    if tokens and length and tokens >= length:
        found = f"{tokens:,} virtual tokens, before rows of at most {length:,} (training.max_length)"
        yield ("peft", "num_virtual_tokens"), found, "20 to 100 are usual"
    words = len(str(peft.said.get("prompt_tuning_init_text") or "").split())
    if tokens and words > tokens:  # a word is a token at least; how many there are, training says
        found = f"a text of {words} words, of which {tokens} virtual tokens can't hold the end: PEFT cuts it off"
        yield ("peft", "prompt_tuning_init_text"), found, f"set num_virtual_tokens to {2 * words}, or write less"
    if not tokens and not model.adapter:
        yield ("peft",), f"{name} needs num_virtual_tokens", "add 'num_virtual_tokens: 20'"


def _trains_modules(peft: UpstreamSection) -> bool:
    """Whether a method can train whole modules of the base beside its own parameters."""
    return "modules_to_save" in peft.defaults and not METHODS[str(peft["method"])].is_prompt


def unfreeze_beside(unfreeze: Sequence[str], peft: UpstreamSection) -> Found:
    """Parts of the base are trained beside an adapter as PEFT's `modules_to_save`, which not every method has."""
    if unfreeze and peft and not _trains_modules(peft):
        found = f"{peft['method']} trains nothing of the base beside it: PEFT 0.21 has no modules_to_save for it"
        yield ("unfreeze",), found, "remove the key, or take another method: lora"


def placement(peft: UpstreamSection) -> Found:
    """Targets of one's own leave nothing to say of where in a layer adapters are placed."""
    if "placement" in peft.said and peft["target_modules"]:
        yield (
            ("peft", "placement"),
            "it has no effect: target_modules says where the adapters are",
            "remove one of them",
        )


def method_on_quantized(quantization: UpstreamSection, peft: UpstreamSection) -> Found:
    """A method that wraps linear layers needs a layer for quantized ones. Source: PEFT 0.21, tuners/*/bnb.py."""
    if quantization and peft and not METHODS[str(peft["method"])].quantized:
        able = ", ".join(method.name for method in METHODS.values() if method.quantized and not method.tried)
        found = f"PEFT 0.21 has no layer of {peft['method']} for quantized weights"
        yield ("peft", "method"), found, f"remove quantization, or take one of {able}"


def allocation(model: ModelSection, peft: UpstreamSection, steps: int) -> Found:
    """AdaLoRA moves ranks between its first and its last phase, and drops some: else it is LoRA of another name.

    Args:
        model: One that continues from an adapter keeps that one's ranks.
        peft: The adapter.
        steps: Of the run; 0 or less when they are not known yet.
    """
    if peft["method"] != "adalora" or model.adapter:
        return
    begin, end = peft["init_r"], peft["target_r"]
    if end >= begin:
        found = f"{end} on average at the end, and {begin} at the beginning (init_r): no rank would be dropped"
        yield ("peft", "target_r"), found, f"set it to about half of init_r, or init_r to about {end * 3 // 2}"
    if steps <= 0:
        return
    if peft["total_step"] not in (None, steps):
        found = f"{peft['total_step']:,}, but the run has {steps:,} steps"
        yield ("peft", "total_step"), found, "remove the key: the runner fills it in"
    elif max(peft["tinit"], 1) + peft["tfinal"] >= steps:  # PEFT 0.21 judges by a step before the one that it moves in
        found = f"{peft['tinit']:,} steps before ranks are moved (tinit) and {peft['tfinal']:,} after it (tfinal)"
        yield ("peft", "tinit"), f"{found} leave none of {steps:,}: no rank would be moved", "lower them"


def adapter_folder(model: ModelSection) -> Found:
    """What training continues from is an adapter, of a run that completed. Hub ids are looked up later."""
    folder = Path(model.adapter or "")
    if not folder.is_absolute():
        return
    runs = [run for run in list_runs(folder) if read_status(run) == "completed"]
    if not folder.is_dir():
        yield PLACE, f"there is no folder {folder}", ""
    elif runs:
        yield PLACE, f"{folder} holds runs, and is none itself", f"name one of them; the newest is {runs[-1].name}"
    elif (folder / "model" / "config.json").is_file() or (folder / "config.json").is_file():
        whole = folder / "model" if (folder / "model").is_dir() else folder
        yield PLACE, f"{folder} has no adapter: all weights were trained", f"set model.name_or_path to {whole}"
    elif not all((folder / name).is_file() for name in (CONFIG, WEIGHTS)):
        told = f"{folder} has no adapter ({CONFIG} and {WEIGHTS})"
        run = (folder / "status.json").is_file() and f"the run is {read_status(folder)}: --resume continues it"
        yield PLACE, told, run or "name a run folder or an adapter"
    elif not read_adapter_config(folder):
        yield PLACE, f"{folder / CONFIG} is damaged", "train it again, or copy it again"
    elif (folder.parent / "status.json").is_file() and read_status(folder.parent) != "completed":
        yield PLACE, f"the run in {folder.parent} is {read_status(folder.parent)}", f"--resume {folder.parent}"


def new_tokens(stage: Stage, model: ModelSection, peft: UpstreamSection, unfreeze: Sequence[str]) -> Found:
    """The embeddings of new tokens are trained, and are those of the reference, too."""
    key = "add_tokens" if model.add_tokens else "add_special_tokens"
    if not model.adds_tokens:
        return
    if both := sorted(set(model.add_tokens) & set(model.add_special_tokens)):
        yield ("model", "add_special_tokens"), f"'{both[0]}' is in add_tokens, too", "name it once"
    if peft and not _trains_modules(peft):
        found = f"model.{key} makes new embeddings, and {peft['method']} trains none of the base's"
        yield ("peft", "method"), found, "take method: lora, with modules_to_save"
    elif peft and not peft["modules_to_save"] and not unfreeze and not model.adapter:
        fix = "add the model's embeddings and head, for most models modules_to_save: [embed_tokens, lm_head]"
        yield ("peft",), f"model.{key} makes new embeddings, and the adapter would not train them", fix
    if stage.reference and not peft:
        found = "the reference is loaded without the new tokens"
        yield ("model", key), found, "add them in a stage sft before, or train an adapter"


def adapter_needs_peft(model: ModelSection, peft: UpstreamSection) -> Found:
    """A recipe that trains an adapter says so, also when it continues from one."""
    if model.adapter and not peft:
        fix = "add 'peft: {method: lora}': what it leaves out comes from the adapter"
        yield PLACE, "the adapter is trained on, but peft is missing", fix


def why_not_continued(stage: Stage, method: str, projection: bool, quantized: bool) -> tuple[str, str]:
    """Why an adapter of a method can't be trained further in a stage, and what to do; empty when it can.

    Source: PEFT 0.21, peft_model.py, get_prompt_embedding_to_save; tuners/adalora/model.py, _check_new_adapter_config;
    tuners/randlora/model.py, _create_new_module.
    """
    if method in ("p_tuning", "cartridge") or (method == "prefix_tuning" and projection):
        what = "cache" if method == "cartridge" else "network that made the prompt"
        return f"PEFT 0.21 does not save the {what} of {method} so that it can be trained", "start a new adapter"
    if stage.reference and (method == "adalora" or (method in ("randlora", "pvera") and quantized)):
        fix = "use the adapter of another method, or start a new one"
        where = " on quantized weights" if quantized else ""
        return f"PEFT 0.21 has no second {method} adapter{where}, and {stage.name} needs one as its reference", fix
    return "", ""


def adapter_continuation(stage: Stage, model: ModelSection, quantization: UpstreamSection) -> Found:
    """Not every adapter can be trained further."""
    config = read_adapter_config(Path(model.adapter or ""))
    method = str(config.get("peft_type", "")).lower()
    message, fix = why_not_continued(stage, method, bool(config.get("prefix_projection")), bool(quantization))
    if config.get("task_type") == "SEQ_CLS" and not stage.scores:
        yield PLACE, "the adapter is a reward model's: it gives numbers, and writes no text", "take the one before it"
    elif message:
        yield PLACE, message, fix


def adapter_base(model: ModelSection) -> Found:
    """An adapter fits the base that it was trained on: the same name, or the same weights at another place."""
    folder, name = Path(model.adapter or ""), model.name_or_path
    trained_on = read_adapter_config(folder).get("base_model_name_or_path")
    if not trained_on or trained_on == name:
        return
    recorded = recorded_base(folder)
    if recorded and model.folder and recorded == hash_weights(model.folder):
        return
    moved = Path(trained_on).is_absolute() and not Path(trained_on).exists()
    message = f"the adapter was trained on {trained_on}{', which is no longer there' * moved}; the base here is {name}"
    if not recorded:
        fix = f"take its base; if this is the same model, set base_model_name_or_path in {folder / CONFIG}"
    else:
        fix = "these weights are others: " + ("find its base" if moved else f"set model.name_or_path to {trained_on}")
    yield ("model", "name_or_path"), message, fix


def adapter_config(model: ModelSection, peft: UpstreamSection) -> Found:
    """What `peft` says of an adapter that is there already must be true of it."""
    config, section = read_adapter_config(Path(model.adapter or "")), peft.said
    if not config or not section:
        return
    if str(config.get("peft_type", "")).lower() != section["method"]:
        yield ("peft", "method"), f"the adapter is of the method {str(config.get('peft_type')).lower()}", ""
        return
    for key, value in section.items():
        if key not in _FREE and "dropout" not in key and key in config and _as_set(value) != _as_set(config[key]):
            yield ("peft", key), f"{value}, but the adapter has {config[key]}", "remove the key: the adapter says it"
    targets, own = section.get("target_modules"), config.get("target_modules")
    if targets is not None and targets != "all-linear" and _as_set(targets) != _as_set(own):
        told = ", ".join(own) if isinstance(own, list) else own
        yield ("peft", "target_modules"), f"the adapter has {told}", "remove the key: the adapter says it"


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The configuration of a local adapter; empty when there is none that can be used: `adapter_folder` says why."""
    config = read_object(folder / CONFIG)
    if not isinstance(config.get("base_model_name_or_path", ""), str | None):
        return {}
    targets = config.get("target_modules")
    named = targets if isinstance(targets, list) else [targets or ""]
    return config if all(isinstance(name, str) for name in named) else {}


def recorded_base(adapter: Path) -> str | None:
    """The hash of the base's weights that the run of an adapter recorded."""
    base = read_object(adapter.parent / "environment.json").get("base_model")  # of a run of ours
    return base.get("weights") if isinstance(base, dict) else None


def _as_set(value: Any) -> Any:
    """PEFT saves sets of names as lists, in any order."""
    names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return set(value) if names else value
