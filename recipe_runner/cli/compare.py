"""`recipe-run compare`: a recipe with something varied, run and measured, side by side."""

from pathlib import Path

import click


@click.command(name="compare")
@click.argument("study", metavar="STUDY|RECIPE")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="A key of all variants; a list varies it: --set training.learning_rate=[1e-4,3e-4]. Repeatable.",
)
@click.option(
    "--output-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs") / "studies",
    show_default=True,
    help="Folder of the studies' folders.",
)
def command(study: str, overrides: tuple[str, ...], output_dir: Path) -> None:
    """Run the variants of a study one after another, measure each result, and write a table, a plot and a page.

    The same command goes on where it was interrupted, and keeps what is done. A recipe with --set KEY=[A,B] is a study,
    too.
    """
    from recipe_runner.cli.options import prepare_process
    from recipe_runner.problems.writers import write_text
    from recipe_runner.studies.study import read_study

    read = read_study(study, overrides)
    if read.refused:
        click.echo(write_text([problem for _, problem in read.refused]), err=True)
    prepare_process()
    from recipe_runner.studies.runs import run_study
    from recipe_runner.studies.table import PAGE, summarize, write_results, write_text_tables

    folder = (output_dir / read.name).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = run_study(read, folder, click.echo, lambda known: write_results(read, known, folder))
    click.echo(f"\n{write_text_tables(summarize(read, outcomes))}\n\nwritten: {folder / PAGE}")
    if read.refused or any(outcome.failure for outcome in outcomes):
        raise SystemExit(1)
