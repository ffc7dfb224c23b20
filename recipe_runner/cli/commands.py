"""Commands that need more than a few lines, and no ML stack of their own."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from recipe_runner.problems.errors import UserError
from recipe_runner.problems.problem import Problem
from recipe_runner.recipe.library import collect_recipes, shipped_recipes
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.resolve import examine_recipe, load_recipe

if TYPE_CHECKING:  # what only some calls need is imported by them: a recipe is checked in a tenth of a second
    from recipe_runner.launch.configuration import Launch


def check_recipes(
    paths: Sequence[str], overrides: Sequence[str], launch_file: str | None, form: str, fix: bool, colour: bool | None
) -> tuple[int, int]:
    """Checks recipes, alone and under a launch configuration, mends what is asked for, and writes what was found.

    Returns:
        The number of errors, and of warnings.
    """
    count, launch = 0, None
    problems: list[Problem] = []
    if launch_file is not None:
        from recipe_runner.launch.configuration import find_launch, read_launch

        try:
            launch = read_launch(find_launch(launch_file))
        except UserError as error:
            problems += error.problems
    for path in paths:
        try:
            files = collect_recipes(path)
        except UserError as error:
            problems += error.problems
            continue
        count += len(files)
        for file in files:
            recipe, found = examine_recipe(file, overrides)
            if fix and found:
                from recipe_runner.recipe.fix import fix_file

                click.echo(fix_file(file, found), nl=False, err=form != "text")
                recipe, found = examine_recipe(file, overrides)
            problems += [*found, *_check_under(launch, recipe)]
    problems = list(dict.fromkeys(problems))  # a recipe may be looked at twice: by itself, and as a pipeline's stage
    if problems or form in ("json", "sarif"):
        from recipe_runner.problems.writers import (
            FORMATS,  # here: most recipes are fine, and wait for nothing that they don't need
        )

        click.echo(FORMATS[form](problems), color=colour)
    errors = sum(problem.severity == "error" for problem in problems)
    warnings = len(problems) - errors
    if form in ("text", "github"):
        counts = f"{count} recipe{'s' * (count != 1)}, {errors} error{'s' * (errors != 1)}"
        click.echo(f"{counts}, {warnings} warning{'s' * (warnings != 1)}", err=bool(errors))
    return errors, warnings


def _check_under(launch: "Launch | None", recipe: Recipe | None) -> list[Problem]:
    """What contradicts a launch configuration in a recipe, or in the stages of a pipeline."""
    if launch is None or recipe is None:
        return []
    from recipe_runner.launch.rules import check_launch

    stages = recipe.stages or (recipe,)
    return list(dict.fromkeys(problem for stage in stages for problem in check_launch(launch, stage.values)))


def list_recipes(form: str) -> str:
    """The shipped recipes, one a line or as JSON."""
    rows: list[dict[str, Any]] = []
    for file in shipped_recipes():
        recipe = load_recipe(str(file))
        first = (recipe.stages or (recipe,))[0].values
        row = {key: recipe.values.get(key) for key in ("name", "stage", "description")}
        rows.append(row | {"model": first["model"]["name_or_path"], "file": str(file)})
    if form == "json":
        return json.dumps(rows, indent=2)
    names, stages = (max(len(row[key]) for row in rows) for key in ("name", "stage"))
    return "\n".join(f"{row['name']:<{names}}  {row['stage']:<{stages}}  {row['description']}" for row in rows)


def start_processes(recipe: Recipe, launch_file: str, options: Sequence[str], command: Sequence[str]) -> int:
    """Checks a launch configuration against a recipe, runs `recipe-run COMMAND` in each of its processes, and waits.

    Returns:
        The exit status of the first process that failed, or 0.

    Raises:
        UserError: They contradict each other, or the processes can't be started.
    """
    from recipe_runner.launch.configuration import find_launch, read_launch

    launch = read_launch(find_launch(launch_file))
    given = dict(option.removeprefix("--").split("=", 1) for option in options)
    numbers = {key: int(value) if value.isdigit() else value for key, value in given.items()}
    launch = replace(launch, values=launch.values | numbers)
    problems = _check_under(launch, recipe)
    if any(problem.severity == "error" for problem in problems):
        raise UserError(problems)
    for problem in problems:
        click.echo(problem, err=True)
    from recipe_runner.launch.start import launch_run

    return launch_run(launch, options, command)
