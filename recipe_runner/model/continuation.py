"""Going on from an earlier run's adapter: does it fit, and is it loaded so that TRL trains it further?"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    PeftConfig,
    PeftModel,
    ShiraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from recipe_runner.model.adapter import SCORING, put_on
from recipe_runner.model.base import HEAD
from recipe_runner.model.hub import download_adapter
from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.recipe.rules.adapter import CONFIG, WEIGHTS, adapter_base, adapter_config
from recipe_runner.recipe.sections import ModelSection, UpstreamSection

PLACE = ("model", "adapter")
SHOWN = 3  # tensors that an error names
HEADS = ("classifier", "score")  # PEFT 0.21 lists both of every model that scores, whatever it has


def find_adapter(model: ModelSection, peft: UpstreamSection) -> Path | None:
    """The folder of the adapter that a recipe continues from, downloaded if it is on the hub; None for a new adapter.

    Raises:
        UserError: There is no such adapter on the hub, or it is of another base or method.
    """
    name = model.adapter
    if name is None or Path(name).is_absolute():
        return Path(name) if name else None  # a local one was looked at by the rules
    folder = download_adapter(name, [CONFIG, WEIGHTS, "*token*", "*.jinja"])
    if not all((folder / file).is_file() for file in (CONFIG, WEIGHTS)):
        raise user_error("adapter-not-found", f"{name} has no {CONFIG} and {WEIGHTS}", path=PLACE)
    local = replace(model, adapter=str(folder))
    found = [("adapter-base-differs", adapter_base(local)), ("adapter-config-differs", adapter_config(local, peft))]
    for code, differences in found:
        for path, message, fix in differences:
            raise user_error(code, message, fix, path=path)
    return folder


def load_peft(folder: Path, base: str, peft: UpstreamSection, task: str) -> PeftConfig:
    """The configuration of the adapter, with the recipe's dropout, ready to be trained further.

    A reward model goes on from an adapter that answers: it gets a head, which is trained beside it.
    """
    config: Any = PeftConfig.from_pretrained(str(folder))
    if task == SCORING and config.task_type != SCORING:
        config.task_type = task
        config.modules_to_save = [*(config.modules_to_save or ()), HEAD]
    config.inference_mode = False
    config.base_model_name_or_path = base  # known to be the same, maybe moved
    if getattr(config, "tokenizer_name_or_path", None):
        config.tokenizer_name_or_path = base
    for key, value in peft.said.items():
        if "dropout" in key:
            setattr(config, key, value)
    return config


def check_fit(folder: Path, config: Any, asked: Any, build: Callable[[], Any], base: str) -> torch.nn.Module:
    """Checks on a model without weights that every tensor of the adapter has its place.

    PEFT 0.21 only warns of tensors that are missing or too many, and keeps what it initialised.

    Args:
        folder: The adapter.
        config: Its configuration.
        asked: The configuration that the recipe's `peft` asks for.
        build: Builds the base model on the meta device.
        base: Architecture and name of the base model, for messages.

    Returns:
        The base model with the adapter, on the meta device.

    Raises:
        UserError: The adapter is of another model, or damaged; or `peft` says `all-linear` and the adapter has less.
    """
    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        message = f"{folder / WEIGHTS} can't be read: {first_line(error)}"
        raise user_error("adapter-not-found", message, "train it again", path=PLACE) from error
    fix = "take the base that it was trained on"
    try:
        fitted = put_on(config, build(), build)
    except ValueError as error:  # no module of such a name
        message = f"the adapter is not of this model ({base}): {first_line(error)[:120]}"
        raise user_error("adapter-does-not-fit", message, fix, path=PLACE) from error
    wanted = _shapes_of(fitted, config)
    if config.task_type == SCORING and not any(f".{HEAD}." in name for name in found):  # a new one
        wanted = {name: shape for name, shape in wanted.items() if f".{HEAD}." not in name}
    if isinstance(config, ShiraConfig):  # LoRA stands in for it
        found, wanted = _modules_in(found), _modules_in(wanted)
    if wrong := [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]:
        told = "; ".join(
            f"{name.removeprefix('base_model.model.')}: {found.get(name, 'none')} in the adapter, "
            f"{wanted.get(name, 'none')} in the model"
            for name in wrong[:SHOWN]
        )
        message = f"the adapter is not of this model ({base}): {len(wrong)} tensors differ ({told})"
        raise user_error("adapter-does-not-fit", message, fix, path=PLACE)
    saved = set(getattr(config, "modules_to_save", None) or [])
    wished = set(getattr(asked, "modules_to_save", None) or [])
    if wished and (other := (wished ^ saved) - set(HEADS)):
        message = f"the adapter trains {'also' if other & saved else 'no'} {min(other)}"
        fix = "remove the key: what the adapter trains of the base is trained further"
        raise user_error("adapter-config-differs", message, fix, path=("unfreeze",))
    if asked is not None and getattr(asked, "target_modules", None) == "all-linear":
        other = put_on(asked, build(), build)
        if set(other.peft_config["default"].target_modules) != set(config.target_modules):
            message = f"all-linear, but the adapter has {', '.join(sorted(config.target_modules))}"
            fix = "remove the key: the adapter says it"
            raise user_error("adapter-config-differs", message, fix, path=("peft", "target_modules"))
    return fitted


def _shapes_of(fitted: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of an adapter, as PEFT saves them."""
    if config.is_prompt_learning:
        return {"prompt_embeddings": tuple(fitted.prompt_encoder["default"].embedding.weight.shape)}
    ranks = getattr(config, "rank_pattern", None) if isinstance(config, AdaLoraConfig) else None
    if ranks:  # of AdaLoRA, the parts that are kept; PEFT would count them on the meta device
        fitted.peft_config["default"].rank_pattern = None
    wanted = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(fitted).items()}
    for name, kept in (ranks or {}).items():
        module = f"base_model.model.{name.partition('.lora_E')[0]}"
        for part, dimension in (("lora_E", 0), ("lora_A", 0), ("lora_B", 1)):
            shape = list(wanted.get(f"{module}.{part}", (0, 0)))
            shape[dimension] = sum(kept)
            wanted[f"{module}.{part}"] = tuple(shape)
    return wanted


