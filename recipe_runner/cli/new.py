"""`recipe-run new`: writes a new recipe."""

from pathlib import Path
from typing import Any

import click

from recipe_runner.cli.options import StageChoice
from recipe_runner.methods import WAYS
from recipe_runner.stages import FORMATS, STAGES


@click.command(name="new")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", metavar="ID|FOLDER", help="Base model.")
@click.option("--format", "form", type=click.Choice(list(FORMATS)), help="Layout of the data.")
@click.option("--stage", type=StageChoice(list(STAGES)), help="Training stage; the layout must suit it.")
@click.option("--method", "way", type=click.Choice(WAYS), help="What is trained.")
@click.option("--data", metavar="ID|FILE", help="Hub id or file of the data.")
@click.option("--column", "given", multiple=True, metavar="ROLE=NAME", help="Column for a role. Repeatable.")
@click.option("--from", "source", metavar="NAME", help="Start from a shipped recipe instead.")
def command(**options: Any) -> None:
    """Write a new recipe to FILE (NAME.yaml). What no option says is asked; columns are taken from local data."""
    from recipe_runner.cli.asking import write_recipe

    write_recipe(**options)
