"""What a command after training works on: the result of a run, a recipe's base, or any model; and how it is loaded."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from recipe_runner.data.prompts import render_prompt
from recipe_runner.files import FULL, disk_full, hash_weights, list_runs, read_object, read_status
from recipe_runner.model.load import (
    can_switch_off,
    find_base,
    find_result,
    is_reward_model,
    load_result,
    read_tokenizer,
)
from recipe_runner.model.quantization import build_quantization
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.problems.problem import Problem, as_warning
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.resolve import load_recipe
from recipe_runner.recipe.rules.adapter import CONFIG
from recipe_runner.runs.find import FIX, names_recipe, recipe_of, seek_run
from recipe_runner.runs.golden import read_golden
from recipe_runner.training.failures import find_system_error, is_out_of_memory


@dataclass(frozen=True)
class Target:
    """What a command after training works on.

    Attributes:
        name: As the person calls it.
        result: The folder of an adapter or model, or a model's id on the hub.
        run: The run that it comes from; None where it comes from none.
        recipe: The recipe of that run, or the one that was named; None for a model.
    """

    name: str
    result: str
    run: Path | None
    recipe: Recipe | None

    @property
    def is_adapter(self) -> bool:
        """Whether the result is an adapter, which can be switched off."""
        return (Path(self.result) / CONFIG).is_file()

    @cached_property
    def peft_config(self) -> PeftConfig:
        """The configuration of an adapter.

        Raises:
            UserError: It can't be read.
        """
        try:
            config: PeftConfig = PeftConfig.from_pretrained(self.result)
        except (ValueError, TypeError, KeyError) as error:
            message = f"{self.result}: {CONFIG} can't be read: {first_line(error)}"
            raise user_error("result-not-loaded", message) from error
        return config

    @property
    def scores(self) -> bool:
        """Whether it is a reward model, which gives numbers and writes no text."""
        if self.recipe:
            return self.recipe.stage.scores
        return is_reward_model(Path(self.result))

    @property
    def holds_base(self) -> bool:
        """Whether the base is there when the adapter is switched off."""
        return self.is_adapter and can_switch_off(self.peft_config)

    @property
    def base(self) -> str:
        """The base of an adapter; any other result itself."""
        if not self.is_adapter:
            return self.result
        return find_base(self.peft_config, Path(self.result))

    @property
    def is_trained(self) -> bool:
        """Whether there is a result of training, or only a base."""
        return self.run is not None or self.recipe is None


def find_target(name: str) -> Target:
    """Finds what a name stands for: a run (see `runs.find`), a recipe without one, an adapter or a model.

    Raises:
        UserError: There is no such thing, or the run is not completed.
    """
    folder = Path(name)
    if run := seek_run(name):
        result = find_result(folder if (folder / "status.json").is_file() else run)
        return Target(name, str(result), run, recipe_of(run))
    if folder.is_dir():
        if runs := list_runs(folder):
            message = f"{name} has no completed run: the latest is {read_status(runs[-1])}"
            raise user_error("run-not-completed", message, f"--resume {runs[-1]} continues it")
        return Target(name, str(find_result(folder)), None, None)
    if names_recipe(name):
        recipe = load_recipe(name)
        if recipe.stages:
            raise user_error("run-not-found", f"the pipeline {recipe.name} has no completed run", "run it first")
        return Target(name, recipe.model.name_or_path, None, recipe)
    if folder.is_absolute() or folder.exists() or len(folder.parts) > 2 or name.startswith("."):
        raise user_error("run-not-found", f"{name} is no run and no model", f"{FIX}, or a model")
    return Target(name, name, None, None)


@dataclass(frozen=True)
class Opened:
    """A model that is ready to answer, and its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase


