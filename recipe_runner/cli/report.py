"""`recipe-run report`: the page of a run, or of several."""

from pathlib import Path

import click


@click.command(name="report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Where a page that compares runs goes.")
@click.option("--force", is_flag=True, help="Overwrite it.")
def command(runs: tuple[str, ...], output: Path | None, force: bool) -> None:
    """Write report.html of a run again, or a page that compares several runs.

    RUN is a run folder, a folder of run folders, or a recipe that has been run.
    """
    from recipe_runner.runs.find import find_run
    from recipe_runner.runs.report import compare_runs, write_report

    folders = [Path(name) if (Path(name) / "status.json").is_file() else find_run(name) for name in runs]
    if len(folders) > 1:
        written = compare_runs(folders, output or Path("comparison.html"), force)
    else:
        written = write_report(folders[0], output, force)
    click.echo(f"{written} is written")
