"""`recipe-run runs`: which runs there are; removes those that failed."""

import json
from pathlib import Path
from typing import Any

import click


class _Runs(click.Group):
    """`recipe-run runs DIR` is short for `recipe-run runs list DIR`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in ("list", "rm", "-h", "--help"):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(name="runs", cls=_Runs)
def command() -> None:
    """List runs, or remove those that failed: `recipe-run runs [DIR]`, `recipe-run runs rm --failed [DIR]`."""


folder_argument = click.argument(
    "folder", metavar="[DIR]", default="runs", type=click.Path(exists=True, file_okay=False, path_type=Path)
)


@command.command(name="list")
@folder_argument
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def list_command(folder: Path, form: str) -> None:
    """List the runs in DIR (runs), the newest last."""
    from recipe_runner.problems.words import make_visible
    from recipe_runner.runs.overview import list_all, write_overview

    found = list_all(folder)
    if form == "json":
        click.echo(json.dumps(found, indent=2))
    elif found:
        click.echo(make_visible(write_overview(found)))
    else:
        click.echo(f"{folder} holds no run")


@command.command(name="rm")
@folder_argument
@click.option("--failed", is_flag=True, required=True, help="Those that failed. No other is ever removed.")
@click.option("--yes", is_flag=True, help="Don't ask.")
def remove_command(folder: Path, failed: bool, yes: bool) -> None:
    """Remove the runs in DIR (runs) that failed, with their checkpoints; asks before."""
    from recipe_runner.runs.overview import list_all, remove, write_overview

    found: list[dict[str, Any]] = [entry for entry in list_all(folder) if entry["status"] == "failed"]
    if not found:
        click.echo(f"{folder} holds no run that failed")
        return
    click.echo(write_overview(found))
    if not yes:
        click.confirm(f"Remove {'these' if len(found) > 1 else 'this'} {len(found)}, with all checkpoints?", abort=True)
    for entry in found:
        remove(Path(entry["folder"]))
    click.echo(f"{len(found)} removed")
