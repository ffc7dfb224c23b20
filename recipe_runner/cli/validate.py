"""`recipe-run validate`: checks recipes. Nothing here imports the ML stack."""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from recipe_runner.cli.options import choose_colour, launch_option, set_option
from recipe_runner.problems.errors import UserError

if TYPE_CHECKING:
    from recipe_runner.launch.configuration import Launch
    from recipe_runner.problems.problem import Problem

MANY, PART = 200, 25  # recipes from which on several processes are worth it; and how many one takes at a time


@click.command(name="validate")
@click.argument("paths", nargs=-1, required=True)
@set_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "github", "sarif"]),
    default="text",
    show_default=True,
    help="How problems are written: for people, for scripts, as GitHub annotations, for code scanning.",
)
@click.option("--strict", is_flag=True, help="Warnings fail, too.")
@click.option("--fix", is_flag=True, help="Fix renamed keys, unambiguous typos and the name; print the difference.")
@launch_option
def command(
    paths: tuple[str, ...], overrides: tuple[str, ...], form: str, strict: bool, fix: bool, launch_file: str | None
) -> None:
    """Check recipes: files, folders or names of shipped recipes. More about a problem: `recipe-run explain CODE`."""
    errors, warnings = check_recipes(paths, overrides, launch_file, form, fix, choose_colour())
    if errors or (strict and warnings):
        sys.exit(1)


def _fix(files: Sequence[Path], overrides: Sequence[str], form: str) -> None:
    """Mends recipes, and prints the differences."""
    from recipe_runner.recipe.fix import fix_file

    for file in files:
        found = _check_file(file, overrides, None)
        if found and isinstance(found, list):  # else a bug of ours: the check that follows meets it, too, and says so
            click.echo(fix_file(file, found), nl=False, err=form != "text")


def _check(
    files: Sequence[Path], overrides: Sequence[str], launch: "Launch | None"
) -> "Iterator[list[Problem] | Exception]":
    """What was found in each recipe, or a bug of ours that it met; many recipes are checked by several processes."""
    check = partial(_check_file, overrides=overrides, launch=launch)
    if len(files) < MANY:
        yield from map(check, files)
        return
    from recipe_runner.launch.process import without_collector
    from recipe_runner.workers import count_workers, work_in_order

    parts = [files[begin : begin + PART] for begin in range(0, len(files), PART)]
    task, numbers = partial(_check_part, check, parts), range(len(parts))
    fix = f"if memory ran out, check fewer than {MANY} files at a time"
    with without_collector(), work_in_order(task, numbers, count_workers(None), fix=fix) as results:
        yield from chain.from_iterable(results)


def _check_part(
    check: "Callable[[Path], list[Problem] | Exception]", parts: Sequence[Sequence[Path]], number: int
) -> "list[list[Problem] | Exception]":
    return [check(file) for file in parts[number]]


def _check_file(file: Path, overrides: Sequence[str], launch: "Launch | None") -> "list[Problem] | Exception":
    from recipe_runner.recipe.resolve import examine_recipe

    try:
        recipe, found = examine_recipe(file, overrides)
        if launch and recipe:
            from recipe_runner.launch.rules import check_launch

            found = [*found, *check_launch(launch, recipe)]
    except Exception as error:
        return error
    return list(found)


def check_recipes(
    paths: Sequence[str], overrides: Sequence[str], launch_file: str | None, form: str, fix: bool, colour: bool | None
) -> tuple[int, int]:
    """Checks recipes, alone and under a launch configuration, fixes what is asked for, and writes what was found.

    Returns:
        The number of errors, and of warnings.
    """
    from recipe_runner.recipe.library import collect_recipes

    count, launch = 0, None
    problems: list[Problem] = []
    bugs: list[Exception] = []
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
        if fix:
            _fix(files, overrides, form)
        for found in _check(files, overrides, launch):
            problems += found if isinstance(found, list) else []
            bugs += [] if isinstance(found, list) else [found]  # the other files are reported first
    problems = list(dict.fromkeys(problems))  # a recipe may be looked at twice: by itself, and as a pipeline's stage
    if problems or form in ("json", "sarif"):
        from recipe_runner.problems.writers import WRITERS  # here: most recipes are fine

        click.echo(WRITERS[form](problems), color=colour)
    errors = sum(problem.severity == "error" for problem in problems)
    warnings = len(problems) - errors
    if form in ("text", "github"):
        counts = f"{count} recipe{'s' * (count != 1)}, {errors} error{'s' * (errors != 1)}"
        click.echo(f"{counts}, {warnings} warning{'s' * (warnings != 1)}", err=bool(errors))
    if bugs:
        raise bugs[0]
    return errors, warnings
