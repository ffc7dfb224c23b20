"""`recipe-run evaluate`: measures a model on data that it was not trained on."""

import contextlib
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from recipe_runner.cli.options import dtype_option, prepare_process, quantized_option, seed_option
from recipe_runner.problems.errors import user_error

# Parameters that are about answers -> their options.
ANSWERING = {"few_shot": "--few-shot", "scorers": "--scorer", "tasks": "--tasks"}
ANSWERING |= {"max_new_tokens": "--max-new-tokens", "batch_size": "--batch-size"}

OF_DATA = {"data": "--data", "form": "--data-format", "columns": "--column", "output": "--output", "shown": "--format"}


@click.command(name="evaluate")
@click.argument("result", metavar="RUN|RECIPE|MODEL")
@click.option("--data", metavar="FILE|ID", help="Rows to evaluate on, instead of the recipe's evaluation data.")
@click.option("--data-format", "form", help="Layout of --data for a model without a recipe; guessed by its columns.")
@click.option(
    "--column", "columns", multiple=True, metavar="ROLE=NAME", help="Column of --data for a role. Repeatable."
)
@click.option("--limit", type=click.IntRange(1), help="The most rows.")
@click.option("--few-shot", type=click.IntRange(0, 100), default=0, help="Also ask the base with k training examples.")
@click.option("--scorer", "scorers", multiple=True, metavar="NAME", help="How answers are scored. Repeatable.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Of an answer.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Prompts at a time.")
@seed_option
@click.option("--rows", "every_row", is_flag=True, help="Judge every row of a run instead: its loss before and after.")
@click.option("--tasks", metavar="NAMES", help="Also run these tasks of lm-eval, with commas between, or task files.")
@click.option("--output", type=click.Path(path_type=Path), help="A new folder for the figures and the answers.")
@click.option("--format", "shown", type=click.Choice(["text", "json"]), default="text", show_default=True)
@dtype_option
@quantized_option
def command(
    result: str,
    data: str | None,
    form: str | None,
    columns: tuple[str, ...],
    limit: int | None,
    few_shot: int,
    scorers: tuple[str, ...],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    every_row: bool,
    tasks: str | None,
    output: Path | None,
    shown: str,
    dtype: str | None,
    quantized: bool,
) -> None:
    """Measure a model and its base: loss, accuracy, answers. Figures come with 95 % intervals.

    Scorers: exact_match, normalized_match, json, json:KEY, regex:PATTERN, rouge1, rouge2, rougeL.
    """
    prepare_process()
    from recipe_runner.launch.process import without_collector

    with without_collector():
        from recipe_runner.results import evaluation_report
        from recipe_runner.results.target import explaining, find_target

    if columns and not data:
        raise click.UsageError("--column goes with --data")
    with explaining("lower --batch-size, or take a smaller --dtype", place=output):
        target = find_target(result)
        if every_row:
            _judge_rows(target, limit, dtype, quantized)
            return
        recipe = evaluation_report.choose_recipe(target, data, form, columns)
        if recipe.stage.scores:
            _refuse_answering(target.name)
        folder = evaluation_report.new_folder(target, output)
        with recipe.placing_errors() if target.recipe else contextlib.nullcontext():
            values = evaluation_report.run_evaluation(
                target, recipe, folder, tasks, limit=limit, shots=few_shot, scorers=scorers or None,
                batch_size=batch_size, new_tokens=max_new_tokens, seed=seed, dtype=dtype, quantized=quantized,
                tell=lambda text: click.echo(text, err=True),
            )  # fmt: skip
    click.echo(evaluation_report.write_values(values, shown))
    click.echo(f"{folder} is written", err=True)


def _judge_rows(target: Any, limit: int | None, dtype: str | None, quantized: bool) -> None:
    """Writes the ledger of a run, and says what is in it."""
    from recipe_runner.results.ledger import write_ledger
    from recipe_runner.runs.ledger import summarize

    source = click.get_current_context().get_parameter_source
    for parameter, option in (ANSWERING | OF_DATA).items():
        if source(parameter) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--rows judges the rows of a run, without answers: leave out {option}")
    with target.recipe.placing_errors() if target.recipe else contextlib.nullcontext():
        file, entries = write_ledger(target, limit, dtype, quantized, lambda text: click.echo(text, err=True))
    click.echo(summarize(entries))
    shown = f"recipe-run preview {target.recipe.file} --worst 20 --run {target.run}"
    click.echo(f"{file} is written; show rows of it: {shown}")


def _refuse_answering(name: str) -> None:
    """A reward model has no answers.

    Raises:
        UserError: An option about answers was given.
    """
    source = click.get_current_context().get_parameter_source
    for parameter, option in ANSWERING.items():
        if source(parameter) is ParameterSource.COMMANDLINE:
            message = f"{name} is a reward model: it ranks answers and writes none, and {option} is about those"
            raise user_error("reward-model", message, f"leave out {option}")
