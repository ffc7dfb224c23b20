"""The command line: `recipe-run RECIPE` trains; `validate`, `list` and `show` need no ML stack."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import click

from recipe_runner import __version__
from recipe_runner.problems.errors import Interrupted, UserError
from recipe_runner.recipe.recipe import Recipe

EXIT_USER_ERROR, EXIT_BUG, EXIT_INTERRUPTED = 1, 3, 130


class _Commands(click.Group):
    """`recipe-run RECIPE` is short for `recipe-run train RECIPE`; a subcommand wins over a file of the same name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help", "--version"):
            args = ["train", *args]
        return super().parse_args(ctx, args)


_recipe = click.argument("recipe")
_set = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key: --set training.max_steps=10. Repeatable.",
)


_launch = click.option(
    "--accelerate-config",
    "launch_file",
    metavar="FILE|NAME",
    help="Launch configuration of accelerate: a file, or the name of a shipped one (deepspeed_zero3).",
)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="recipe-run")
def cli() -> None:
    r"""Fine-tune a language model from a YAML recipe.

    \b
    recipe-run RECIPE              train (options: recipe-run train --help)
    recipe-run validate recipes/   check recipes, in well under a second

    RECIPE is a file, or the name of a shipped recipe.
    """


@cli.command()
@_recipe
@_set
@click.option("--output-dir", metavar="DIR", help="Folder of the run folders (run.output_dir).")
@click.option(
    "--resume",
    default="never",
    show_default=True,
    metavar="auto|never|PATH",
    help="Continue the latest unfinished run of this recipe, start anew, or continue the run in a folder.",
)
@_launch
@click.option("--num-processes", type=int, help="With --accelerate-config: processes of all machines together.")
@click.option("--num-machines", type=int, help="With --accelerate-config: number of machines.")
@click.option("--machine-rank", type=int, help="With --accelerate-config: number of this machine, from 0.")
@click.option("--main-process-ip", help="With --accelerate-config: address of machine 0.")
@click.option("--main-process-port", type=int, help="With --accelerate-config: port of machine 0.")
@click.option("--gpu-ids", help="With --accelerate-config: GPUs of this machine to use, 0,1 for example.")
def train(
    recipe: str,
    overrides: tuple[str, ...],
    output_dir: str | None,
    resume: str,
    launch_file: str | None,
    **launcher: str | int | None,
) -> None:
    """Train from a recipe. The word `train` can be left out."""
    if output_dir is not None:
        overrides = (*overrides, f"run.output_dir={json.dumps(output_dir, ensure_ascii=False)}")
    resolved = _load_to_run(recipe, overrides)
    given = [f"--{key}={value}" for key, value in launcher.items() if value is not None]  # as accelerate spells them
    if given and launch_file is None:
        raise click.UsageError(f"{given[0].partition('=')[0].replace('_', '-')} goes with --accelerate-config")
    if launch_file is not None:
        from recipe_runner.cli.commands import start_processes

        sets = [part for override in overrides for part in ("--set", override)]
        sys.exit(start_processes(resolved, launch_file, given, ["train", recipe, *sets, "--resume", resume]))
    if resolved.stages:
        from recipe_runner.training.pipeline import run_pipeline

        run_pipeline(resolved, resume)
        return
    from recipe_runner.training.run import run_recipe

    run_recipe(resolved, resume)


def _load_to_run(recipe: str, overrides: tuple[str, ...]) -> Recipe:
    """Loads a recipe for a command that needs the ML stack, and says what validation warns about."""
    from recipe_runner.problems.errors import user_error
    from recipe_runner.recipe.resolve import load_recipe
    from recipe_runner.recipe.rules.packages import is_installed

    resolved = load_recipe(recipe, overrides)
    said = "RECIPE_RUN_LAUNCH" in os.environ or os.environ.get("RANK", "0") != "0"  # by who started this process
    for warning in () if said else resolved.warnings:
        click.echo(warning, err=True)
    if not is_installed("trl"):  # installed without dependencies, to validate only
        fix = "pip install recipe-runner, with its dependencies"
        raise user_error("training-stack-missing", "TRL is not installed: recipes can be checked here, not run", fix)
    return resolved


@cli.command()
@click.argument("paths", nargs=-1, required=True)
@_set
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "github", "sarif"]),
    default="text",
    show_default=True,
    help="How problems are written: for people, for scripts, as GitHub annotations, for code scanning.",
)
@click.option("--strict", is_flag=True, help="Warnings fail, too.")
@click.option("--fix", is_flag=True, help="Mend renamed keys, unambiguous typos and the name; print the difference.")
@_launch
def validate(
    paths: tuple[str, ...], overrides: tuple[str, ...], form: str, strict: bool, fix: bool, launch_file: str | None
) -> None:
    """Check recipes: files, folders or names of shipped recipes. More about a problem: `recipe-run explain CODE`."""
    from recipe_runner.cli.commands import check_recipes

    errors, warnings = check_recipes(paths, overrides, launch_file, form, fix, _colour())
    if errors or (strict and warnings):
        sys.exit(EXIT_USER_ERROR)


@cli.command(name="list")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def list_(form: str) -> None:
    """List the shipped recipes."""
    from recipe_runner.cli.commands import list_recipes

    click.echo(list_recipes(form))


