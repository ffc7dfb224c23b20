"""`recipe-run merge`: folds an adapter into its base."""

from pathlib import Path

import click

from recipe_runner.cli.options import prepare_process


@click.command(name="merge")
@click.argument("result", metavar="RUN")
@click.option(
    "--output", type=click.Path(path_type=Path), help="A new folder; by default `merged` in the run's folder."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the merged weights; by default that of the base.",
)
@click.option("--quantize", type=click.Choice(["nf4", "int8"]), help="Quantize the merged weights by bitsandbytes.")
@click.option("--allow-loss", is_flag=True, help="Keep a merge in which layers lose what they learned.")
def command(result: str, output: Path | None, dtype: str | None, quantize: str | None, allow_loss: bool) -> None:
    """Fold the adapter of a run into its base, on the CPU, and compare both.

    RUN is a run folder, a folder of run folders, a recipe that has been run, or an adapter's folder.
    """
    prepare_process(on_cpu=True)
    from recipe_runner.launch.process import without_collector
    from recipe_runner.problems.words import write_facts

    with without_collector():
        from recipe_runner.results import gguf, merging
        from recipe_runner.results.target import find_target

    target = find_target(result)
    made = merging.merge(target, output, dtype, allow_loss, quantize)
    notes = [] if quantize or target.scores else gguf.write_modelfile(made.folder, target)
    click.echo(write_facts(merging.describe_merge(made)))
    for note in notes:
        click.echo(note)
