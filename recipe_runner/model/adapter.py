"""A new adapter: its PEFT configuration, and whether its targets are modules of the model."""

import copy
import dataclasses
import re
import typing
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    ShiraConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from transformers.pytorch_utils import Conv1D

from recipe_runner.methods import METHODS
from recipe_runner.model.base import HEAD
from recipe_runner.model.bottleneck import BottleneckConfig
from recipe_runner.model.targets import check_adapted, check_named, is_called
from recipe_runner.problems.errors import first_line, refused, user_error
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.rules.adapter import CHANGING_BASE, FROM_DATA
from recipe_runner.recipe.sections import ModelSection
from recipe_runner.stages import load_class

SCORING = "SEQ_CLS"  # PEFT's task type of a model that gives each sequence a number
# Trained in float32 on a quantized base: scales near 1, and layers that convert nothing (PEFT 0.21, tuners/*/bnb.py).
PRECISE = ("ia3", "ln_tuning", "hira", "pvera", "road")
UNKNOWN_STEPS = 10**9  # of a run whose rows are not prepared yet: `total_step` of AdaLoRA until they are


def build_peft(section: Mapping[str, Any], task: str, model: ModelSection | None = None) -> PeftConfig | None:
    """The PEFT configuration that `peft` says, with PEFT's task type; None for full fine-tuning.

    Args:
        section: `peft` of the recipe.
        task: PEFT's task type of the stage.
        model: Its tokenizer reads the text that a prompt begins with.

    Raises:
        UserError: PEFT refuses the combination of fields.
    """
    if not section:
        return None
    fields = {key: value for key, value in section.items() if key != "method"}
    cls = load_class(METHODS[section["method"]].config)
    hints: dict[str, Any] = typing.get_type_hints(cls)
    if (begun := fields.get("init_lora_weights")) in FROM_DATA:
        fields.setdefault(f"{begun}_config", {})  # PEFT warns where it is left out
    for key, value in fields.items():
        nested: Any = next(
            (hint for hint in (hints[key], *typing.get_args(hints[key])) if dataclasses.is_dataclass(hint)), None
        )
        if nested and isinstance(value, dict):
            try:
                fields[key] = nested(**value)
            except (ValueError, TypeError) as error:
                raise user_error("peft-refused", first_line(error), path=("peft", key)) from error
    if "total_step" in hints:
        fields["total_step"] = fields.get("total_step") or UNKNOWN_STEPS
    if fields.get("init_lora_weights") == "loftq":
        fields["init_lora_weights"] = True  # put in place by training/calibration.py
    if task == SCORING and "modules_to_save" in hints:  # the head is new: it is trained, and saved with the adapter
        fields["modules_to_save"] = list(dict.fromkeys([*(fields.get("modules_to_save") or ()), HEAD]))
    if model and fields.get("prompt_tuning_init") == "TEXT":
        fields |= {"tokenizer_name_or_path": model.name_or_path, "tokenizer_kwargs": {"revision": model.revision}}
    try:
        return cls(task_type=task, **fields)
    except (ValueError, TypeError, ImportError) as error:
        raise refused("peft", section, error) from error


def check_new_tokens(peft_config: Any, empty: Any) -> None:
    """Checks that the embeddings of new tokens, in and out, are trained and saved whole.

    Raises:
        UserError: One of them is not in `modules_to_save`.
    """
    wanted = [empty.get_input_embeddings(), empty.get_output_embeddings()]
    names = [name for name, module in empty.named_modules() if any(module is layer for layer in wanted)]
    saved = [name.rpartition(".")[2] for name in names]
    trained = peft_config.modules_to_save or ()
    if missing := [name for name in saved if not any(is_called(module, name) for module in trained)]:
        message = f"model.add_tokens makes new rows of {' and '.join(missing)}, which the adapter would not train"
        fix = f"write modules_to_save: [{', '.join(saved)}]"
        raise user_error("new-tokens", message, fix, path=("peft", "modules_to_save"))


def saves_embeddings(peft_config: Any) -> Literal["auto"] | bool:
    """What PEFT's `save_embedding_layers` must be.

    PEFT 0.21 saves the embeddings of a vocabulary that has grown under three names when `modules_to_save` has them.
    """
    targets = getattr(peft_config, "target_modules", None)
    names = EMBEDDING_LAYER_NAMES
    if isinstance(targets, str):
        targeted = any(re.fullmatch(targets, name) or re.fullmatch(targets, f"model.{name}") for name in names)
    else:
        targeted = bool(set(targets or ()) & set(names))
    return "auto" if targeted or not getattr(peft_config, "modules_to_save", None) else False


