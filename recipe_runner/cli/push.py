"""`recipe-run push`: publishes a result on the hub."""

import tempfile
from pathlib import Path

import click

from recipe_runner.cli.options import prepare_process


@click.command(name="push")
@click.argument("result", metavar="RUN")
@click.option("--repo", "repository", metavar="ID", help="On the hub: account/name. By default the recipe's name.")
@click.option("--merged", is_flag=True, help="Publish the merged model instead of the adapter.")
@click.option("--base-model", metavar="ID", help="The base on the hub, where training took it from a folder.")
@click.option("--private", is_flag=True, help="Only you see it.")
@click.option("--update", is_flag=True, help="Write into a repository that is there already.")
@click.option("--dry-run", is_flag=True, help="Show files and card; send nothing.")
def command(
    result: str,
    repository: str | None,
    merged: bool,
    base_model: str | None,
    private: bool,
    update: bool,
    dry_run: bool,
) -> None:
    """Publish the result of a run on the Hugging Face hub, with its card.

    The token is the one of `hf auth login` or HF_TOKEN; it is written nowhere.
    """
    prepare_process(on_cpu=True)
    from recipe_runner.problems.words import make_visible
    from recipe_runner.results import publishing
    from recipe_runner.results.target import explaining, find_target

    target = find_target(result)
    name = repository or (target.recipe.name if target.recipe else Path(target.result).name)
    with explaining("close other programs"), tempfile.TemporaryDirectory(prefix="recipe-run-push-") as folder:
        upload = publishing.stage_upload(target, merged, base_model, name, Path(folder), private)
        files = publishing.list_files(upload)
        if upload.left:
            click.echo(f"left here: {', '.join(upload.left)}", err=True)
        if dry_run:
            click.echo(f"would be sent to {name}{' (private)' * private}:")
            for file, size in files:
                click.echo(f"  {size:>15,} bytes  {file}")
            click.echo(f"\n{make_visible((upload.folder / 'README.md').read_text(encoding='utf-8'))}")
            return
        click.echo(f"{len(files)} files, {sum(size for _, size in files):,} bytes, to {name} ...", err=True)
        click.echo(publishing.send(upload, update))
