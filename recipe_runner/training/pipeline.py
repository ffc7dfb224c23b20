"""A pipeline's run: its recipes one after another, each from the result of the one before."""

import contextlib
import gc
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from recipe_runner.launch.configuration import Launch
from recipe_runner.problems.errors import Interrupted, UserError, user_error
from recipe_runner.recipe.chain import with_reward
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.runs import folder as run_folder
from recipe_runner.runs.effects import write_effects
from recipe_runner.runs.report import leave_report
from recipe_runner.runs.stages import StageRun, inspect_stage, inspect_stages, start_from, write_pipeline_status
from recipe_runner.training.prepare import ADAPTER, BASE, BASE_CONFIG, TOKENIZER, prepare
from recipe_runner.training.resume import CODE, check_rows
from recipe_runner.training.run import Watch, agree, run_recipe


def run_pipeline(recipe: Recipe, resume: str, launch: Launch | None = None, watch: Watch | None = None) -> Path:
    """Runs the stages of a pipeline that are not done yet, and returns the pipeline's run folder.

    Everything but the weights is prepared and checked for all stages before the first of them trains. For the arguments
    see `run.run_recipe`.

    Raises:
        UserError: A recipe, the data or the environment is at fault.
        Interrupted: The user pressed Ctrl-C.
    """
    run_folder.check_writable(recipe.home.parent)
    found = run_folder.find_pipeline(recipe.home, resume)
    made_from = prepare_stages(recipe, launch)
    runs = _inspect(recipe, found, made_from) if found else []
    if found and all(run.is_done for run in runs):
        if resume != "auto":
            message = f"the pipeline's run in {found} is complete, and nothing has changed"
            raise user_error("run-completed", message, "start a new one: --resume never")
        found = None
    main = PartialState().is_main_process
    found = agree(found)
    folder = found or agree(run_folder.create_run_folder(recipe.home, recipe.text, recipe.values) if main else None)
    assert folder is not None
    runs = runs if found else _inspect(recipe, folder, made_from)
    count = len(recipe.stages)
    with _recorded(recipe, folder, runs, main):
        for place, stage in enumerate(recipe.stages):
            _tell(main, place, count, runs[place])
            if not runs[place].is_done:
                link = recipe.links[place]
                before, judge = (None if of is None else runs[of] for of in (link.before, link.reward))
                ready = start_from(stage, before, folder / str(place + 1), judge)
                resumed = runs[place].folder if _can_resume(runs[place]) else None
                runs[place] = StageRun(ready, resumed, "running")
                if main:
                    write_pipeline_status(folder, "running", runs)
                with ready.placing_errors():
                    done = run_recipe(ready, str(resumed) if resumed else "never", launch, watch)
                runs[place] = StageRun(ready, done, "completed")
                gc.collect()  # the model of this stage, before that of the next is loaded
                if torch.accelerator.is_available():
                    torch.accelerator.empty_cache()
        if main:
            effects = write_effects(recipe, folder, runs)
            write_pipeline_status(folder, "completed", runs)
            leave_report(folder)
            print(f"\n{effects}\n\nCompleted: {folder} (report: report.html)", flush=True)
    return folder


def prepare_stages(pipeline: Recipe, launch: Launch | None) -> list[dict[str, str]]:
    """Prepares the data of all stages and checks everything but the weights, which an earlier one may still train.

    Returns:
        Of each stage, what it is made from and no earlier one makes -> its hash: data files (or hub ids), rewards, the
        model that the first one starts from.
    """
    made_from: list[dict[str, str]] = []
    tokenizers: list[PreTrainedTokenizerBase] = []
    for stage, link in zip(pipeline.stages, pipeline.links, strict=True):
        with stage.placing_errors():
            known = stage if link.reward is None else with_reward(stage, None)
            ready = prepare(known, launch, None if link.before is None else tokenizers[link.before])
            held_out = len(ready.evaluation.dataset) if ready.evaluation else None
            check_rows(len(ready.train.dataset), held_out, ready.config)
        tokenizers.append(ready.tokenizer)
        given = () if link.before is None else (BASE, BASE_CONFIG, TOKENIZER, ADAPTER)
        made_from.append(ready.data.files | {name: of for name, of in ready.inputs.items() if name not in given})
    return made_from


def _inspect(pipeline: Recipe, folder: Path, made_from: list[dict[str, str]]) -> list[StageRun]:
    """Where each stage stands; what is made from something that has changed is stale, and what takes from it, too.

    A reward function may be fixed while a stage waits to go on: it goes on with it as it is now.
    """
    runs = inspect_stages(pipeline, folder)
    for place, run in enumerate(runs):
        done = run.status == "completed"
        counted = {name: of for name, of in made_from[place].items() if done or not name.startswith(CODE)}
        if run.folder and not run.stale and (changed := run_folder.find_outdated(run.folder, counted)):
            runs[place] = replace(run, stale=changed)
        for of in pipeline.links[place].places:
            if runs[of].stale and runs[place].folder and not runs[place].stale:
                why = f"the stage before it, {runs[of].recipe.name}, runs again"
                runs[place] = replace(runs[place], stale=why)
    return runs


def _can_resume(run: StageRun) -> bool:
    """Whether the latest run of a stage goes on where it stopped."""
    return bool(run.folder and not run.stale and run_folder.last_checkpoint(run.folder))


def _tell(main: bool, place: int, count: int, run: StageRun) -> None:
    if not main:
        return
    said = f"Stage {place + 1} of {count}: {run.recipe.name} ({run.recipe.stage.name})"
    if run.is_done:
        print(f"{said}: complete, kept: {run.folder}", flush=True)
    elif run.stale:
        print(f"{said}: stale ({run.stale}): it runs again; the old run is kept: {run.folder}", flush=True)
    elif _can_resume(run):
        print(f"{said}: goes on where it stopped", flush=True)
    else:
        print(said, flush=True)


@contextlib.contextmanager
def _recorded(recipe: Recipe, folder: Path, runs: list[StageRun], main: bool) -> Iterator[None]:
    """Leaves the right status in the pipeline's folder, whatever happens."""

    def write(status: str, **details: str) -> None:
        for place, run in enumerate(runs):
            if run.status == "running":
                latest = inspect_stage(run.recipe, [runs[of] for of in recipe.links[place].places])
                runs[place] = replace(latest, status=status) if latest.status == "running" else latest
        if main:
            write_pipeline_status(folder, status, runs, **details)
            leave_report(folder)

    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        write("interrupted")
        if isinstance(error, Interrupted):
            raise Interrupted(f"{str(error).split(';')[0]}; continue with: --resume {folder}", error.number) from error
        raise
    except BaseException as error:
        write("failed", error=str(error) or type(error).__name__)
        if isinstance(error, UserError) and main:
            print(f"The stages before are kept; once this is fixed, go on with: --resume {folder}", file=sys.stderr)
        raise
