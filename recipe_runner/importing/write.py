"""`recipe-run import`: the recipe, what stands beside it, and the report."""

import re
from pathlib import Path

import click

from recipe_runner.files import refuse_existing, write_new, write_text
from recipe_runner.importing.convert import convert_file, summarize
from recipe_runner.problems.errors import UserError
from recipe_runner.recipe.resolve import examine_recipe
from recipe_runner.recipe.schema import is_name


def import_file(file: Path, tool: str | None, output: Path | None, force: bool) -> None:
    """Converts a file, writes what comes of it, and prints the report.

    Raises:
        UserError: Nothing can be made of it, a file is there already, or the recipe is not valid yet.
    """
    if output is None:
        name = re.sub(r"[^\w.-]+", "_", file.stem, flags=re.ASCII).strip("._-") or "imported"
        output = Path(f"{name}.yaml")
        output = output.with_stem(f"{name}_recipe") if output.absolute() == file.absolute() else output
    if output.suffix != ".yaml" or not is_name(output.stem):
        hint = "NAME.yaml, where NAME has letters, digits, '.', '_' and '-', a letter or digit first"
        raise click.BadParameter(hint, param_hint="--output")
    if not output.parent.is_dir():
        raise click.BadParameter(f"there is no folder {output.parent}", param_hint="--output")
    made = convert_file(file, output.stem, tool, output.parent)
    beside = {output: made.recipe}
    beside |= {output.with_suffix(".jinja"): made.template} if made.template else {}
    beside |= {output.with_name(f"{output.stem}.accelerate.yaml"): made.launch} if made.launch else {}
    for path in beside if not force else ():
        refuse_existing(path, "name another: --output NAME.yaml, or overwrite it: --force")
    for path, text in beside.items():
        write_text(path, text) if force else write_new(path, text)
    click.echo("\n".join(summarize(made.lines)))
    click.echo(f"written: {', '.join(map(str, beside))} (from {made.tool.name} {made.tool.version})")
    _, problems = examine_recipe(output)
    if problems:
        errors = [problem for problem in problems if problem.severity == "error"]
        if errors:
            raise UserError(problems)
        click.echo("\n".join(map(str, problems)), err=True)