@cli.command()
@_recipe
@_set
def show(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print a recipe as it is run: extended, overridden, with defaults and absolute paths."""
    from recipe_runner.recipe.dump import dump_values
    from recipe_runner.recipe.resolve import load_recipe

    click.echo(dump_values(dict(load_recipe(recipe, overrides).values)), nl=False)


@cli.command()
@_recipe
@_set
@click.option("-n", "number", type=click.IntRange(1, 1000), default=3, show_default=True, help="Rows to show.")
@click.option(
    "--row", type=click.IntRange(1), metavar="I", help="Show row I of the data, as it is in its files, instead."
)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--html", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="Write a page to FILE.")
@click.option("--rows-only", is_flag=True, help="Leave out the accounting, which reads all rows.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option(
    "--write-template",
    "template",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Only write the chat template with {% generation %} marks to FILE (.jinja).",
)
def preview(recipe: str, overrides: tuple[str, ...], template: Path | None, **options: Any) -> None:
    """Show what the model will see, and which tokens it learns: rows, then what becomes of all rows. Loads no weights.

    Supervised tokens are green; without colour (NO_COLOR, a pipe) they stand in [[double brackets]].
    """
    resolved = _load_to_run(recipe, overrides)
    if resolved.stages:
        fix = "preview one of them: " + ", ".join(str(stage.file) for stage in resolved.stages)
        raise resolved.error("pipeline-has-no-rows", "the rows of a pipeline are those of its stages", fix, "stages")
    if template:
        from recipe_runner.model.base import write_training_template

        write_training_template(resolved, template)
        click.echo(f"{template} is written; set training.chat_template_path to it")
        return
    from recipe_runner.preview import preview_recipe

    colour = _colour() is None and sys.stdout.isatty()
    for part in preview_recipe(resolved, colour=colour, **options):
        click.echo(part)


@cli.command()
@_recipe
@_set
def prepare(recipe: str, overrides: tuple[str, ...]) -> None:
    """Format and tokenize the data now, outside the launcher; training finds it prepared until something changes."""
    from recipe_runner.preview import prepare_recipe

    resolved = _load_to_run(recipe, overrides)
    for stage in resolved.stages or (resolved,):
        for part in prepare_recipe(stage):
            click.echo(part, color=_colour())


@cli.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", metavar="ID|FOLDER", help="Base model.")
@click.option(
    "--format", "form", type=click.Choice(["instruction", "chat", "text", "preference"]), help="Layout of the data."
)
@click.option("--stage", type=click.Choice(["pretrain", "sft", "dpo"]), help="Training stage; the layout must suit it.")
@click.option("--method", type=click.Choice(["qlora", "lora", "full"]), help="What is trained.")
@click.option("--data", metavar="ID|FILE", help="Hub id or file of the data.")
@click.option("--from", "source", metavar="NAME", help="Start from a shipped recipe instead.")
def new(file: Path, model: str, form: str, stage: str | None, method: str, data: str, source: str | None) -> None:
    """Write a new recipe to FILE (NAME.yaml). What no option says is asked."""
    from recipe_runner.recipe.new import FORMATS, METHODS, STAGES, compose, copy_shipped, write_new
    from recipe_runner.recipe.resolve import examine_recipe

    if file.suffix != ".yaml":
        raise click.BadParameter("give a name that ends with .yaml", param_hint="FILE")
    form = form or {"dpo": "preference", "pretrain": "text"}.get(stage or "", "")
    if stage and form and STAGES[form] != stage:
        raise click.BadParameter(f"format {form} is for stage {STAGES[form]}", param_hint="--stage")
    if source:
        text = copy_shipped(file.stem, source)
    else:
        model = model or click.prompt("Base model (hub id or folder)", default="microsoft/Phi-3-mini-4k-instruct")
        form = form or click.prompt("Layout of the data", type=click.Choice(list(FORMATS)), default="chat")
        method = method or click.prompt("Method", type=click.Choice(METHODS), default="qlora")
        data = data or click.prompt("Data (hub id or file)")
        text = compose(file.stem, model, form, method, data)
    write_new(file, text)
    for problem in examine_recipe(file)[1]:
        click.echo(problem, err=True)
    click.echo(f"{file} is written; recipe-run {file} trains")


@cli.command()
@click.argument("name")
def explain(name: str) -> None:
    """Explain a key of a recipe (training.packing_strategy) or an error code (unknown-key)."""
    from recipe_runner.recipe.explain import explain

    click.echo(explain(name))


def _colour() -> bool | None:
    """None: click decides by whether it writes to a terminal. Source: no-color.org."""
    return False if os.environ.get("NO_COLOR") else None


def main() -> NoReturn:
    """Runs the command line and maps errors to exit status and one-line messages."""
    try:
        status = cli.main(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Interrupted as error:
        if os.environ.get("RANK", "0") == "0":
            click.echo(error, err=True)
        sys.exit(error.status)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except UserError as error:
        from recipe_runner.problems.writers import write_text

        _say_error(write_text(error.problems))
        sys.exit(EXIT_USER_ERROR)
    except BrokenPipeError:
        sys.stderr.close()  # the reader (head, less) has gone: nothing is wrong
        sys.exit(0)
    except OSError as error:  # a file or folder that may not be read or written
        click.echo(f"error[input-output] {error}", err=True)
        sys.exit(EXIT_USER_ERROR)
    except Exception as error:  # the boundary: whatever else arrives here is a bug of ours
        sys.exit(_report_bug(error))


def _say_error(text: str) -> None:
    """Writes an error; of several processes, the others leave the word to the first when it fails as well."""
    if (rank := os.environ.get("RANK", "0")) != "0":
        time.sleep(3)  # the launcher ends this process when another has failed
        text = "\n".join(f"[rank {rank}] {line}" for line in text.splitlines())
    click.echo(text, err=True, color=_colour())


def _report_bug(error: Exception) -> int:
    import tempfile  # here, because a command that works needs neither: a tenth of its time
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="recipe-run-", suffix=".log", delete=False) as log:
        traceback.print_exception(error, file=log)
    what = f"error[bug] {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    _say_error(f"{what}\nThis is a bug in recipe-run; the traceback is in {Path(log.name)}. Please report it.")
    return EXIT_BUG
