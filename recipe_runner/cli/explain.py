"""`recipe-run explain`: the documentation of a key, of a choice or of an error code."""

import click


@click.command(name="explain")
@click.argument("name")
def command(name: str) -> None:
    """Explain a key (training.packing_strategy), a choice (rloo), an error code (unknown-key), or methods (method)."""
    from recipe_runner.recipe.explain import explain

    click.echo(explain(name))
