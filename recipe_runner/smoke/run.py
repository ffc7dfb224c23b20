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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

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
from recipe_runner.runs.stages import StageRun, start_from
from recipe_runner.smoke.checks import learned, options, prepared, result, weights
from recipe_runner.smoke.checks.done import Done, Found, FullSize, adapted_modules, read_tensors
from recipe_runner.smoke.outcome import CODE, Outcome
from recipe_runner.smoke.shrink import Small, apart, describe_changes, shrink_recipes
from recipe_runner.smoke.stand_in import StandIn
from recipe_runner.smoke.watch import Seen, Watcher
from recipe_runner.training.pipeline import run_pipeline
from recipe_runner.training.run import run_recipe

CHECKS: dict[str, Callable[[Done], Found]] = {
    "size": weights.check_size,
    "targets": weights.check_targets,
    "base": weights.check_base,
    "trained": weights.check_trained,
    "options": options.check_options,
    "rows": learned.check_rows,
    "prepared": prepared.check_prepared,
    "order": learned.check_order,
    "mask": learned.check_mask,
    "judged": learned.check_judged,
    "loss": learned.check_loss,
    "gradients": weights.check_gradients,
    "moved": weights.check_moved,
    "frozen": weights.check_frozen,
    "optimizer": options.check_optimizer,
    "schedule": options.check_schedule,
    "evaluated": result.check_evaluated,
    "saved": result.check_saved,
    "loaded": result.check_loaded,
    "resumed": result.check_resumed,
}


def smoke(file: Path, steps: int) -> Outcome:
    """Executes a recipe; a pipeline as a whole, each stage from the result of the one before.

    Args:
        file: Of the recipe.
        steps: Of the optimizer, at least 3: LoRA's first matrix has a gradient once the second has moved.
    """
    recipe, problems = examine_recipe(file)
    if recipe is None:
        return Outcome(file, file.stem, problems)
    outcome, began = Outcome(file, recipe.name), time.monotonic()
    outcome.not_run = (recipe.values.get("metadata") or {}).get("not_run", "")
    if outcome.not_run:
        return outcome
    with tempfile.TemporaryDirectory(prefix="recipe-run-smoke-") as folder, apart(Path(folder)), _quiet() as said:
        try:
            with recipe.placing_errors():
                for done in _execute(recipe, outcome, Path(folder), steps):
                    outcome.steps += len(done.seen.rates)
                    outcome.excused |= weights.list_excused(done)
                    for check, function in CHECKS.items():
                        outcome.problems += [done.recipe.place(_problem(check, told)) for told in function(done)]
        except UserError as error:
            outcome.problems += error.problems
        except Exception as error:  # what upstream or the runner says here, it would say to the recipe's user
            told = f"{type(error).__name__}: {first_line(error)}"
            outcome.problems.append(recipe.place(_problem("run", told + _last_words(said))))
    outcome.seconds = time.monotonic() - began
    gc.collect()
    return outcome


def _execute(recipe: Recipe, outcome: Outcome, folder: Path, steps: int) -> list[Done]:
    """Trains by a recipe, or by each stage of a pipeline; notes in the outcome what stands in for what.

    Raises:
        UserError: A run ends with an error.
    """
    stages = recipe.stages or (recipe,)
    on_cpu = torch.accelerator.current_accelerator(check_available=True) is None
    outcome.problems += [problem for stage in stages for problem in check_launch_of(stage)]
    smalls = shrink_recipes(stages, folder, steps, on_cpu)
    outcome.stand_in = smalls[0].stand_in.told
    outcome.rows = ", ".join(dict.fromkeys(small.told for small in smalls))
    for stage, small in zip(stages, smalls, strict=True):
        outcome.changed += [f"{stage.name}: " * bool(recipe.stages) + told for told in describe_changes(small)]
    full = []
    for stage, small in zip(stages, smalls, strict=True):
        with stage.placing_errors():
            full.append(build_full(stage, small.stand_in))
    if not recipe.stages:
        return [_train(recipe, smalls[0], full[0])]
    return _train_pipeline(recipe, smalls, full, folder / "pipelines")


def check_launch_of(recipe: Recipe) -> list[Problem]:
    """What the launch configuration that a recipe is meant for (`metadata.launch`) contradicts in it.

    Raises:
        UserError: There is no such configuration.
    """
    name = (recipe.values.get("metadata") or {}).get("launch")
    return check_launch(read_launch(find_launch(name)), recipe) if name else []


def _problem(check: str, told: str) -> Problem:
    return Problem(CODE, f"{check}: {told}", path=())


def _last_words(said: io.StringIO) -> str:
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    return f" (the run's last line: {lines[-1].strip()})" if lines else ""


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


def _train(recipe: Recipe, small: Small, full: FullSize) -> Done:
    """Trains, then goes on from the checkpoint before the last step, in a copy of the run."""
    watcher = Watcher()
    run_recipe(small.recipe, "never", None, watcher)
    assert watcher.seen is not None
    return _go_on(Done(recipe, small, watcher.seen, full), small.recipe)


def _train_pipeline(recipe: Recipe, smalls: Sequence[Small], full: Sequence[FullSize], folder: Path) -> list[Done]:
    """Trains stage by stage, each from the result of the one before; then each stage goes on in a copy of its run."""
    values = {**recipe.values, "run": {**recipe.values["run"], "output_dir": str(folder)}}
    pipeline = dataclasses.replace(recipe, values=values, stages=tuple(small.recipe for small in smalls))
    watchers = [Watcher() for _ in smalls]
    waiting = iter(watchers)
    whole = run_pipeline(pipeline, "never", None, lambda *given: next(waiting)(*given))
    ended: list[Done] = []
    runs: list[StageRun] = []
    for number, (stage, small, watcher) in enumerate(zip(recipe.stages, smalls, watchers, strict=True)):
        assert watcher.seen is not None
        link = recipe.links[number]
        before, judge = (None if place is None else runs[place] for place in (link.before, link.reward))
        ran = start_from(small.recipe, before, whole / str(number + 1), judge)
        done = Done(stage, small, watcher.seen, full[number], before=before.result if before else None)
        with stage.placing_errors():
            ended.append(_go_on(done, ran))
        runs.append(StageRun(ran, watcher.seen.folder, "completed"))
    return ended


def _go_on(done: Done, ran: Recipe) -> Done:
    """Takes the last step again, from the checkpoint before it.

    Args:
        done: What is known of the run.
        ran: Its recipe, as it was run.
    """
    first = read_tensors(done.seen.folder / result_name(bool(done.recipe.peft)))
    return dataclasses.replace(done, first=first, again=_resume(ran, done.seen.folder))


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
        return build_empty(stand_in.config, scores=recipe.stage.scores)

    empty = build()
    parameters = sum(parameter.numel() for parameter in build_empty(stand_in.config).parameters())
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
