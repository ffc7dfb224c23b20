"""Which run is meant: by its folder, by its result, by the folder of several runs, or by its recipe."""

from pathlib import Path

from recipe_runner.files import list_runs, read_object, read_status
from recipe_runner.problems.errors import UserError, user_error
from recipe_runner.recipe.library import SUFFIXES, shipped_recipes
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.resolve import load_recipe
from recipe_runner.runs.folder import result_name

FIX = "name a run folder, a folder of run folders, or a recipe that has been run"


def find_run(name: str) -> Path:
    """The run folder that a name stands for; of a pipeline that of its last stage. It may be of any status.

    Args:
        name: A run folder, a result in it, a folder of run folders (the latest completed one counts), or a recipe.

    Raises:
        UserError: There is none.
    """
    if run := seek_run(name):
        return run
    raise user_error("run-not-found", f"{name} is no run, and has none that is completed", FIX)


def seek_run(name: str) -> Path | None:
    """As `find_run`; None where there is no run."""
    folder = Path(name)
    if folder.is_dir():
        if (folder / "status.json").is_file():
            return last_stage(folder)
        if folder.name in (result_name(True), result_name(False)) and (folder.parent / "status.json").is_file():
            return folder.parent
        return latest_completed(folder)
    return latest_completed(load_recipe(name).home) if names_recipe(name) else None


def names_recipe(name: str) -> bool:
    """Whether a name is a recipe's: a YAML file, or a shipped recipe."""
    return Path(name).suffix in SUFFIXES or name in {file.stem for file in shipped_recipes()}


def latest_completed(home: Path) -> Path | None:
    """The latest completed run in a folder of run folders."""
    done = [run for run in list_runs(home) if read_status(run) == "completed"]
    return last_stage(done[-1]) if done else None


def last_stage(run: Path) -> Path:
    """The run of a pipeline's last stage that has one; of any other run, itself."""
    stages = read_object(run / "status.json").get("stages")
    named = [stage.get("run") for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    return last_stage(run / str(named[-1])) if named and named[-1] else run


def recipe_of(run: Path, *overrides: str) -> Recipe:
    """The recipe that a run was made with, as it was resolved.

    Raises:
        UserError: It is not valid for this version.
    """
    file = run / "resolved.yaml"
    if not file.is_file():
        raise user_error("not-a-run", f"{run} has no resolved.yaml", FIX)
    try:
        return load_recipe(str(file), overrides)
    except UserError as error:
        if overrides:
            raise
        wrong = next(problem for problem in error.problems if problem.severity == "error")
        message = f"{run} was made by another version: its recipe is not valid here: {wrong}"
        raise user_error("other-version", message, "run its recipe.yaml again, or use the version of then") from error