def _modules_in(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys((re.sub(r"\.(shira|lora)_\w+(\.weight)?$", "", name) for name in shapes), ())


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
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
        raise user_error("adapter-tokenizer-differs", message, "fix or remove it", path=PLACE) from error


def check_tokenizer(saved: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, base: str) -> None:
    """Compares the base's tokenizer with the one that was saved with the adapter: a token must keep its number.

    Raises:
        UserError: They differ.
    """
    theirs, ours = saved.get_vocab(), tokenizer.get_vocab()
    if wrong := [token for token in {**theirs, **ours} if theirs.get(token) != ours.get(token)]:
        told = f"{len(wrong):,} tokens differ, for example {wrong[0]!r}"
        message = f"the adapter was trained with another tokenizer than {base} has"
        fix = "take the base and the tokenizer that it was trained with"
        raise user_error("adapter-tokenizer-differs", f"{message}: {told}", fix, path=PLACE)


def load_for_training(
    loaded: Any, folder: Path, peft_config: PeftConfig, quantization: BitsAndBytesConfig | None, config: Any
) -> PeftModel:
    """Puts the adapter on the loaded base, trainable.

    TRL takes an adapter that was trained before only as a PeftModel; `DPOTrainer` then keeps a frozen copy of it as the
    reference ("ref"). Source: trl/trainer/dpo_trainer.py 1.16.0, DPOTrainer.__init__.
    """
    if peft_config.is_prompt_learning:  # PEFT 0.21's from_pretrained refuses to train it further (peft_model.py:555)
        model = get_peft_model(loaded, peft_config)
        set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
        return model
    plugin = config.deepspeed_plugin
    casts = quantization is not None or plugin is None or plugin.zero_stage != 3  # as in TRL, for a new adapter
    if peft_config.task_type == SCORING:
        saved = load_file(folder / WEIGHTS)
        if not any(f".{HEAD}." in name for name in saved):  # a new head, which PEFT would look for in the file
            head = {f"base_model.model.{HEAD}.{name}": of.detach() for name, of in loaded.score.named_parameters()}
            model = get_peft_model(loaded, peft_config, autocast_adapter_dtype=casts)
            set_peft_model_state_dict(model, saved | head)
            return model
    return PeftModel.from_pretrained(
        loaded, str(folder), is_trainable=True, config=peft_config, autocast_adapter_dtype=casts
    )
