"""`recipe-run copy`: puts a shipped recipe into a folder."""

from pathlib import Path

import click


@click.command(name="copy")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path), required=False)
def command(name: str, file: Path | None) -> None:
    """Copy a shipped recipe to FILE (by default NAME.yaml, here), with the paths in it made right for its new place."""
    from recipe_runner.cli.asking import write_recipe

    target = file or Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    write_recipe(target, source=name)
