"""`recipe-run new`: writes a new recipe."""

import sys
from pathlib import Path

import click

from recipe_runner.files import write_new
from recipe_runner.recipe.new import WAYS, compose, copy_shipped, stage_for
from recipe_runner.recipe.resolve import examine_recipe
from recipe_runner.stages import FORMATS, STAGES


@click.command(name="new")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", metavar="ID|FOLDER", help="Base model.")
@click.option("--format", "form", type=click.Choice(list(FORMATS)), help="Layout of the data.")
@click.option("--stage", type=click.Choice(list(STAGES)), help="Training stage; the layout must suit it.")
@click.option("--method", "way", type=click.Choice(WAYS), help="What is trained.")
@click.option("--data", metavar="ID|FILE", help="Hub id or file of the data.")
@click.option("--from", "source", metavar="NAME", help="Start from a shipped recipe instead.")
def command(file: Path, model: str, form: str, stage: str | None, way: str, data: str, source: str | None) -> None:
    """Write a new recipe to FILE (NAME.yaml). What no option says is asked."""
    if file.suffix != ".yaml":
        raise click.BadParameter("give a name that ends with .yaml", param_hint="FILE")
    fitting = [name for name in FORMATS if stage_for(name) == stage]
    form = form or (fitting[0] if len(fitting) == 1 else "")
    if stage and form and stage_for(form) != stage:
        raise click.BadParameter(f"format {form} is for stage {stage_for(form)}", param_hint="--stage")
    if source:
        text = copy_shipped(file.stem, source)
    else:
        try:
            model = model or click.prompt("Base model (hub id or folder)", default="microsoft/Phi-3-mini-4k-instruct")
            form = form or click.prompt("Layout of the data", type=click.Choice(list(FORMATS)), default="chat")
            way = way or click.prompt("Method", type=click.Choice(WAYS), default="qlora")
            data = data or click.prompt("Data (hub id or file)")
        except click.Abort as error:
            if sys.stdin.isatty():  # Ctrl-C
                raise
            needed = "there is nobody to ask: give --model, --format, --method and --data, or --from"
            raise click.UsageError(needed) from error
        text = compose(file.stem, model, form, way, data)
    write_new(file, text)
    for problem in examine_recipe(file)[1]:
        click.echo(problem, err=True)
    click.echo(f"{file} is written; recipe-run {file} trains")
