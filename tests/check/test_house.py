"""Rooms have doors: what is imported where, and when."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent.parent / "recipe_runner"
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "numpy"}
CORE = sorted(set(PACKAGE.glob("*.py")))


@pytest.mark.parametrize(
    "arguments",
    [
        ["validate", "recipes"],
        ["list"],
        ["show", "phi3_chat_qlora"],
        ["--help"],
        ["train", "--help"],
        ["explain", "peft.r"],
    ],
    ids=str,
)
def test_light_commands_load_none_of_the_ml_stack(arguments):
    code = (
        "import sys\nfrom recipe_runner.cli import main\n"
        f"sys.argv = ['recipe-run', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('loaded:', sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stderr.splitlines()[-1] == "loaded: []", done.stderr


def imported_modules(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("file", CORE, ids=lambda file: file.name)
def test_core_never_imports_the_ml_stack(file):
    assert not {name.split(".")[0] for name in imported_modules(file)} & HEAVY


def test_nothing_imports_the_command_line_but_the_doors():
    importers = {file.name for file in PACKAGE.rglob("*.py") if "recipe_runner.cli" in imported_modules(file)}
    assert importers == {"__main__.py"}
