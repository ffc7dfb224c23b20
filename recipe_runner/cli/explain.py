"""`recipe-run explain`: the documentation of a key or of an error code."""

import click


@click.command(name="explain")
@click.argument("name")
def command(name: str) -> None:
    """Explain a key of a recipe (training.packing_strategy), an error code (unknown-key), or every method (method)."""
    from recipe_runner.recipe.explain import explain

    click.echo(explain(name))