def open_target(
    target: Target, dtype: str | None = None, quantized: bool = True, base: bool = False, scores: bool = False
) -> Opened:
    """Loads a target for inference, on a GPU where there is one.

    The base of an adapter is quantized as it was in training. Without `dtype`, weights are float32 on a CPU, and of
    the type that they were published in on a GPU.

    Args:
        target: What `find_target` found.
        dtype: Of the weights.
        quantized: Whether the base is quantized as the recipe says.
        base: Load the base model of a run's recipe, with the tokenizer of the result.
        scores: Whether a reward model is asked for.

    Raises:
        UserError: It can't be loaded, or its tokenizer is not the one of the training; or a reward model is asked for
            text, or any other for scores.
    """
    check_kind(target, scores)
    disable_progress_bar()
    device = torch.accelerator.current_accelerator(check_available=True)
    options: dict[str, Any] = {"dtype": dtype or ("auto" if device else "float32")}
    if device:
        options["device_map"] = "auto"
    recipe = target.recipe
    if recipe and target.run is None:
        options |= recipe.model.location
    section = recipe.model if recipe else None
    if recipe and recipe.model.trust_remote_code:
        options["trust_remote_code"] = True
    if quantized and recipe and (config := build_quantization(recipe.quantization.said)):
        options["quantization_config"] = config
    if changed := find_changed_base(target):
        print(changed, file=sys.stderr)
    if not base:
        model, tokenizer = load_result(target.result, section, **options)
        check_tokenizer(target, tokenizer)
        return Opened(model, tokenizer)
    assert recipe is not None
    tokenizer = read_tokenizer(target.result)
    model, _ = load_result(recipe.model.name_or_path, section, **options | recipe.model.location)
    return Opened(model, tokenizer)


def check_kind(target: Target, scores: bool = False) -> None:
    """Checks that a target does what a command needs: write text, or score it.

    Raises:
        UserError: It does the other.
    """
    if target.scores and not scores:
        fix = f"recipe-run evaluate {target.name} ranks pairs with it; stages rloo and grpo name it in rewards"
        raise user_error("reward-model", f"{target.name} is a reward model: it gives numbers, and writes no text", fix)
    if scores and not (target.scores and target.is_trained):
        fix = "name a run of stage reward" if not target.scores else "run the recipe first"
        raise user_error("reward-model", f"{target.name} is no reward model that was trained: it scores nothing", fix)


def check_tokenizer(target: Target, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that the tokenizer and its template make of the golden rows what they made at the end of training.

    Raises:
        UserError: They don't.
    """
    for number, row in enumerate(read_golden(target.run) if target.run else [], 1):
        if render_prompt(row.content, tokenizer, row.tools, asks=row.score is None) != row.prompt_ids:
            message = f"the tokenizer in {target.result} makes other tokens of golden row {number} than in training"
            fix = "put back the files of the tokenizer and its chat template, as they were saved"
            raise user_error("tokenizer-changed", message, fix)


def find_changed_base(target: Target) -> Problem | None:
    """Says so where the base of an adapter has other weights than in training."""
    recorded = read_object(target.run / "environment.json").get("base_model") if target.run else None
    if not isinstance(recorded, dict) or not recorded.get("weights") or not recorded.get("name_or_path"):
        return None
    folder = Path(str(recorded["name_or_path"])).expanduser()
    if not folder.is_dir() or hash_weights(folder) == recorded["weights"]:
        return None
    message = f"the weights in {folder} are not those that the adapter was trained on"
    return as_warning(Problem("base-changed", message, suggestion="put them back, or train again"))


@contextlib.contextmanager
def explaining(memory: str, going_on: str = "run it again", place: Path | None = None) -> Iterator[None]:
    """Explains what ends a command after training: no memory, no room on the disk.

    Args:
        memory: What to do where memory is short.
        going_on: What to do once there is room on the disk.
        place: What is written: of some errors upstream does not say which file it was.

    Raises:
        UserError: One of them is at fault.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise user_error("out-of-memory", first_line(error), memory) from error
        number = find_system_error(error)
        if number in FULL:
            file = Path(getattr(error, "filename", None) or place or ".")
            raise disk_full(number, file, going_on) from error
        raise
