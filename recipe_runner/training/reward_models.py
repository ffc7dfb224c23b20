"""Reward models: which run or folder is meant, whether its tokenizer is the model's, and loading it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from recipe_runner.data.turns import describe_value
from recipe_runner.files import hash_file, hash_weights
from recipe_runner.model.load import find_result, load_result, read_tokenizer
from recipe_runner.model.quantization import build_quantization
from recipe_runner.problems.errors import UserError, user_error
from recipe_runner.problems.problem import KeyPath
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.resolve import load_recipe
from recipe_runner.recipe.sections import RewardSection
from recipe_runner.runs.find import names_recipe, recipe_of, seek_run
from recipe_runner.training.resume import CODE


@dataclass(frozen=True)
class Trained:
    """A model that another one learns from: its folder or hub id, and the recipe of its run, where it has one."""

    folder: str
    recipe: Recipe | None


def find_trained(name: str, path: KeyPath) -> Trained:
    """What a recipe names beside its own model: a run (by its folder or its recipe), a folder, or a hub id.

    Raises:
        UserError: There is none.
    """
    try:
        run = seek_run(name)
        if run is None and names_recipe(name):
            raise user_error("run-not-found", f"{name} has not been run", "run it first")
        folder = str(find_result(run or Path(name))) if run or Path(name).is_absolute() else name
    except UserError as error:
        problem = error.problems[0]
        raise user_error(problem.code, problem.message, problem.suggestion, path=path) from error
    return Trained(folder, recipe_of(run) if run else None)


def _find_reward_model(name: str, path: KeyPath) -> Trained:
    """As `find_trained`, of a reward model."""
    fix = "name a run of a recipe that trains a reward model"
    if names_recipe(name) and not (recipe := load_recipe(name)).stages and not recipe.stage.scores:
        message = f"{name} is a recipe of stage {recipe.stage.name}, and trains no reward model"
        raise user_error("not-a-reward-model", message, fix, path=path)
    found = find_trained(name, path)
    if found.recipe and not found.recipe.stage.scores:
        message = f"{name} is a run of stage {found.recipe.stage.name}, and no reward model"
        raise user_error("not-a-reward-model", message, fix, path=path)
    return found


def check_reward_models(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Finds the reward models and compares their tokenizers with the model's, before any weights are loaded.

    Returns:
        What the rewards are made from, in words -> its hash.

    Raises:
        UserError: One is missing, or has another tokenizer, and the recipe does not say that it may.
    """
    found: dict[str, str] = {}
    for number, reward in enumerate(recipe.rewards):
        path = ("rewards", number, "model")
        if reward.function:
            file = reward.function.rpartition(":")[0]
            found[f"{CODE}{Path(file).name}"] = hash_file(Path(file))
        if not reward.model:
            continue
        place = _find_reward_model(reward.model, path)
        if digest := hash_weights(Path(place.folder)):
            found[f"the reward model {reward.model}"] = digest
        own = read_own_tokenizer(place.folder, path)
        if not own.chat_template:
            message = f"{reward.model} has a tokenizer without a chat template: conversations can't be rendered for it"
            raise user_error("reward-tokenizer-differs", message, "take a reward model of conversations", path=path)
        if reward.tokenizer == "same" and (changed := compare_tokens(own, tokenizer) or _compare_texts(own, tokenizer)):
            message = f"{reward.model} has another tokenizer than {recipe.model.name_or_path}: {changed}"
            fix = "take a reward model of the same base; if it is meant, set tokenizer: own (conversations are then"
            fix += " rendered anew by its own chat template)"
            raise user_error("reward-tokenizer-differs", message, fix, path=path)
    return found


def read_own_tokenizer(folder: str, path: KeyPath, **place: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that a recipe names beside its own, at a key.

    Raises:
        UserError: It can't be read.
    """
    try:
        return read_tokenizer(folder, **place)
    except UserError as error:
        if Path(folder).is_absolute():
            problem = error.problems[0]
            raise user_error(problem.code, problem.message, problem.suggestion, path=path) from error
        message = f"{folder} is no run, no recipe that is here, and no model on the hub that can be read"
        fix = "name a run's folder (runs/NAME), a recipe's file (NAME.yaml), a model's folder or a hub id"
        raise user_error("model-not-found", message, fix, path=path) from error


def compare_tokens(own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """How the vocabularies of two tokenizers differ; empty where they don't."""
    theirs, ours = own.get_vocab(), other.get_vocab()
    wrong = [token for token in {**theirs, **ours} if theirs.get(token) != ours.get(token)]
    return f"{len(wrong):,} tokens differ, for example {wrong[0]!r}" if wrong else ""


def _compare_texts(own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """How two chat templates differ in what they make of a conversation; empty where they don't."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    made = [str(each.apply_chat_template(turns, tokenize=False)) for each in (own, other)]
    return "" if made[0] == made[1] else f"their chat templates render {describe_value(made[0])} and {made[1]!r}"


def load_trained(found: Trained, config: Any, **place: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model that is not trained, as transformers' own class, its adapter in place; quantized as it was trained.

    Args:
        found: What `find_trained` found.
        config: The trainer's configuration, for the device.
        place: `revision` and `trust_remote_code` of a model on the hub.
    """
    options: dict[str, Any] = {"dtype": "auto" if config.device.type != "cpu" else "float32", **place}
    if config.device.type != "cpu":
        options["device_map"] = {"": config.device}
    if found.recipe and (quantization := build_quantization(found.recipe.quantization.said)):
        options["quantization_config"] = quantization
    loaded, tokenizer = load_result(found.folder, found.recipe.model if found.recipe else None, **options)
    model = loaded.get_base_model() if isinstance(loaded, PeftModel) else loaded
    return model.eval().requires_grad_(False), tokenizer


def load_model(
    reward: RewardSection, config: Any, path: KeyPath
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase, str]:
    """A reward model, its tokenizer, and its name."""
    found = _find_reward_model(str(reward.model), path)
    model, tokenizer = load_trained(found, config)
    if getattr(model.config, "num_labels", 0) != 1 or not hasattr(model, "score"):
        message = f"{reward.model} is no reward model: it does not give one number"
        raise user_error("not-a-reward-model", message, "name a run of a recipe that trains one", path=path)
    tokenizer.padding_side = "right"
    return model, tokenizer, found.recipe.name if found.recipe else Path(found.folder).name
