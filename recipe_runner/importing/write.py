"""`recipe-run import`: the recipe, what stands beside it, and the report."""

import re
from pathlib import Path

import click

from recipe_runner.files import refuse_existing, write_new
from recipe_runner.importing.convert import convert_file, summarize
from recipe_runner.problems.errors import UserError
from recipe_runner.recipe.resolve import examine_recipe
from recipe_runner.recipe.schema import is_name


def import_file(file: Path, tool: str | None, output: Path | None) -> None:
    """Converts a file, writes what comes of it, and prints the report.

    Raises:
        UserError: Nothing can be made of it, a file is there already, or the recipe is not valid yet.
    """
    output = output or Path(re.sub(r"[^\w.-]+", "_", file.stem, flags=re.ASCII).lstrip("._-") + ".yaml")
    if output.suffix != ".yaml" or not is_name(output.stem):
        hint = "NAME.yaml, where NAME has letters, digits, '.', '_' and '-', a letter or digit first"
        raise click.BadParameter(hint, param_hint="--output")
    made = convert_file(file, output.stem, tool)
    beside = {output: made.recipe}
    beside |= {output.with_suffix(".jinja"): made.template} if made.template else {}
    beside |= {output.with_name(f"{output.stem}.accelerate.yaml"): made.launch} if made.launch else {}
    for path in beside:
        refuse_existing(path, "name another: --output NAME.yaml")
    for path, text in beside.items():
        write_new(path, text)
    click.echo("\n".join(summarize(made.lines)))
    click.echo(f"written: {', '.join(map(str, beside))} (from {made.tool.name} {made.tool.version})")
    _, problems = examine_recipe(output)
    if problems:
        errors = [problem for problem in problems if problem.severity == "error"]
        if errors:
            raise UserError(problems)
        click.echo("\n".join(map(str, problems)), err=True)
