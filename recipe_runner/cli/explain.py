"""`recipe-run explain`: the documentation of a key, of a choice or of an error code."""

import click


@click.command(name="explain")
@click.argument("name")
def command(name: str) -> None:
    """Explain a key (training.packing_strategy), a choice (rloo), an error code (unknown-key), or methods (method).

    A key of another tool (axolotl.micro_batch_size) is explained by where it went.
    """
    from recipe_runner.importing.tools import explain_key
    from recipe_runner.recipe.explain import explain

    click.echo(explain_key(name) or explain(name))
