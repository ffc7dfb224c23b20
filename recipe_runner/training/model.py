"""The tokenizer, the model's configuration, the adapter and the quantization: everything about a model but its weights."""

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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from recipe_runner.errors import UserError, user_error
from recipe_runner.recipe import Recipe
from recipe_runner.validate import suggest

METHODS = {"lora": LoraConfig}


def find_model(recipe: Recipe) -> None:
    """Checks that the base model is there: its folder, or its configuration on the hub (or in the hub's cache).

    Raises:
        UserError: There is no such model, or it can't be reached.
    """
    name, revision = recipe.values["model"]["name_or_path"], recipe.values["model"]["revision"]
    fix = ""
    if Path(name).is_absolute():
        if (Path(name) / "config.json").is_file():
            return
        what = "the folder has no config.json" if Path(name).is_dir() else "there is no such folder"
        fix = "`make model` fetches the demo model" if Path(name).name == "SmolLM2-135M-Instruct" else ""
        raise _model_error("model-not-found", recipe, f"{name}: {what}", fix)
    try:
        hf_hub_download(name, "config.json", revision=revision)
    except GatedRepoError as error:
        raise _model_error(
            "model-not-found", recipe, f"{name} is gated", "ask for access on its page, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise _model_error(
            "model-not-found",
            recipe,
            f"{name} is not on the hub, or is private",
            "check the name; for a private model `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise _model_error(
            "model-not-found", recipe, f"{name} has no revision '{revision}'", "check model.revision"
        ) from error
    except LocalEntryNotFoundError as error:
        raise _model_error(
            "hub-unreachable",
            recipe,
            f"{name} is not in the local cache, and the hub can't be reached",
            "check the network, or give a local folder: --set model.name_or_path=FOLDER",
        ) from error
    except (EntryNotFoundError, HFValidationError) as error:
        raise _model_error("model-not-found", recipe, f"{name}: no config.json", "check the name") from error
    except (HfHubHTTPError, OSError) as error:
        raise _model_error(
            "hub-unreachable",
            recipe,
            f"{name}: {str(error).splitlines()[0]}",
            "check the network, or give a local folder",
        ) from error


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Loads the tokenizer with the chat template that is trained with, which is also the one saved with the result.

    Raises:
        UserError: The tokenizer can't be loaded, or its template can't mark the assistant's tokens.
    """
    model, dataset, training = recipe.values["model"], recipe.values["dataset"], recipe.values["training"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model["name_or_path"], revision=model["revision"], trust_remote_code=model["trust_remote_code"]
        )
    except (OSError, ValueError) as error:
        raise _model_error(
            "tokenizer-not-found", recipe, _first_line(error), "the model's folder needs its tokenizer files"
        ) from error
    eos = training.get("eos_token")
    if eos is not None:
        if eos not in tokenizer.get_vocab():
            raise user_error(
                "unknown-token",
                f"'{eos}' is not in the tokenizer's vocabulary",
                "",
                recipe.mark("training", "eos_token"),
                "training.eos_token",
            )
        tokenizer.eos_token = eos
    if tokenizer.eos_token is None:
        raise user_error(
            "no-eos-token",
            "the tokenizer has no end-of-sequence token: the model would not learn to stop",
            "set training.eos_token",
            recipe.mark("model"),
            "model",
        )
    if dataset["format"] == "text" or "template" in dataset:
        return tokenizer
    if "chat_template_path" in training:
        tokenizer.chat_template = Path(training["chat_template_path"]).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        fix = "use an instruct model, set training.chat_template_path, or dataset.template for plain text"
        raise user_error(
            "no-chat-template",
            f"the tokenizer of {model['name_or_path']} has no chat template",
            fix,
            recipe.mark("dataset", "format"),
            "dataset.format",
        )
    if dataset["train_on"] == "assistant" and not has_generation_markers(tokenizer.chat_template):
        try:
            tokenizer.chat_template = get_training_chat_template(tokenizer)
        except ValueError as error:
            message = "the chat template does not mark the assistant's tokens ({% generation %}), and TRL has no training version of it"
            fix = "set training.chat_template_path to a template with the marks, or train_on: completion (the last turn) or all"
            raise user_error(
                "no-generation-marks", message, fix, recipe.mark("dataset", "train_on"), "dataset.train_on"
            ) from error
    return tokenizer


def load_model_config(recipe: Recipe) -> PretrainedConfig:
    """Loads the configuration of the base model.

    Raises:
        UserError: It can't be read, or the architecture is unknown.
    """
    model = recipe.values["model"]
    try:
        return AutoConfig.from_pretrained(
            model["name_or_path"], revision=model["revision"], trust_remote_code=model["trust_remote_code"]
        )
    except (OSError, ValueError, KeyError) as error:
        raise _model_error("model-config", recipe, _first_line(error), "") from error


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
            (hint for hint in (hints[key], *typing.get_args(hints[key])) if dataclasses.is_dataclass(hint)),
            None,
        )
        if nested and isinstance(value, dict):
            section[key] = nested(**value)
    try:
        return cls(task_type="CAUSAL_LM", **section)
    except (ValueError, TypeError, ImportError) as error:
        raise user_error("peft-refused", _first_line(error), "", recipe.mark("peft"), "peft") from error


def check_targets(recipe: Recipe, peft_config: PeftConfig, model_config: PretrainedConfig) -> None:
    """Checks on a model without weights that every target matches a module.

    PEFT errs only if no target at all matches: a Llama-style list silently adapts a part of Phi-3, whose projections are fused.

    Raises:
        UserError: A target, or a module to save, matches nothing.
    """
    architecture = getattr(transformers, (model_config.architectures or [""])[0], None)
    with torch.device("meta"):
        model = (
            architecture._from_config(model_config)
            if architecture
            else AutoModelForCausalLM.from_config(model_config)
        )
    modules = dict(model.named_modules())
    leaves = sorted(
        {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    )
    wanted: dict[str, Any] = {"modules_to_save": peft_config.modules_to_save or []}
    targets = peft_config.target_modules
    if targets != "all-linear" and targets is not None:
        wanted["target_modules"] = [targets] if isinstance(targets, str) else sorted(targets)
    for key, names in wanted.items():
        for name in names:
            one = LoraConfig(
                target_modules=name if isinstance(targets, str) and key == "target_modules" else [name],
                exclude_modules=peft_config.exclude_modules,
            )
            if not any(
                check_target_module_exists(one, module) is True
                or isinstance(check_target_module_exists(one, module), re.Match)
                for module in modules
            ):
                message = f"'{name}' matches no module of {model_config.architectures[0]}; its linear modules: {', '.join(leaves)}"
                hint = suggest(name, leaves) or "use target_modules: all-linear"
                raise user_error("target-not-found", message, hint, recipe.mark("peft", key), f"peft.{key}")


def keep_4bit_weights_trainable(model: torch.nn.Module) -> int:
    """Stops bitsandbytes from repacking 4-bit weights on a CPU, and returns the number of layers.

    On CPUs with AVX512-BF16 the first forward in evaluation mode without gradients repacks the weights, and from then on no
    gradient flows through the layer: training after an evaluation learns nothing, and says nothing.
    Source: bitsandbytes/nn/modules.py 0.50.2, Linear4bit.forward. `test_model.py` tells when it is mended.
    """
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def _model_error(code: str, recipe: Recipe, message: str, suggestion: str) -> UserError:
    return user_error(code, message, suggestion, recipe.mark("model", "name_or_path"), "model.name_or_path")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
