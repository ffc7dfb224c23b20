"""Everything about a model but its weights: tokenizer, configuration, adapter, quantization."""

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from recipe_runner.model import templates
from recipe_runner.problems.errors import UserError, first_line
from recipe_runner.recipe.new import write_new
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.validate import suggest

METHODS = {"lora": LoraConfig}


# Why the hub did not give a configuration, first match wins: code, what happened, what to do.
HUB_ERRORS = (
    (GatedRepoError, "model-not-found", "the model is gated", "ask for access on its page, then `hf auth login`"),
    (RepositoryNotFoundError, "model-not-found", "not on the hub, or private", "check the name, or `hf auth login`"),
    (RevisionNotFoundError, "model-not-found", "there is no such revision", "check model.revision"),
    (LocalEntryNotFoundError, "hub-unreachable", "not in the local cache, and the hub can't be reached", ""),
    (EntryNotFoundError, "model-not-found", "the repository has no config.json", "check the name"),
    (HFValidationError, "model-not-found", "neither a folder nor a hub id", "check the name"),
    (Exception, "hub-unreachable", "the hub did not answer", ""),
)


def find_model(recipe: Recipe) -> None:
    """Checks that the base model is there: its folder, or its configuration on the hub (or in the hub's cache).

    Raises:
        UserError: There is no such model, or it can't be reached.
    """
    name, place = recipe.values["model"]["name_or_path"], ("model", "name_or_path")
    if Path(name).is_absolute():
        if (Path(name) / "config.json").is_file():
            return
        what = "the folder has no config.json" if Path(name).is_dir() else "there is no such folder"
        fix = "`make model` makes the demo model" if "SmolLM2-135M-Instruct" in name else ""
        raise recipe.error("model-not-found", f"{name}: {what}", fix, *place)
    try:
        hf_hub_download(name, "config.json", revision=recipe.values["model"]["revision"])
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        code, what, fix = next(row[1:] for row in HUB_ERRORS if isinstance(error, row[0]))
        fix = fix or "check the network, or use a local folder: --set model.name_or_path=FOLDER"
        raise recipe.error(code, f"{name}: {what}", fix, *place) from error


