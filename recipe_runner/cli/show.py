"""`recipe-run show`: the resolved recipe."""

import click

from recipe_runner.cli.options import recipe_argument, set_option


@click.command(name="show")
@recipe_argument
@set_option
def command(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print a recipe as it is run: extended, overridden, with defaults and absolute paths."""
    from recipe_runner.recipe.document import dump_values
    from recipe_runner.recipe.resolve import load_recipe

    click.echo(dump_values(dict(load_recipe(recipe, overrides).values)), nl=False)
