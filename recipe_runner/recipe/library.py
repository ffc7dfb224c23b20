"""The shelf: shipped recipes, the schema and launch configurations, in a checkout or inside the installed package."""

import os
from functools import cache
from pathlib import Path

from recipe_runner.problems.errors import user_error
from recipe_runner.problems.words import ask, nearest

SUFFIXES = (".yaml", ".yml")
FEW = 4  # names that an error lists


@cache
def shelf() -> Path:
    """The folder that holds `recipes/`, `schema/` and `accelerate_configs/`."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_shelf"  # written by the wheel's build
    return installed if installed.is_dir() else package.parent


def find_recipe(name: str) -> Path:
    """Finds a recipe by path, or a shipped one by its name without folder and suffix.

    Raises:
        UserError: There is no such file and no shipped recipe of that name.
    """
    return Path(name) if _is_path(name) else find_shipped(name)


def is_recipe(name: str) -> bool:
    """Whether a name is written as the path of a recipe, or is a shipped recipe's."""
    return _is_path(name) or any(file.stem == name for file in shipped_recipes())


def _is_path(name: str) -> bool:
    path = Path(name)
    return path.suffix in SUFFIXES or len(path.parts) > 1 or path.is_file()


def find_shipped(name: str) -> Path:
    """Finds a recipe on the shelf by its name.

    Raises:
        UserError: There is none of that name.
    """
    shipped = {file.stem: file for file in shipped_recipes()}
    if name in shipped:
        return shipped[name]
    beside = [file for suffix in SUFFIXES if (file := f"{name}{suffix}") and Path(file).is_file()]
    near = beside or [known for known in shipped if name.lower() in known] or nearest(name, shipped)
    fix = ask(near[:FEW]) or "`recipe-run list` shows them"
    if len(near) > FEW:
        fix = f"`recipe-run list {name}` shows the {len(near)} that are like it"
    raise user_error("recipe-not-found", f"there is no file and no shipped recipe '{name}'", fix)


def shipped_recipes() -> list[Path]:
    """The recipes on the shelf, by name."""
    return sorted(file for suffix in SUFFIXES for file in (shelf() / "recipes").glob(f"*{suffix}"))


def collect_recipes(name: str) -> list[Path]:
    """The recipe files below a folder, or the one file or shipped recipe of that name.

    Raises:
        UserError: There is none.
    """
    folder = Path(name)
    if not name or not folder.is_dir():
        return [find_recipe(name)]
    if not os.access(folder, os.R_OK | os.X_OK):
        raise user_error("unreadable-file", f"the folder {name} can't be read", "")
    found = sorted(file for suffix in SUFFIXES for file in folder.rglob(f"*{suffix}") if not file.is_dir())
    if not found:
        raise user_error("no-recipes", f"the folder {name} holds no .yaml file", "name a recipe or a folder of recipes")
    return found