def fit_adapter(peft_config: Any, empty: Any, build: Callable[[], Any], model_type: str) -> PeftModel:
    """Puts an adapter on a model without weights, and checks that every name in its configuration matches something.

    PEFT errs only if no target at all matches: a Llama-style list silently adapts a part of Phi-3, which fuses its own;
    a layer that is not there, or a misspelt name in a pattern, is left out without a word.

    Args:
        peft_config: The adapter.
        empty: The base model on the meta device; it becomes a part of what is returned.
        build: Builds another one, for methods that can't be put on the first.
        model_type: transformers' name of the architecture.

    Raises:
        UserError: A name matches nothing, or PEFT refuses the adapter.
    """
    modules = [name for name, _ in empty.named_modules()]
    parameters = [name for name, _ in empty.named_parameters()]
    tokens = empty.get_input_embeddings().num_embeddings
    keep_to_language(peft_config, empty)
    usual = _usual_targets(peft_config, empty)
    asked = {key for key, value in vars(peft_config).items() if value}
    check_named(peft_config, modules, usual)
    try:
        fitted = put_on(peft_config, empty, build)
    except (ImportError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError) as error:
        if "specify `target_modules`" in str(error):
            message = f"PEFT has no default targets for {model_type}"
            raise user_error(
                "target-not-found", message, _targets_fix(peft_config, usual), path=("peft", "target_modules")
            ) from error
        if "targeted for adaptation" in str(error) or "`modules_to_save`" in str(error):
            message = "what is trained whole (modules_to_save, unfreeze) and exclude_modules leave no target"
            raise user_error("target-not-found", message, path=("peft", "target_modules")) from error
        raise refused("peft", asked, error) from error
    _check_rank(peft_config, fitted)
    _check_effect(peft_config, fitted)
    head, key = fitted.get_output_embeddings(), "trainable_token_indices"
    if isinstance(peft_config, TrainableTokensConfig):
        key = "token_indices"
    trains_tokens = isinstance(head, BaseTunerLayer) and key == "token_indices"
    if (head is not None and not hasattr(head, "bias")) or trains_tokens:
        message = "TRL 1.16 computes the loss from the head itself, and here tokens of a tied head would be trained"
        fix = "train all tokens: method: lora, modules_to_save: [embed_tokens], ensure_weight_tying: true"
        raise user_error("peft-refused", message, fix, path=("peft", key))
    if isinstance(head, BaseTunerLayer):
        message = "TRL 1.16 computes the loss from the head's own weights: an adapter on it would never be trained"
        fix = "leave the head out, or train all of it: modules_to_save"
        raise user_error("peft-refused", message, fix, path=("peft", "target_modules"))
    inside = "base_model.model."
    adapted = [name.removeprefix(inside) for name, m in fitted.named_modules() if isinstance(m, BaseTunerLayer)]
    check_adapted(peft_config, adapted, parameters, usual)
    chosen = getattr(peft_config, key, None) or []
    for index in chosen if isinstance(chosen, list) else [index for part in chosen.values() for index in part]:
        if not 0 <= index < tokens:
            message = f"there is no token {index}: the model has the tokens 0 to {tokens - 1}"
            raise user_error("target-not-found", message, path=("peft", key))
    return fitted


def keep_to_language(peft_config: Any, empty: Any) -> None:
    """Leaves what sees out of an adapter on a vision model, unless the recipe says which modules it is put on.

    It says so by a regular expression as `target_modules`, or by `exclude_modules` of its own. A name alone (q_proj) is
    one of the vision tower's, too, which few rows would only spoil.

    Args:
        peft_config: Its `exclude_modules` are set.
        empty: The base model on the meta device.
    """
    targets = getattr(peft_config, "target_modules", None)
    if not hasattr(peft_config, "exclude_modules") or peft_config.exclude_modules:
        return
    if isinstance(targets, str) and targets != "all-linear":
        return
    if seeing := [name.rpartition(".")[2] for name in find_seeing(empty)]:
        peft_config.exclude_modules = rf"(?:.*\.)?(?:{'|'.join(seeing)})(?:\..*)?"


def find_seeing(empty: Any) -> list[str]:
    """Paths of the modules of a vision model that stand beside its language model: vision tower, projector."""
    if empty.config.get_text_config() is empty.config:
        return []
    language = empty.get_decoder()
    path = next((name for name, module in empty.named_modules() if module is language), "")
    found, parent, above = [], empty, ""
    for part in path.split(".") if path else ():
        beside = [(name, module) for name, module in parent.named_children() if name != part]
        found += [f"{above}{name}" for name, module in beside if list(module.parameters())]
        parent, above = getattr(parent, part), f"{above}{part}."
    head = empty.get_output_embeddings()
    return [name for name in found if getattr(empty, name, None) is not head or head is None]


