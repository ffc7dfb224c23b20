"""Partial fine-tuning: which parameters of the base are trained, alone or beside an adapter."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from recipe_runner.model.adapter import is_norm
from recipe_runner.model.targets import match_names
from recipe_runner.problems.errors import user_error

LAYERS = re.compile(r"layers\[(-?\d{1,6})?(:)?(-?\d{1,6})?\]")
WORDS = "layers[-2:], norms, embeddings, lm_head, or a regular expression of names like {name}"


def select_parameters(patterns: Sequence[str], model: Any, quantization: Any = None) -> dict[str, list[str]]:
    """The parameters that each pattern stands for.

    Args:
        patterns: `layers[-2:]` (layers, as Python counts them), `norms`, `embeddings`, `lm_head`, or a regular
            expression that is looked for in the names of parameters.
        model: The base, on the meta device.
        quantization: BitsAndBytesConfig of the base, when it is quantized.

    Returns:
        Pattern -> names of parameters, as `model.named_parameters` has them: tied ones once.

    Raises:
        UserError: A pattern matches nothing, or quantized weights, which can't be trained.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    packed = _find_quantized(model, quantization) if quantization else set()
    found = {}
    for number, pattern in enumerate(patterns):
        path = ("unfreeze", number)
        chosen = [names[parameter] for parameter in _match(pattern, model, path)]
        if not chosen:
            words = WORDS.format(name=next(iter(names.values())))
            raise user_error("unfreeze-not-found", f"'{pattern}' matches no parameter", f"write {words}", path=path)
        if hit := [name for name in chosen if name.rpartition(".")[0] in packed]:
            message = f"'{pattern}' matches {hit[0]}, which is quantized: such weights have no gradient"
            fix = "unfreeze norms, embeddings or lm_head, which are not quantized, or remove quantization"
            raise user_error("unfreeze-quantized", message, fix, path=path)
        found[pattern] = list(dict.fromkeys(chosen))
    return found


def _match(pattern: str, model: Any, path: tuple[str | int, ...]) -> Iterable[torch.nn.Parameter]:
    """The parameters that a pattern stands for."""
    modules: list[Any] = []
    if pattern == "lm_head":
        modules = [model.get_output_embeddings()]
    elif pattern == "embeddings":
        modules = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    elif pattern == "norms":
        modules = [module for module in model.modules() if is_norm(module)]
    elif chosen := LAYERS.fullmatch(pattern):
        first, colon, last = chosen.groups()
        if not first and not colon:
            return []
        layers = list(_find_layers(model))
        numbers = [int(number) if number else None for number in (first, last)]
        try:
            modules = layers[slice(*numbers)] if colon else [layers[int(first)]]
        except IndexError:
            message = f"there is no {pattern}: the model has layers 0 to {len(layers) - 1}"
            raise user_error("unfreeze-not-found", message, path=path) from None
    else:
        parameters = dict(model.named_parameters())
        return [parameters[name] for name in match_names(pattern, list(parameters), path, whole=False)]
    return [parameter for module in modules for parameter in module.parameters()]


def _find_layers(model: Any) -> torch.nn.ModuleList:
    """The list of layers of a model."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count]
    return lists[0] if lists else torch.nn.ModuleList()


def _find_quantized(model: Any, quantization: Any) -> set[str]:
    """Names of the layers that bitsandbytes quantizes: linear ones but the head, and those that are left out.

    Source: transformers 5.23, integrations/bitsandbytes.py, replace_with_bnb_linear.
    """
    said = getattr(quantization, "llm_int8_skip_modules", None)  # with a list of its own, the head is quantized, too
    skipped = HfQuantizer.get_modules_to_not_convert(model, list(said) if said else None)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and should_convert_module(name, skipped)
    }


def check_new_rows(chosen: Mapping[str, Iterable[str]], model: Any) -> None:
    """Checks that embeddings which get rows for new tokens are trained.

    Raises:
        UserError: They are frozen: the rows would stay random.
    """
    trained = {name for names in chosen.values() for name in names}
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(layer.weight) for layer in layers}
    frozen = [name for name, parameter in model.named_parameters() if id(parameter) in weights and name not in trained]
    if frozen:
        message = f"model.add_tokens makes new rows of {', '.join(frozen)}, which unfreeze leaves frozen"
        raise user_error("new-tokens", message, "add embeddings and lm_head", path=("unfreeze",))


def freeze_others(model: Any, chosen: Mapping[str, Iterable[str]]) -> None:
    """Trains the chosen parameters of a base alone."""
    trained = {name for names in chosen.values() for name in names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def train_beside_adapter(peft_config: Any, chosen: Mapping[str, Iterable[str]], model: Any) -> None:
    """Has an adapter train and save the chosen parameters, too: PEFT's `modules_to_save`, which load as one piece.

    PEFT keeps the base's own modules beside the trained copies, so that the adapter can still be disabled.

    Raises:
        UserError: A pattern chooses a part of a module, or tied weights that the method can't keep tied.
    """
    trained = {name for names in chosen.values() for name in names}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in trained))
    for owner in owners:
        own = [f"{owner}.{name}" for name, _ in model.get_submodule(owner).named_parameters(recurse=False)]
        if left := [name for name in own if name not in trained]:
            message = f"{owner} would be trained without {left[0]}: beside an adapter modules are trained whole"
            raise user_error("unfreeze-partly", message, "match all of it, or remove peft", path=("unfreeze",))
    addresses = [id(parameter) for parameter in parameters.values()]
    if any(addresses.count(id(parameters[name])) > 1 for name in trained):
        if not hasattr(peft_config, "ensure_weight_tying"):
            message = "embeddings and head are one matrix in this model, of which this method would train two copies"
            raise user_error("unfreeze-tied", message, "take method: lora, which keeps them tied", path=("unfreeze",))
        peft_config.ensure_weight_tying = True
    peft_config.modules_to_save = [*(peft_config.modules_to_save or []), *owners]