def load_tokenizer(recipe: Recipe, before: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer with the chat template that is trained with, which is also the one saved with the result.

    Args:
        recipe: A resolved recipe.
        before: The tokenizer of what is trained further: its chat template and end-of-sequence token go on, unless the
            recipe says otherwise.

    Raises:
        UserError: The tokenizer can't be loaded, or its template can't mark the assistant's tokens.
    """
    dataset, training = recipe.values["dataset"], recipe.values["training"]
    tokenizer = _read_tokenizer(recipe)
    if before is not None and training.get("chat_template_path") is None and before.chat_template:
        tokenizer.chat_template = before.chat_template
    if before is not None and before.eos_token in tokenizer.get_vocab():
        tokenizer.eos_token = before.eos_token
    if training.get("eos_token") is not None:
        if training["eos_token"] not in tokenizer.get_vocab():
            message = f"'{training['eos_token']}' is not in the tokenizer's vocabulary"
            raise recipe.error("unknown-token", message, "", "training", "eos_token")
        tokenizer.eos_token = training["eos_token"]
    if tokenizer.eos_token is None:
        message = "the tokenizer has no end-of-sequence token: the model would not learn to stop"
        raise recipe.error("no-eos-token", message, "set training.eos_token", "model", "name_or_path")
    if dataset["format"] == "text" or "template" in dataset:
        return tokenizer
    if not tokenizer.chat_template:
        fix = "use an instruct model, set training.chat_template_path, or dataset.template for plain text"
        raise recipe.error("no-chat-template", "the tokenizer has no chat template", fix, "dataset", "format")
    if dataset.get("train_on") == "assistant" and not has_generation_markers(tokenizer.chat_template):
        try:
            tokenizer.chat_template = get_training_chat_template(tokenizer)
        except ValueError as error:
            raise _no_generation_marks(recipe, tokenizer) from error
    return tokenizer


def _read_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer, with the recipe's chat template if it names one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.values["model"]["name_or_path"], **_location(recipe))
    except (OSError, ValueError) as error:
        raise recipe.error("tokenizer-not-found", first_line(error), "", "model", "name_or_path") from error
    if (template := recipe.values["training"].get("chat_template_path")) is not None:
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    return tokenizer


def _no_generation_marks(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> UserError:
    """Says which template would serve: one of TRL's, or the tokenizer's own with a patch."""
    message = "the chat template has no {% generation %} marks, and TRL does not know it"
    own = "set training.chat_template_path to a template with the marks, or train_on: completion or all"
    if (file := templates.find_equivalent(tokenizer)) or templates.mark_generation(tokenizer):
        which = f"TRL's {file.name} renders the same text" if file else "a patched copy of it marks the answers"
        write = f"recipe-run preview {recipe.file} --write-template chat.jinja"
        own = f"{which}: `{write}`, then set training.chat_template_path: chat.jinja"
    return recipe.error("no-generation-marks", message, own, "dataset", "train_on")


def write_training_template(recipe: Recipe, file: Path) -> None:
    """Writes the chat template that marks the assistant's tokens, for `training.chat_template_path`.

    Raises:
        UserError: No such template is known, or the file is there already.
    """
    tokenizer = _read_tokenizer(recipe)
    if not tokenizer.chat_template:
        raise recipe.error("no-chat-template", "the tokenizer has no chat template", "", "model", "name_or_path")
    text = str(tokenizer.chat_template)
    if not has_generation_markers(text):
        try:
            text = str(get_training_chat_template(tokenizer))
        except ValueError as error:
            found = templates.find_equivalent(tokenizer)
            text = found.read_text(encoding="utf-8") if found else templates.mark_generation(tokenizer) or ""
            if not text:
                raise _no_generation_marks(recipe, tokenizer) from error
    write_new(file, text)


def load_model_config(recipe: Recipe) -> PretrainedConfig:
    """Loads the configuration of the base model.

    Raises:
        UserError: It can't be read, or the architecture is unknown.
    """
    try:
        return AutoConfig.from_pretrained(recipe.values["model"]["name_or_path"], **_location(recipe))
    except (OSError, ValueError, KeyError) as error:
        raise recipe.error("model-config", first_line(error), "", "model", "name_or_path") from error


def build_quantization(recipe: Recipe) -> BitsAndBytesConfig | None:
    """The BitsAndBytesConfig of a recipe; None when it does not quantize."""
    section = recipe.section("quantization")
    return BitsAndBytesConfig(**section) if section else None


def build_peft(recipe: Recipe) -> PeftConfig | None:
    """The PEFT configuration of a recipe; None for full fine-tuning.

    Raises:
        UserError: PEFT refuses the combination of fields.
    """
    section = recipe.section("peft")
    if not section:
        return None
    cls = METHODS[section.pop("method")]
    hints = typing.get_type_hints(cls)
    for key, value in section.items():
        nested = next(
            (hint for hint in (hints[key], *typing.get_args(hints[key])) if dataclasses.is_dataclass(hint)), None
        )
        if nested and isinstance(value, dict):
            section[key] = nested(**value)
    try:
        return cls(task_type="CAUSAL_LM", **section)
    except (ValueError, TypeError, ImportError) as error:
        raise recipe.error("peft-refused", first_line(error), "", "peft") from error


def build_empty(recipe: Recipe, model_config: PretrainedConfig) -> Any:
    """The base model without weights.

    Raises:
        UserError: transformers can't build it.
    """
    architecture = getattr(transformers, (model_config.architectures or [""])[0], None)
    trust = recipe.values["model"]["trust_remote_code"]
    try:
        with torch.device("meta"):
            if architecture:
                return architecture(model_config)  # not _from_config, which with ZeRO-3 wants to fill the weights
            return AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust)
    except ValueError as error:
        raise recipe.error("model-config", first_line(error), "", "model", "name_or_path") from error


def check_targets(recipe: Recipe, peft_config: PeftConfig, model_config: PretrainedConfig) -> None:
    """Checks on a model without weights that every target matches a module.

    PEFT errs only if no target at all matches: a Llama-style list silently adapts a part of Phi-3, which fuses its own.

    Raises:
        UserError: A target, or a module to save, matches nothing.
    """
    modules = dict(build_empty(recipe, model_config).named_modules())
    linear = sorted({name.split(".")[-1] for name, module in modules.items() if isinstance(module, torch.nn.Linear)})
    targets = peft_config.target_modules
    if targets is None and model_config.model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        message = f"PEFT has no default targets for {model_config.model_type}"
        raise recipe.error("target-not-found", message, "add 'target_modules: all-linear'", "peft", "target_modules")
    wanted = [targets] if isinstance(targets, str) else [[name] for name in targets or ()]
    for target in wanted:
        if target == "all-linear":
            continue
        alone = LoraConfig(target_modules=target, exclude_modules=peft_config.exclude_modules)
        matches = [check_target_module_exists(alone, module) for module in modules]
        if not any(match is True or isinstance(match, re.Match) for match in matches):
            raise _no_match(recipe, "target_modules", target if isinstance(target, str) else target[0], linear)
    for name in peft_config.modules_to_save or []:
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            raise _no_match(recipe, "modules_to_save", name, linear)


def keep_4bit_weights_trainable(model: torch.nn.Module) -> int:
    """Stops bitsandbytes from repacking 4-bit weights on a CPU, and returns the number of layers.

    On CPUs with AVX512-BF16 the first forward in evaluation mode without gradients repacks the weights, and from then
    on no gradient flows through the layer: training after an evaluation learns nothing, and says nothing.
    Source: bitsandbytes/nn/modules.py 0.50.2, Linear4bit.forward. `test_model.py` tells when it is mended.
    """
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def _no_match(recipe: Recipe, key: str, name: str, linear: list[str]) -> UserError:
    message = f"'{name}' matches no module of the model; its linear modules: {', '.join(linear)}"
    return recipe.error("target-not-found", message, suggest(name, linear), "peft", key)


def _location(recipe: Recipe) -> dict[str, Any]:
    return {key: recipe.values["model"][key] for key in ("revision", "trust_remote_code")}