def put_on(peft_config: Any, empty: Any, build: Callable[[], Any]) -> Any:
    """The base with the adapter, both without weights.

    Some methods of PEFT 0.21 look at numbers that they have just made (BOFT, UniLoRA): their adapters are made on the
    CPU. SHiRA looks at the base's weights: LoRA stands in for it, with as many parameters (tuners/shira/layer.py).
    """
    config = copy.deepcopy(peft_config)
    if isinstance(config, ShiraConfig):
        targets, saved = config.target_modules, config.modules_to_save
        config = LoraConfig(r=config.r, target_modules=targets, modules_to_save=saved, task_type=config.task_type)
    if getattr(config, "init_lora_weights", None) in CHANGING_BASE:
        config.init_lora_weights = True  # they look at weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that match nothing, which are looked at here
        try:
            with torch.device("meta"):
                return get_peft_model(empty, copy.deepcopy(config))  # PEFT writes into it
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error).lower():
                raise
            return get_peft_model(build(), config)


def _usual_targets(peft_config: Any, empty: Any) -> list[str]:
    """Names of the modules that a method is usually put on: norms, what ends feed-forward, or linear layers."""
    hidden = empty.config.get_text_config().hidden_size

    def suits(module: torch.nn.Module) -> bool:
        if isinstance(peft_config, LNTuningConfig):
            return is_norm(module)
        if isinstance(peft_config, BottleneckConfig):
            return getattr(module, "out_features", 0) == hidden < getattr(module, "in_features", 0)
        return isinstance(module, torch.nn.Linear | Conv1D)  # the second is GPT-2's

    return sorted({name.split(".")[-1] for name, module in empty.named_modules() if suits(module)})


def _targets_fix(peft_config: Any, usual: list[str]) -> str:
    if isinstance(peft_config, LNTuningConfig | BottleneckConfig):
        return f"add 'target_modules: [{', '.join(usual)}]'"
    if isinstance(peft_config, IA3Config):
        return "name keys, values and what ends feed-forward in target_modules, the last in feedforward_modules, too"
    return "add 'target_modules: all-linear'"


def is_norm(module: torch.nn.Module) -> bool:
    """Whether a module is a norm: LayerNorm, LlamaRMSNorm, ..."""
    return type(module).__name__.endswith("Norm")


def train_in_full_precision(trained: Any, recipe: Recipe, quantized: bool, mixed: bool) -> None:
    """Trains in float32 what can't be trained in bfloat16, in which TRL 1.16 trains all on a quantized base.

    A number near 1, as of a norm or a scale, does not change in bfloat16 by a step of less than 1/256: it would stay as
    it is. Without mixed precision nothing converts what comes in: `prepare.check_norms` has refused that for norms.
    """
    if not quantized and not mixed:
        return  # PEFT's own adapters are in float32 by themselves
    method, in_8bit = recipe.peft["method"], recipe.quantization["load_in_8bit"]
    whole = quantized and (method in PRECISE or (method == "adalora" and in_8bit))  # its 8-bit layers convert nothing
    dtype = torch.float32 if mixed else trained.get_input_embeddings().weight.dtype
    norms = {id(parameter) for module in trained.modules() if is_norm(module) for parameter in module.parameters()}
    for name, parameter in trained.named_parameters():
        head = recipe.stage.scores and f".{HEAD}." in name  # which is given what norms give
        if parameter.requires_grad and (whole or head or id(parameter) in norms):
            parameter.data = parameter.data.to(dtype)


def _check_effect(peft_config: Any, fitted: PeftModel) -> None:
    """What PEFT turns off by itself, with a warning, would be ignored."""
    used = fitted.peft_config["default"]
    if getattr(peft_config, "fan_in_fan_out", False) and not getattr(used, "fan_in_fan_out", True):
        message = "it has no effect: no target is a Conv1D, as GPT-2 has"
        raise user_error("peft-refused", message, "remove the key", path=("peft", "fan_in_fan_out"))
    base: Any = fitted.get_base_model()
    text = base.config.get_text_config()  # of some vision models, only the whole configuration says it
    tied = getattr(text, "tie_word_embeddings", getattr(base.config, "tie_word_embeddings", False))
    if getattr(peft_config, "ensure_weight_tying", False) and not tied:
        message = "it has no effect: embeddings and head are two matrices in this model"
        raise user_error("peft-refused", message, "remove the key", path=("peft", "ensure_weight_tying"))


def _check_rank(peft_config: Any, fitted: PeftModel) -> None:
    """A matrix has as many singular vectors as its smaller dimension."""
    if not str(getattr(peft_config, "init_lora_weights", "")).startswith(("pissa", "olora", "mica", "corda")):
        return
    layers: dict[str, Any] = {name: m for name, m in fitted.named_modules() if isinstance(m, LoraLayer)}
    for name, module in layers.items():
        if isinstance(module.get_base_layer(), Conv1D) and peft_config.init_lora_weights == "olora":
            message = f"PEFT 0.21 can't begin olora in {name}, a Conv1D as GPT-2 has"
            raise user_error("peft-refused", message, "use pissa", path=("peft", "init_lora_weights"))
        least, rank = min(module.get_base_layer().weight.shape), max(module.r.values())
        if rank > least:
            message = f"{peft_config.init_lora_weights} has no {rank} parts to take from {name}: it has {least}"
            raise user_error("peft-refused", message, "lower it", path=("peft", "r"))
