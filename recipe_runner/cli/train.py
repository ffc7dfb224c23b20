"""`recipe-run RECIPE`: trains."""

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from recipe_runner.cli.options import launch_option, load_to_run, read_checked_launch, recipe_argument, set_option

if TYPE_CHECKING:
    from recipe_runner.recipe.recipe import Recipe


@click.command(name="train")
@recipe_argument
@set_option
@click.option("--output-dir", metavar="DIR", help="Folder of the run folders (run.output_dir).")
@click.option(
    "--resume",
    default="never",
    show_default=True,
    metavar="auto|never|PATH",
    help="Continue the latest unfinished run of this recipe, start anew, or continue the run in a folder.",
)
@launch_option
@click.option("--num-processes", type=int, help="With --accelerate-config: processes of all machines together.")
@click.option("--num-machines", type=int, help="With --accelerate-config: number of machines.")
@click.option("--machine-rank", type=int, help="With --accelerate-config: number of this machine, from 0.")
@click.option("--main-process-ip", help="With --accelerate-config: address of machine 0.")
@click.option("--main-process-port", type=int, help="With --accelerate-config: port of machine 0.")
@click.option("--gpu-ids", help="With --accelerate-config: GPUs of this machine to use, 0,1 for example.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    output_dir: str | None,
    resume: str,
    launch_file: str | None,
    **launcher: str | int | None,
) -> None:
    """Train from a recipe. The word `train` can be left out."""
    given = [f"--{key}={value}" for key, value in launcher.items() if value is not None]  # as accelerate spells them
    if given and launch_file is None:
        raise click.UsageError(f"{given[0].partition('=')[0].replace('_', '-')} goes with --accelerate-config")
    if output_dir is not None:
        overrides = (*overrides, f"run.output_dir={json.dumps(output_dir, ensure_ascii=False)}")
    resolved = load_to_run(recipe, overrides)
    if launch_file is not None:
        sets = [part for override in overrides for part in ("--set", override)]
        sys.exit(_start_processes(resolved, launch_file, given, ["train", recipe, *sets, "--resume", resume]))
    from recipe_runner.launch.configuration import launch_from_environment
    from recipe_runner.launch.process import outlive_readers, without_collector

    outlive_readers()
    launch = launch_from_environment(os.environ)  # now: accelerate writes into the environment, too
    with without_collector():
        from recipe_runner.training.pipeline import run_pipeline
        from recipe_runner.training.run import run_recipe
    with resolved.placing_errors():
        (run_pipeline if resolved.stages else run_recipe)(resolved, resume, launch)


def _start_processes(recipe: "Recipe", launch_file: str, options: Sequence[str], arguments: Sequence[str]) -> int:
    """Checks a launch configuration against a recipe, runs `recipe-run ARGUMENTS` in each of its processes, and waits.

    Returns:
        The exit status of the first process that failed, or 0.

    Raises:
        UserError: They contradict each other, or the processes can't be started.
    """
    launch = read_checked_launch(launch_file, options, recipe)
    from recipe_runner.launch.start import launch_run

    return launch_run(launch, options, arguments)
