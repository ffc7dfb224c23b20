"""What a recipe trains on: the configuration of its model, the precision, and its largest batches."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils.hub import cached_file

from recipe_runner.data.place import KEYS, store_folder
from recipe_runner.files import read_object
from recipe_runner.model.base import load_model_config
from recipe_runner.model.precision import decide_precision
from recipe_runner.plan.device import Device
from recipe_runner.plan.memory import Setting
from recipe_runner.plan.step import Batch
from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.problems.words import suggest
from recipe_runner.recipe.models import ModelFacts, find_facts
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.sections import ModelSection

PLACE = ("model", "name_or_path")
SEEING = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
# The most that a configuration may say: beyond it a number is a mistake, or an attack.
MOST = {"hidden_size": 2**20, "num_hidden_layers": 2000, "vocab_size": 2**24, "num_attention_heads": 2**12}
MOST_TOKENS = 2**24  # of a batch
UNKNOWN_PROMPT = 512  # tokens of a prompt, where no data is prepared


def find_config(model: ModelSection, file: Path | None, scores: bool = False) -> PretrainedConfig:
    """The configuration of a recipe's model, without the hub: from a file, its folder, the shelf's facts or the cache.

    Raises:
        UserError: Nothing is known of it, or it needs code of its own.
    """
    if file:
        config = _read_config(file, model)
    elif not _is_here(model) and (facts := find_facts(model.name_or_path)):
        config = build_config(model, facts)
    else:
        folder = model.folder or _find_cached(model)
        if folder is None:
            message = f"nothing is known of {model.name_or_path} here: it is not in recipes/models.json, and not cached"
            fix = "download its config.json alone, and name it: --model-config config.json"
            raise user_error("model-facts-missing", message, fix, path=PLACE)
        refuse_remote_code(model, read_object(folder / "config.json"))
        config = load_model_config(replace(model, name_or_path=str(folder)), scores)
    if scores:
        config.num_labels = 1
    if model.attn_implementation == "eager":
        config.get_text_config()._attn_implementation = "eager"
    return config  # any other attention is a fused kernel, for which PyTorch's own stands


def _is_here(model: ModelSection) -> bool:
    """Whether the model is a local folder with a configuration, which comes before what the shelf says of its name."""
    return bool(model.folder and (model.folder / "config.json").is_file())


def build_config(model: ModelSection, facts: ModelFacts) -> PretrainedConfig:
    """The configuration of a model that the shelf has facts of, at its real size.

    Raises:
        UserError: transformers does not know the architecture, or it generates no text.
    """
    if facts.model_type not in CONFIG_MAPPING_NAMES:
        message = f"recipes/models.json, {facts.name}: transformers knows no architecture '{facts.model_type}'"
        fix = suggest(facts.model_type, list(CONFIG_MAPPING_NAMES)) or "model_type is what its config.json says"
        raise user_error("model-config", message, fix, path=PLACE)
    try:
        config = AutoConfig.for_model(facts.model_type, **facts.config)
    except Exception as error:  # numbers of a file that anybody may have written
        message = f"recipes/models.json, {facts.name}: {facts.model_type}: {first_line(error)}"
        raise user_error("model-config", message, "check its config there", path=PLACE) from error
    text = config.get_text_config()
    seeing = SEEING.get(facts.model_type) if text is not config else None
    if not seeing and text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        message = f"{facts.name}: the architecture {facts.model_type} is no language model that generates text"
        raise user_error("model-config", message, path=PLACE)
    if model.attn_implementation:
        text._attn_implementation = model.attn_implementation
    config.architectures = [seeing or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
    return config


def refuse_remote_code(model: ModelSection, config: Mapping[str, Any]) -> None:
    """Refuses a model that brings its own code, unless the recipe allows it.

    Raises:
        UserError: It does.
    """
    if config.get("auto_map") and not model.trust_remote_code:
        message = f"{model.name_or_path} brings code of its own (auto_map in config.json), which is not run"
        fix = "take a model that transformers knows, or set model.trust_remote_code: true and a pinned revision"
        raise user_error("remote-code", message, fix, path=PLACE)


def _read_config(file: Path, model: ModelSection) -> PretrainedConfig:
    """A `config.json` that the user names."""
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise user_error("unreadable-file", f"{file}: {error.strerror}", "check the path") from error
    except (ValueError, RecursionError) as error:
        raise user_error("model-config", f"{file} is no JSON: {first_line(error)}", "name a config.json") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        fix = (
            suggest(str(kind), list(CONFIG_MAPPING_NAMES)) or "name the config.json of a model that transformers knows"
        )
        if isinstance(values, dict) and values.get("auto_map"):
            fix = "it brings code of its own, which is not run: no plan can be made of it"
        raise user_error("model-config", f"{file}: transformers knows no model_type {kind!r}", fix)
    refuse_remote_code(model, values)
    named = (values.get("architectures") or [None])[0] if isinstance(values.get("architectures"), list) else None
    if named and named not in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *SEEING.values()):
        raise user_error("model-config", f"{file}: {named} is no language model that generates text", "")
    try:
        config = AutoConfig.for_model(**{"model_type": kind, **{k: v for k, v in values.items() if k != "model_type"}})
        text = config.get_text_config()
        for name in MOST:
            getattr(text, name, None)  # some have a number for each layer, and say so
    except Exception as error:  # numbers of the user's file
        raise user_error("model-config", f"{file}: {first_line(error)}", "check it") from error
    seeing = SEEING.get(kind) if text is not config else None
    if not seeing and text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise user_error("model-config", f"{file}: {kind} is no language model that generates text", "")
    _check_sizes(file, values, text)
    config.architectures = [seeing or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
    return config


def _check_sizes(file: Path, values: Mapping[str, Any], text: PretrainedConfig) -> None:
    """Checks that a configuration says how large the model is, in numbers that a model can have.

    Raises:
        UserError: It does not; transformers would take its own defaults.
    """
    said = {**values, **values["text_config"]} if isinstance(values.get("text_config"), dict) else values
    for name, most in MOST.items():
        own = text.attribute_map.get(name, name)
        if own not in said and name not in said:
            if name in ("hidden_size", "num_hidden_layers"):
                raise user_error("model-config", f"{file} does not say {own}", "name the whole config.json")
            continue
        size = getattr(text, name, None)
        if not isinstance(size, int) or not 0 < size <= most:
            raise user_error("model-config", f"{file}: {own} is {size!r}, not a number from 1 to {most:,}", "check it")
    heads, shared = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and shared and heads % shared:
        message = f"{file}: {heads} heads can't be shared by {shared} heads of keys and values"
        raise user_error("model-config", message, "check it")


def _find_cached(model: ModelSection) -> Path | None:
    """The folder of the hub's cache that has the model's configuration."""
    try:
        found = cached_file(model.name_or_path, "config.json", revision=model.revision, local_files_only=True)
    except (OSError, ValueError):  # it is not there
        return None
    return Path(found).parent if found else None


def choose_setting(recipe: Recipe, config: PretrainedConfig, device: Device, known: Mapping[str, Any]) -> Setting:
    """The precision and the largest batches of a recipe on a device.

    Args:
        recipe: The recipe.
        config: Of its model.
        device: What it is trained on.
        known: Split -> its accounting, where the data is prepared.
    """
    precision = decide_precision(recipe.training, recipe.model.dtype, bool(recipe.peft), device.bf16)
    dtype: Any = config.dtype if precision.dtype == "auto" else getattr(torch, precision.dtype)
    mixed = torch.bfloat16 if precision.bf16 else torch.float16 if precision.fp16 else None
    training = recipe.training
    held_out = None
    if recipe.dataset.has_eval and training["eval_strategy"] not in (None, "no"):
        held_out = find_batch(recipe, config, known.get("eval", {}), training["per_device_eval_batch_size"], True)
    batch = find_batch(recipe, config, known.get("train", {}), training["per_device_train_batch_size"], False)
    if batch.tokens > MOST_TOKENS:
        message = f"{batch.rows:,} sequences of {batch.length:,} tokens are more than any device takes at a time"
        fix = "take a smaller batch, and accumulate: gradient_accumulation_steps"
        raise user_error("batch-too-large", message, fix, path=("training", "per_device_train_batch_size"))
    continued = bool(recipe.model.adapter)
    return Setting(config, device, dtype or torch.bfloat16, mixed, batch, held_out, continued)


def find_batch(
    recipe: Recipe, config: PretrainedConfig, accounting: Mapping[str, Any], rows: int, evaluating: bool
) -> Batch:
    """The largest batch: as many tokens as the longest row has, in every row.

    Args:
        recipe: The recipe.
        config: Of its model.
        accounting: Of the prepared rows; empty where they are not.
        rows: Rows of a batch, as the recipe says.
        evaluating: Whether it is of evaluation.
    """
    training = recipe.training
    rows = rows or 8
    longest = int((accounting.get("lengths") or {}).get("max") or 0)
    if recipe.stage.generates:
        answer = int(training["max_completion_length"] or 256)
        return Batch(rows, (longest or UNKNOWN_PROMPT) + answer, answer, padded=rows > 1, answer=answer)
    context = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 2048)
    most = training["max_length"] or context
    packs = training["eval_packing"] if evaluating and training["eval_packing"] is not None else training["packing"]
    flat = bool(packs or training["padding_free"])
    length = most if packs or not longest else min(longest, most)
    share = accounting.get("supervised_tokens", 0) / max(accounting.get("tokens", 0), 1) if accounting else 1.0
    supervised = max(1, min(length - 1, round(length * share)))
    if not flat and accounting and recipe.stage.sequences == 1:
        supervised = length - 1  # of the longest row it may be all; of a pair it is the answers
    doubled = recipe.stage.sequences
    return Batch(rows * doubled, length, supervised, flat=flat, padded=not flat and rows * doubled > 1)


def find_prepared(recipe: Recipe) -> dict[str, Any]:
    """The accounting of a recipe's data, where it is prepared: the newest of its sources and settings."""
    dataset = json.loads(json.dumps(asdict(replace(recipe.dataset, max_dropped=0, workers=None))))
    wanted = {key: recipe.training[key] for key in KEYS if recipe.training[key] is not None}
    found: dict[str, Any] = {}
    newest = 0.0
    for file in store_folder().glob("*/manifest.json"):
        made_from = read_object(file).get("made_from")
        if not isinstance(made_from, dict) or made_from.get("stage") != recipe.stage.name:
            continue
        training = made_from.get("training") or {}
        same = all(training.get(key) == value for key, value in wanted.items())
        same = same and made_from.get("dataset") == dataset and made_from.get("seed") == recipe.run.seed
        if same and file.stat().st_mtime > newest:
            newest, found = file.stat().st_mtime, read_object(file.parent / "accounting.json")
    return {split: told for split, told in found.items() if not told.get("streamed")}  # whose longest row is not known
