"""`recipe-run smoke`: executes recipes on small models of their architectures."""

from pathlib import Path

import click


@click.command(name="smoke")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--steps", type=click.IntRange(3, 100), default=4, show_default=True, help="Of the optimizer.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes that share the recipes.")
@click.option("--format", "form", type=click.Choice(["text", "json", "markdown"]), default="text", show_default=True)
@click.option("-v", "--verbose", is_flag=True, help="Also say what stands in for what, and what is excused.")
def command(paths: tuple[str, ...], steps: int, jobs: int, form: str, verbose: bool) -> None:
    """Execute recipes with everything real but size, offline: train, evaluate, save, load, resume, and check.

    The model is a small random one of the same architecture. PATH is a recipe, a folder of recipes, or the name of a
    shipped one.
    """
    from recipe_runner.cli.options import prepare_process
    from recipe_runner.recipe.library import collect_recipes
    from recipe_runner.smoke.report import smoke_all, write_line, write_summary

    files = [Path(file) for name in paths for file in collect_recipes(name)]
    prepare_process()
    outcomes = []
    for outcome in smoke_all(files, steps, jobs):
        outcomes.append(outcome)
        if form == "text":
            click.echo(write_line(outcome, verbose))
    click.echo(write_summary(outcomes, form))
    if any(outcome.failed for outcome in outcomes):
        raise SystemExit(1)
