"""Going on from an earlier run's adapter: does it fit, and is it loaded so that TRL trains it further?"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from trl.trainer.utils import create_model_from_path

from recipe_runner.model import base as model
from recipe_runner.problems.errors import first_line
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.rules.adapter import CONFIG, WEIGHTS, adapter_base, adapter_config

SHOWN = 3  # tensors that an error names


def find_adapter(recipe: Recipe) -> Path | None:
    """The folder of the adapter that a recipe continues from, downloaded if it is on the hub; None for a new adapter.

    Raises:
        UserError: There is no such adapter on the hub, or it is of another base or method.
    """
    name = recipe.values["model"].get("adapter")
    if name is None or Path(name).is_absolute():
        return Path(name) if name else None  # a local one was looked at by the rules
    try:
        folder = Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, "*token*", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        code, what, fix = next(row[1:] for row in model.HUB_ERRORS if isinstance(error, row[0]))
        fix = fix.replace("model.revision", "the name")
        raise recipe.error(code, f"adapter {name}: {what}", fix, "model", "adapter") from error
    if not all((folder / file).is_file() for file in (CONFIG, WEIGHTS)):
        raise recipe.error("adapter-not-found", f"{name} has no {CONFIG} and {WEIGHTS}", "", "model", "adapter")
    values = {**recipe.values, "model": recipe.section("model") | {"adapter": str(folder)}}
    for code, rule in (("adapter-base-differs", adapter_base), ("adapter-config-differs", adapter_config)):
        for path, message, fix in rule(values):
            raise recipe.error(code, message, fix, *path)
    return folder


def load_peft(recipe: Recipe, folder: Path) -> PeftConfig:
    """The configuration of the adapter, with the recipe's dropout, ready to be trained further."""
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    config.base_model_name_or_path = recipe.values["model"]["name_or_path"]  # known to be the same, maybe moved
    if "lora_dropout" in recipe.section("peft"):
        config.lora_dropout = recipe.section("peft")["lora_dropout"]
    return config


def check_fit(recipe: Recipe, folder: Path, config: PeftConfig, model_config: PretrainedConfig) -> None:
    """Checks on a model without weights that every tensor of the adapter has its place.

    PEFT 0.21 only warns of tensors that are missing or too many, and keeps what it initialised.

    Raises:
        UserError: The adapter is of another model, or damaged; or `peft` says `all-linear` and the adapter has less.
    """
    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        message = f"{folder / WEIGHTS} can't be read: {first_line(error)}"
        raise recipe.error("adapter-not-found", message, "train it again", "model", "adapter") from error
    kind = f"{model_config.model_type}, {recipe.values['model']['name_or_path']}"
    fix = "take the base that it was trained on"
    try:
        with torch.device("meta"):
            fitted = get_peft_model(model.build_empty(recipe, model_config), config)
    except ValueError as error:  # no module of such a name
        message = f"the adapter is not of this model ({kind}): {first_line(error)[:120]}"
        raise recipe.error("adapter-does-not-fit", message, fix, "model", "adapter") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(fitted).items()}
    if wrong := [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]:
        told = "; ".join(
            f"{name.removeprefix('base_model.model.')}: {found.get(name, 'none')} in the adapter, "
            f"{wanted.get(name, 'none')} in the model"
            for name in wrong[:SHOWN]
        )
        message = f"the adapter is not of this model ({kind}): {len(wrong)} tensors differ ({told})"
        raise recipe.error("adapter-does-not-fit", message, fix, "model", "adapter")
    if recipe.section("peft").get("target_modules") == "all-linear":
        asked = model.build_peft(recipe)
        with torch.device("meta"):
            other = get_peft_model(model.build_empty(recipe, model_config), asked)
        if set(other.peft_config["default"].target_modules) != set(config.target_modules):
            message = f"all-linear, but the adapter has {', '.join(sorted(config.target_modules))}"
            fix = "remove the key: the adapter says it"
            raise recipe.error("adapter-config-differs", message, fix, "peft", "target_modules")


def read_tokenizer(recipe: Recipe, folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved with an adapter; None for one of another tool, without a tokenizer.

    Raises:
        UserError: It can't be read.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"the tokenizer in {folder} can't be read: {first_line(error)}"
        raise recipe.error("adapter-tokenizer-differs", message, "mend or remove it", "model", "adapter") from error


def check_tokenizer(recipe: Recipe, saved: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compares the base's tokenizer with the one that was saved with the adapter: a token must keep its number.

    Raises:
        UserError: They differ.
    """
    theirs, ours = saved.get_vocab(), tokenizer.get_vocab()
    if wrong := [token for token in {**theirs, **ours} if theirs.get(token) != ours.get(token)]:
        told = f"{len(wrong):,} tokens differ, for example {wrong[0]!r}"
        message = f"the adapter was trained with another tokenizer than {recipe.values['model']['name_or_path']} has"
        fix = "take the base and the tokenizer that it was trained with"
        raise recipe.error("adapter-tokenizer-differs", f"{message}: {told}", fix, "model", "adapter")


def load_for_training(recipe: Recipe, folder: Path, config: Any, peft_config: PeftConfig) -> PeftModel:
    """Loads the base as TRL does, and the adapter on it, trainable.

    TRL takes an adapter that was trained before only as a PeftModel; `DPOTrainer` then keeps a frozen copy of it as the
    reference ("ref"). Source: trl/trainer/dpo_trainer.py 1.16.0, DPOTrainer.__init__.
    """
    options = dict(config.model_init_kwargs, trust_remote_code=config.trust_remote_code)
    if quantization := model.build_quantization(recipe):
        options["quantization_config"] = quantization
    if config.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    base = create_model_from_path(recipe.values["model"]["name_or_path"], **options)
    config.model_init_kwargs = None  # done: TRL would warn
    plugin = config.deepspeed_plugin
    casts = quantization is not None or plugin is None or plugin.zero_stage != 3  # as in TRL, for a new adapter
    return PeftModel.from_pretrained(
        base, str(folder), is_trainable=True, config=peft_config, autocast_adapter_dtype=casts
    )
