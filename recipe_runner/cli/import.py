"""`recipe-run import`: converts another tool's configuration into a recipe."""

from pathlib import Path

import click


@click.command(name="import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--from",
    "tool",
    type=click.Choice(["axolotl", "llamafactory", "trl", "handbook"]),
    help="Whose file it is; by its keys without it.",
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="The recipe: NAME.yaml.")
@click.option("--force", is_flag=True, help="Overwrite what is there.")
def command(file: Path, tool: str | None, output: Path | None, force: bool) -> None:
    """Convert FILE of another tool into a recipe, and say what became of each of its keys."""
    from recipe_runner.importing.write import import_file

    import_file(file, tool, output, force)
