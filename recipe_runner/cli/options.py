"""Options and arguments that several commands share, and how a command gets its recipe."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from recipe_runner.launch.configuration import Launch
    from recipe_runner.recipe.recipe import Recipe

recipe_argument = click.argument("recipe")
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key: --set training.max_steps=10. Repeatable.",
)
launch_option = click.option(
    "--accelerate-config",
    "launch_file",
    metavar="FILE|NAME",
    help="Launch configuration of accelerate: a file, or the name of a shipped one (deepspeed_zero3).",
)


dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights. By default float32 on a CPU, and as they were published on a GPU.",
)
quantized_option = click.option(
    "--quantized/--no-quantized",
    default=True,
    show_default=True,
    help="Whether the base is quantized as it was in training.",
)


seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=42,
    show_default=True,
    help="Of what is drawn: sampled words, examples, intervals.",
)


class Number(click.FloatRange):
    """A number in a range. click takes nan, which is in no range, for one of any."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number that a text stands for."""
        number = super().convert(value, param, ctx)
        return self.fail("it is no number", param, ctx) if number != number else number


class StageChoice(click.Choice[str]):
    """A training stage; of one that TRL has removed it says what took its place."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The stage that a text stands for."""
        from recipe_runner.recipe.schema import load

        if why := load()["properties"]["stage"]["x-removed-choices"].get(value):
            self.fail(f"{value}: {why}", param, ctx)
        return super().convert(value, param, ctx)


def read_checked_launch(launch_file: str, given: Sequence[str], recipe: "Recipe") -> "Launch":
    """A launch configuration, with options of the command line (`--num_processes=2`), checked against a recipe.

    Raises:
        UserError: It can't be read, or contradicts the recipe.
    """
    from recipe_runner.launch.configuration import change_launch, find_launch, read_launch
    from recipe_runner.launch.rules import check_launch
    from recipe_runner.problems.errors import UserError

    launch = change_launch(read_launch(find_launch(launch_file)), given)
    problems = check_launch(launch, recipe)
    if any(problem.severity == "error" for problem in problems):
        raise UserError(problems)
    for problem in problems:
        click.echo(problem, err=True)
    return launch


def choose_colour() -> bool | None:
    """None: click decides by whether it writes to a terminal. Source: no-color.org."""
    return False if os.environ.get("NO_COLOR") else None


def load_to_run(name: str, overrides: Sequence[str]) -> "Recipe":
    """Loads a recipe for a command that needs the ML stack, and says what validation warns about.

    Raises:
        UserError: The recipe has errors, or the ML stack is not installed.
    """
    from recipe_runner.recipe.resolve import load_recipe

    recipe = load_recipe(name, overrides)
    said = "RECIPE_RUN_LAUNCH" in os.environ or os.environ.get("RANK", "0") != "0"  # by who started this process
    for warning in () if said else recipe.warnings:
        click.echo(warning, err=True)
    from recipe_runner.launch.process import is_told_deepspeed
    from recipe_runner.recipe.rules.packages import find_unused

    stages = recipe.stages or (recipe,)
    unused = find_unused(stages, is_told_deepspeed())
    prepare_process(on_cpu=any(stage.training["use_cpu"] for stage in stages), unused=unused)
    return recipe


def prepare_process(on_cpu: bool = False, unused: Sequence[str] = ()) -> None:
    """Sets a process up for a command that needs the ML stack.

    Raises:
        UserError: It is not installed.
    """
    from recipe_runner.launch.process import set_up_process
    from recipe_runner.problems.errors import user_error
    from recipe_runner.recipe.rules.packages import is_installed

    if not is_installed("trl"):  # installed without dependencies, to validate only
        fix = "pip install recipe-runner, with its dependencies"
        raise user_error("training-stack-missing", "TRL is not installed: recipes can be checked here, not run", fix)
    set_up_process(on_cpu, unused)
