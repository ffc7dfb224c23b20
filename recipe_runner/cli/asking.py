"""Behind `recipe-run new`: asks for what no option says, and writes the recipe."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from recipe_runner.data.look import Look, look_at
from recipe_runner.data.turns import says_something
from recipe_runner.files import write_new
from recipe_runner.methods import WAYS
from recipe_runner.problems.errors import UserError, user_error
from recipe_runner.problems.problem import Mark
from recipe_runner.recipe.catalogue import read_catalogue
from recipe_runner.recipe.local import is_file_source, is_pattern, is_saved, list_files, list_saved
from recipe_runner.recipe.new import MEANINGS, compose, copy_shipped, find_columns, guess_format, stage_for
from recipe_runner.recipe.resolve import examine_recipe
from recipe_runner.recipe.rules.model import find_context
from recipe_runner.recipe.schema import formats_of, is_name
from recipe_runner.stages import FORMATS, STAGES, Stage


def write_recipe(
    file: Path,
    model: str = "",
    form: str = "",
    stage: str | None = None,
    way: str = "",
    data: str = "",
    given: tuple[str, ...] = (),
    source: str | None = None,
) -> None:
    """Writes a recipe to a new file. The arguments are the options of `recipe-run new`.

    Raises:
        UserError: The recipe would not be valid, the file is there already, or the data does not suit.
    """
    if file.suffix != ".yaml":
        raise click.BadParameter("give a name that ends with .yaml", param_hint="FILE")
    if not is_name(file.stem):
        hint = "a recipe is named as its file: letters, digits, '.', '_' and '-', a letter or digit first"
        raise click.BadParameter(hint, param_hint="FILE")
    options = {"--model": model, "--format": form, "--stage": stage, "--method": way, "--data": data, "--column": given}
    if source and (others := [name for name, value in options.items() if value]):
        raise click.UsageError(f"--from copies a recipe as it is: leave out {', '.join(others)}, or --from")
    fitting = formats_of(stage) if stage else list(FORMATS)
    form = form or (fitting[0] if len(fitting) == 1 else "")
    if form and form not in fitting:
        raise click.BadParameter(f"format {form} is for stage {stage_for(form)}", param_hint="--stage")
    if (stage or form) and STAGES[stage or stage_for(form)].generates and not source:
        _refuse_generating(STAGES[stage or stage_for(form)])
    if source:
        text = copy_shipped(file, source)
    else:
        data = data or _ask("Data (hub id or file)")
        look = _look(file.parent, data)
        guess = guess_format(look.columns) if look else None
        model = model or _ask("Base model (hub id or folder)", default="microsoft/Phi-3-mini-4k-instruct")
        usual = guess if guess in fitting else "chat" if "chat" in fitting else fitting[0]
        form = form or _ask("Layout of the data", type=click.Choice(fitting), default=usual)
        way = way or _ask("Method", type=click.Choice(WAYS), default="qlora")
        if look is None and (file.parent / os.path.expanduser(data)).is_file():
            told = f"the rows of {data} could not be read, so its columns are not known"
            click.echo(f"warning: {told}; `recipe-run prepare {file}` says why", err=True)
        columns = _choose_columns(form, data, look, dict(_pair(pair) for pair in given))
        folder = Path(os.path.expanduser(model))
        context = find_context(model, folder if folder.is_dir() else None)
        model, data = (_seen_from(file.parent, name) for name in (model, data))
        ignored, chosen = _find_ignored(columns, look), stage or stage_for(form)
        text = compose(file.stem, model, chosen, form, way, data, columns, look, context, ignored)
    write_new(file, text)
    recipe, problems = examine_recipe(file)
    if recipe is None:
        file.unlink()  # ours, and new
        raise UserError(problems)
    for problem in problems:
        click.echo(problem, err=True)
    click.echo(f"{file} is written; recipe-run {file} trains")


def _refuse_generating(stage: Stage) -> None:
    """What judges a model's answers, and which teacher it has, nobody can guess.

    Raises:
        UserError: Always; it names shipped recipes to start from.
    """
    shipped = [entry.name for entry in read_catalogue() if entry.stage == stage.name]
    what = "judges the model's answers" if stage.rewarded else "the model learns from"
    message = f"a recipe of stage {stage.name} says what {what}, which can't be told from data"
    raise user_error("not-composed", message, f"start from a shipped one: --from {shipped[0]}")


def _ask(question: str, **options: Any) -> str:
    """What a person answers; where nobody is there to answer, what an empty answer means."""
    try:
        return str(click.prompt(question, **options))
    except click.Abort as error:
        if sys.stdin.isatty():  # Ctrl-C
            raise
        if "default" not in options:
            raise click.UsageError("there is nobody to ask: give --data, or --from") from error
        click.echo(options["default"])
        return str(options["default"])


def _pair(text: str) -> tuple[str, str]:
    role, equals, name = text.partition("=")
    if not equals or not name:
        raise click.BadParameter(f"{text}: expected ROLE=NAME", param_hint="--column")
    return role, name


def _seen_from(folder: Path, name: str) -> str:
    """A file, pattern or folder as the recipe names it: it is typed as seen from here, and the recipe is in a folder.

    What is not here may lie beside the recipe, or be the hub's: its name stays.
    """
    typed = os.path.expanduser(name)
    if Path(typed).is_absolute() or folder.resolve() == Path.cwd() or not _is_there(typed):
        return name
    relative = os.path.relpath(typed, folder) + "/" * name.endswith("/")
    return relative if relative.startswith("..") or is_file_source(relative) else f"./{relative}"


def _is_there(name: str) -> bool:
    return Path(name).exists() or (is_pattern(name) and bool(list_files(name)))


def _look(folder: Path, data: str) -> Look | None:
    """What is in local data; None for the hub's."""
    seen = _seen_from(folder, data)
    if not is_file_source(seen):
        return None
    name = str(folder / os.path.expanduser(seen)) + "/" * seen.endswith("/")
    if not _is_there(name):
        what = "no file matches" if is_pattern(data) else f"there is no {'folder' if data.endswith('/') else 'file'}"
        fix = "--data is a path from the current folder, or the id of a dataset of the hub"
        raise user_error("wrong-source", f"{what} {Path.cwd() / data}", fix, Mark("--data"))
    files = list_saved(Path(name)) if is_saved(Path(name)) else list_files(name)
    look = look_at(files) if files else None
    if look and not look.rows:
        raise user_error("empty-dataset", f"{data} has no rows", "", Mark(data))
    return look


def _find_ignored(columns: dict[str, str], look: Look | None) -> list[str]:
    """Columns that would be refused as they are: their names mean something, they say it, and no role takes them."""
    left = {name: cells for name, cells in (look.columns if look else {}).items() if name not in columns.values()}
    return [
        name
        for name, cells in left.items()
        if name in MEANINGS
        and any(map(says_something, cells))
        and (name != "label" or any(isinstance(cell, bool) for cell in cells))
    ]


def _choose_columns(form: str, data: str, look: Look | None, given: dict[str, Any]) -> dict[str, str]:
    """Role -> column: of local data by what is in it, of the hub's by the names of the roles.

    Raises:
        UserError: Local data has no column for a role.
    """
    if look is None:
        return {role: role for role in FORMATS[form].required} | given
    columns, missing = find_columns(form, look.columns, given)
    if missing:
        roles = ", ".join(f"'{role}'" for role in missing)
        other = guess_format(look.columns)
        message = f"no column of the data is known for {roles} of format {form}; its columns: {', '.join(look.columns)}"
        fix = f"say which: --column {missing[0]}=NAME" + (f"; or take --format {other}" if other else "")
        raise user_error("missing-column", message, fix, Mark(data))
    return columns
