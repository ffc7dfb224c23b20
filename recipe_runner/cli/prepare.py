"""`recipe-run prepare`: formats and tokenizes the data outside the launcher."""

import click

from recipe_runner.cli.options import choose_colour, load_to_run, recipe_argument, set_option


@click.command(name="prepare")
@recipe_argument
@set_option
def command(recipe: str, overrides: tuple[str, ...]) -> None:
    """Format and tokenize the data now, outside the launcher; training finds it prepared until something changes."""
    resolved = load_to_run(recipe, overrides)
    from recipe_runner.launch.process import without_collector

    with without_collector():
        from recipe_runner.preview import prepare_recipe

    for stage in resolved.stages or (resolved,):
        with stage.placing_errors():
            for part in prepare_recipe(stage):
                click.echo(part, color=choose_colour())
