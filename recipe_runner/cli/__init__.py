"""The command line: `recipe-run RECIPE` trains. One module a command, imported when it is asked for."""

import importlib
import io
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import click

from recipe_runner import __version__
from recipe_runner.cli.options import choose_colour
from recipe_runner.problems.errors import Interrupted, UserError
from recipe_runner.problems.words import make_visible, suggest

EXIT_USER_ERROR, EXIT_BUG, EXIT_INTERRUPTED = 1, 3, 130
WORD_SECONDS = 15  # a busy machine needs some to end a process that has torch loaded
COMMANDS = (
    *(
        "check-server",
        "compare",
        "copy",
        "evaluate",
        "explain",
        "generate",
        "import",
        "list",
        "merge",
        "new",
        "prepare",
    ),
    *("plan", "preview", "push", "report", "runs", "show", "smoke", "train", "validate"),
)


class _Commands(click.Group):
    """`recipe-run RECIPE` is short for `recipe-run train RECIPE`; a subcommand wins over a file of the same name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*COMMANDS, "-h", "--help", "--version"):
            if meant := _misspelt_command(args[0]):
                raise click.UsageError(f"there is no command and no recipe '{args[0]}'; {meant}", ctx)
            args = ["train", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command. click takes a pipe whose reader has gone, and a file that ends early, for other things."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            sys.stderr.close()  # the reader (head, less) has gone: nothing is wrong
            sys.exit(0)
        except EOFError as error:
            raise RuntimeError(f"a file ended too early: {error}") from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS]  # `list` is the module of that command, once it is imported

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"recipe_runner.cli.{cmd_name.replace('-', '_')}").command
        return command


def _misspelt_command(word: str) -> str:
    """What a word that is no recipe may have meant; empty where it is a recipe, or no command is like it."""
    from recipe_runner.recipe.library import is_recipe

    return "" if word.startswith("-") or is_recipe(word) else suggest(word, COMMANDS)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="recipe-run")
def cli() -> None:
    """Fine-tune a language model from a YAML recipe.

    \b
    recipe-run RECIPE              train (options: recipe-run train --help)
    recipe-run validate recipes/   check recipes, in well under a second

    RECIPE is a file, or the name of a shipped recipe.
    """  # noqa: D301 (click reads the character that \b stands for)


def main() -> NoReturn:
    """Runs the command line and maps errors to exit status and one-line messages."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal or file that is not in UTF-8
    try:
        status = cli.main(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Interrupted as error:
        if os.environ.get("RANK", "0") == "0":
            click.echo(make_visible(str(error)), err=True)
        sys.exit(error.status)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except UserError as error:
        from recipe_runner.problems.writers import write_text

        _say_error(write_text(error.problems))
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:  # a file or folder that may not be read or written
        from recipe_runner.files import FULL, disk_full

        full = error.errno in FULL and error.filename
        _say_error(str(disk_full(error.errno, Path(full), "run it again") if full else f"error[input-output] {error}"))
        sys.exit(EXIT_USER_ERROR)
    except Exception as error:  # the boundary: whatever else arrives here is a bug of ours
        sys.exit(_report_bug(error))


def _say_error(text: str) -> None:
    """Writes an error; of several processes, the others leave the word to the first when it fails as well."""
    if (rank := os.environ.get("RANK", "0")) != "0":
        time.sleep(WORD_SECONDS)  # the launcher ends this process once the first has failed and ended, too
        text = "\n".join(f"[rank {rank}] {line}" for line in text.splitlines())
    click.echo(text, err=True, color=choose_colour())


def _report_bug(error: Exception) -> int:
    import tempfile  # here, because a command that works needs neither: a tenth of its time
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="recipe-run-", suffix=".log", delete=False) as log:
        traceback.print_exception(error, file=log)
    what = f"error[bug] {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    _say_error(f"{what}\nThis is a bug in recipe-run; the traceback is in {Path(log.name)}. Please report it.")
    return EXIT_BUG
