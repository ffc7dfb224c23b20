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
    """List runs, or remove those that failed.

    \b
    recipe-run runs [DIR]               list them; --format json prints JSON
    recipe-run runs rm --failed [DIR]   remove those that failed; asks before
    """  # noqa: D301 (click reads the character that \b stands for)


folder_argument = click.argument("folder", metavar="[DIR]", default="runs", type=click.Path(path_type=Path))


def _open(folder: Path) -> Path:
    """The folder itself, not a link to it."""
    if folder.is_dir():
        return folder.resolve() if folder.is_symlink() or not folder.name else folder
    if str(folder) == "runs":
        click.echo("There are no runs yet: the folder runs is where they go.")
        raise click.exceptions.Exit(0)
    raise click.UsageError(f"there is no folder '{folder}'")


@command.command(name="list")
@folder_argument
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def list_command(folder: Path, form: str) -> None:
    """List the runs in DIR (runs), the newest last."""
    from recipe_runner.problems.words import make_visible
    from recipe_runner.runs.overview import list_all, write_overview

    folder = _open(folder)
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
    from recipe_runner.runs.overview import choose_failed, list_all, remove, write_overview

    folder = _open(folder)
    listed: list[dict[str, Any]] = list_all(folder)
    found, kept = choose_failed(listed)
    for place in kept:
        click.echo(f"{place} failed, and is kept: it holds runs that did not")
    if not found:
        click.echo(f"{folder} holds no run that failed{' and can be removed' * bool(kept)}")
        return
    click.echo(write_overview([entry for entry in listed if Path(entry["folder"]) in found]))
    if not yes:
        click.confirm(f"Remove {'these' if len(found) > 1 else 'this'} {len(found)}, with all checkpoints?", abort=True)
    for place in found:
        remove(place)
    click.echo(f"{len(found)} removed")
