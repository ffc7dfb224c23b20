"""`recipe-run plan`: memory, time and disk of a run, before anything is downloaded."""

import json
from pathlib import Path

import click

from recipe_runner.cli.options import Number, launch_option, prepare_process, read_checked_launch, set_option


@click.command(name="plan")
@click.argument("recipe", required=False)
@set_option
@click.option("--gpu", metavar="NAME", help="What it is planned for: RTX-4090, A100-80GB, ..., or cpu.")
@click.option("--memory", type=Number(0, 1e6, min_open=True), metavar="GIB", help="A device with so much memory.")
@launch_option
@click.option(
    "--num-processes", type=click.IntRange(1, 100_000), help="Devices, instead of the launch configuration's number."
)
@click.option(
    "--model-config", type=click.Path(path_type=Path), help="A config.json of a model that is not known here."
)
@click.option("--explain", "run", metavar="RUN", help="Compare a run with its plan, part by part, instead.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(
    recipe: str | None,
    overrides: tuple[str, ...],
    gpu: str | None,
    memory: float | None,
    launch_file: str | None,
    num_processes: int | None,
    model_config: Path | None,
    run: str | None,
    form: str,
) -> None:
    """Work out memory, time and disk of a run. Nothing is downloaded, and no GPU is needed."""
    from recipe_runner.recipe.resolve import load_recipe

    if run is not None:
        if recipe or gpu or memory or launch_file or model_config or form != "text":
            raise click.UsageError("--explain RUN compares a run with its own plan: give it alone")
        from recipe_runner.plan.history import explain_run
        from recipe_runner.runs.find import find_run

        click.echo(explain_run(find_run(run)))
        return
    if recipe is None:
        raise click.UsageError("name a recipe, or a run: --explain RUN")
    if gpu is not None and memory is not None:
        raise click.UsageError("--gpu and --memory both say what it is planned for: give one")
    if num_processes and not launch_file:
        raise click.UsageError("--num-processes goes with --accelerate-config")
    resolved = load_recipe(recipe, overrides)
    for warning in resolved.warnings:
        click.echo(warning, err=True)
    launch = None
    if launch_file:
        launch = read_checked_launch(launch_file, [f"--num_processes={num_processes}"] * bool(num_processes), resolved)
    prepare_process()
    from recipe_runner.launch.process import without_collector

    with without_collector():
        from recipe_runner.plan.device import choose_device
        from recipe_runner.plan.planning import plan
        from recipe_runner.plan.text import write_plan

        plans = []
        for stage in resolved.stages or (resolved,):
            with stage.placing_errors():
                plans.append(plan(stage, choose_device(gpu, memory), launch, model_config))
    if form == "json":
        told = [made.as_json() for made in plans]
        click.echo(json.dumps(told if resolved.stages else told[0], indent=1))
        return
    click.echo("\n\n".join(write_plan(made) for made in plans))
