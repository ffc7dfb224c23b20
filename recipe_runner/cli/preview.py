"""`recipe-run preview`: rows as the model sees them."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recipe_runner.cli.options import (
    choose_colour,
    launch_option,
    load_to_run,
    read_checked_launch,
    recipe_argument,
    set_option,
)
from recipe_runner.problems.errors import UserError, user_error

if TYPE_CHECKING:
    from recipe_runner.recipe.recipe import Recipe

OF_HUB = ("hub-unreachable", "dataset-unavailable")  # codes of what is on the hub, and not here
UNREACHED = (*OF_HUB, "model-not-found")


@click.command(name="preview")
@recipe_argument
@set_option
@click.option("-n", "number", type=click.IntRange(1, 1000), default=3, show_default=True, help="Rows to show.")
@click.option(
    "--row", type=click.IntRange(1), metavar="I", help="Show row I of the data, as it is in its files, instead."
)
@click.option(
    "--worst", type=click.IntRange(1, 1000), metavar="N", help="Show the N rows that a run learned the least, instead."
)
@click.option("--run", "judged", metavar="RUN", help="The run of --worst, whose rows `evaluate --rows` has judged.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--html", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="Write a page to FILE.")
@click.option("--rows-only", is_flag=True, help="Leave out the accounting, which reads all rows.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@launch_option
@click.option("--num-processes", type=click.IntRange(1), help="Count steps for so many processes.")
@click.option(
    "--write-template",
    "template",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Only write the chat template with {% generation %} marks to FILE (.jinja).",
)
def command(
    recipe: str,
    overrides: tuple[str, ...],
    template: Path | None,
    launch_file: str | None,
    num_processes: int | None,
    judged: str | None,
    **options: Any,
) -> None:
    """Show what the model will see, and which tokens it learns: rows, then what becomes of all rows. Loads no weights.

    Supervised tokens are green; without colour (NO_COLOR, a pipe) they stand in [[double brackets]].
    """
    from recipe_runner.launch.process import without_collector

    if (judged is None) != (options["worst"] is None) or (judged and options["row"]):
        raise click.UsageError("--worst N and --run RUN go together, and without --row")
    if judged:
        from recipe_runner.runs.find import find_run

        options["run"] = find_run(judged)
    try:
        resolved = load_to_run(recipe, overrides)
    except UserError as error:
        key = ("training", "chat_template_path")
        if not template or {problem.path for problem in error.problems if problem.severity == "error"} != {key}:
            raise
        resolved = load_to_run(recipe, (*overrides, f"{'.'.join(key)}=null"))  # it is the file that is to be written
    with resolved.placing_errors():
        if resolved.stages:
            fix = "preview one of them: " + ", ".join(str(stage.file) for stage in resolved.stages)
            told = "the rows of a pipeline are those of its stages"
            raise user_error("pipeline-has-no-rows", told, fix, path=("stages",))
        if template:
            from recipe_runner.model.tokenizer import write_training_template

            write_training_template(resolved.model, resolved.training["chat_template_path"], template)
            click.echo(f"{template} is written; set training.chat_template_path to it")
            return
        with without_collector():
            from recipe_runner.preview import preview_recipe

        processes = num_processes or 1
        if launch_file is not None:  # of any machine: none of its processes is started
            given = [f"--num_processes={num_processes}"] if num_processes else []
            processes = read_checked_launch(launch_file, given, resolved).processes
        colour = choose_colour() is None and sys.stdout.isatty()
        try:
            for part in preview_recipe(resolved, colour=colour, processes=processes, **options):
                click.echo(part)
        except UserError as error:
            if not {problem.code for problem in error.problems} & set(UNREACHED):
                raise
            _preview_sample(resolved, error, colour=colour, processes=processes, **options)


def _preview_sample(recipe: "Recipe", error: UserError, **options: Any) -> None:
    """Shows sample rows where the model or the data is not reached.

    Raises:
        UserError: `error`, where the recipe names no sample rows; or something is wrong with them.
    """
    if not (recipe.values.get("metadata") or {}).get("sample"):
        other = "or name a file with some rows in the layout of the data: metadata.sample"
        raise UserError(
            [
                replace(problem, suggestion=f"{problem.suggestion}; {other}") if problem.code in OF_HUB else problem
                for problem in error.problems
            ]
        ) from error
    from recipe_runner.preview import preview_recipe
    from recipe_runner.smoke.shrink import apart, sample_recipe

    with tempfile.TemporaryDirectory(prefix="recipe-run-preview-") as folder, apart(Path(folder)):
        sampled, told = sample_recipe(recipe, Path(folder))
        click.echo(f"{error.problems[0].message}: shown are {told}\n", err=True)
        for part in preview_recipe(sampled, **options):
            click.echo(part)
