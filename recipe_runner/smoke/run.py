"""One recipe, executed: built small, trained, evaluated, saved, loaded back, resumed, and checked."""

import contextlib
import dataclasses
import gc
import io
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch

from recipe_runner.data import store
from recipe_runner.files import write_status
from recipe_runner.launch.configuration import find_launch, read_launch
from recipe_runner.launch.rules import check_launch
from recipe_runner.model import adapter as new_adapter
from recipe_runner.model.base import build_empty
from recipe_runner.model.unfreeze import select_parameters, train_beside_adapter
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.problems.problem import Problem
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.resolve import examine_recipe
from recipe_runner.runs.folder import list_checkpoints, result_name, step_of
from recipe_runner.smoke.checks import CHECKS, Done, FullSize, adapted_modules, list_excused, read_tensors
from recipe_runner.smoke.outcome import CODE, Outcome
from recipe_runner.smoke.shrink import Small, describe_changes, shrink_recipe
from recipe_runner.smoke.stand_in import StandIn
from recipe_runner.smoke.watch import Seen, Watcher
from recipe_runner.training.run import run_recipe


def smoke(file: Path, steps: int) -> Iterator[Outcome]:
    """Executes a recipe; of a pipeline each stage by itself, from the base.

    Args:
        file: Of the recipe.
        steps: Of the optimizer, at least 3: LoRA's first matrix has a gradient once the second has moved.

    Yields:
        One outcome a recipe that trains.
    """
    recipe, problems = examine_recipe(file)
    if recipe is None:
        yield Outcome(file, file.stem, problems)
        return
    for stage in recipe.stages or (recipe,):
        name = recipe.name if not recipe.stages else f"{recipe.name}: {stage.name}"
        yield _smoke_one(file, name, dataclasses.replace(stage, values=_alone(stage)), steps)


def _alone(stage: Recipe) -> dict[str, Any]:
    """A pipeline's stage, from the base: the adapter of the stage before is not there."""
    values = dict(stage.values)
    values["model"] = {key: value for key, value in values["model"].items() if key != "adapter"}
    return values


def _smoke_one(file: Path, name: str, recipe: Recipe, steps: int) -> Outcome:
    outcome, began = Outcome(file, name), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="recipe-run-smoke-") as folder, apart(Path(folder)), _quiet() as said:
        try:
            on_cpu = torch.accelerator.current_accelerator(check_available=True) is None
            outcome.problems += check_launch_of(recipe)
            with recipe.placing_errors():
                small = shrink_recipe(recipe, Path(folder), steps, on_cpu)
                outcome.rows, outcome.stand_in = small.told, small.stand_in.told
                outcome.changed = describe_changes(small)
                full = build_full(recipe, small.stand_in)
                done = _execute(recipe, small, full)
            outcome.steps, outcome.excused = len(done.seen.rates), list_excused(done)
            for check, function in CHECKS.items():
                outcome.problems += [recipe.place(_problem(check, told)) for told in function(done)]
        except UserError as error:
            outcome.problems += error.problems
        except Exception as error:  # what upstream or the runner says here, it would say to the recipe's user
            told = f"{type(error).__name__}: {first_line(error)}"
            outcome.problems.append(recipe.place(_problem("run", told + _last_words(said))))
    outcome.seconds = time.monotonic() - began
    gc.collect()
    return outcome


def check_launch_of(recipe: Recipe) -> list[Problem]:
    """What the launch configuration that a recipe is meant for (`metadata.launch`) contradicts in it.

    Raises:
        UserError: There is no such configuration.
    """
    name = (recipe.values.get("metadata") or {}).get("launch")
    return check_launch(read_launch(find_launch(name)), recipe) if name else []


def _problem(check: str, told: str) -> Problem:
    return Problem(CODE, f"{check}: {told}", path=("name",))


def _last_words(said: io.StringIO) -> str:
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    return f" (the run's last line: {lines[-1].strip()})" if lines else ""


@contextlib.contextmanager
def apart(folder: Path) -> Iterator[None]:
    """Keeps prepared data and the datasets library's copies in a folder, and not in the person's caches."""
    with (
        mock.patch.object(store, "store_folder", return_value=folder / "prepared"),
        mock.patch.object(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets")),
    ):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Keeps what a run prints."""
    said = io.StringIO()
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield said
    finally:
        logging.disable(level)


def _execute(recipe: Recipe, small: Small, full: FullSize) -> Done:
    """Trains, then goes on from the checkpoint before the last step, in a copy of the run.

    Raises:
        UserError: The run ends with an error.
    """
    watcher = Watcher()
    folder = run_recipe(small.recipe, "never", None, watcher)
    seen = watcher.seen
    assert seen is not None
    first = read_tensors(folder / result_name(bool(recipe.peft)))
    return Done(recipe, small, seen, full, _resume(small.recipe, folder), first)


def _resume(recipe: Recipe, folder: Path) -> Seen | None:
    """The last step, taken again by a run that goes on from the checkpoint before it."""
    copied = folder.with_name(f"{folder.name}-again")
    shutil.copytree(folder, copied)
    checkpoints = list_checkpoints(copied)
    if len(checkpoints) < 2:
        raise user_error(CODE, "there is no checkpoint before the last step", path=("training", "save_steps"))
    shutil.rmtree(checkpoints[-1])
    shutil.rmtree(copied / result_name(bool(recipe.peft)))
    write_status(copied, "interrupted", step=step_of(checkpoints[-2]))
    watcher = Watcher()
    run_recipe(recipe, str(copied), None, watcher)
    return watcher.seen


def build_full(recipe: Recipe, stand_in: StandIn) -> FullSize:
    """The recipe's adapter on its model at the real size, on the meta device.

    Raises:
        UserError: A target matches nothing there, or PEFT refuses the adapter for the architecture.
    """

    def build() -> Any:
        return build_empty(stand_in.config)

    empty = build()
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    modules = frozenset(name for name, _ in empty.named_modules())
    unfrozen = select_parameters(recipe.unfreeze, empty, None) if recipe.unfreeze else {}
    trained = [name for names in unfrozen.values() for name in names]
    if not recipe.peft:
        return FullSize(frozenset(), frozenset(trained), modules, parameters)
    # What a prompt begins with takes a tokenizer, and changes no module.
    said = {key: value for key, value in recipe.peft.said.items() if not key.startswith("prompt_tuning_init")}
    config = new_adapter.build_peft(said, recipe.stage.task)
    if unfrozen and config:
        train_beside_adapter(config, unfrozen, empty)
    fitted = new_adapter.fit_adapter(config, empty, build, stand_in.config.get_text_config().model_type)
    return FullSize(frozenset(adapted_modules(fitted)), frozenset(trained), modules, parameters)
