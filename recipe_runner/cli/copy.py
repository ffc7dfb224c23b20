"""`recipe-run copy`: puts a shipped recipe into a folder."""

from pathlib import Path

import click


@click.command(name="copy")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path), required=False)
def command(name: str, file: Path | None) -> None:
    """Copy a shipped recipe to FILE (by default NAME.yaml, here), with the paths in it made right for its new place."""
    from recipe_runner.files import write_new
    from recipe_runner.recipe.new import copy_shipped

    target = file or Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    text = copy_shipped(target.stem, name)
    write_new(target, text)
    click.echo(f"{target} is written; recipe-run {target} trains, recipe-run smoke {target} tries it small")
