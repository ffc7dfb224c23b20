"""What the README shows is true: its recipe, its commands, and what they print."""

import re
import shlex
from pathlib import Path

import pytest

from recipe_runner import __version__

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (.+)$", README, flags=re.MULTILINE)
CELLS = re.findall(r"^\| `(recipe-run [^`]+)`", README, flags=re.MULTILINE)


def test_the_recipe_is_the_one_on_the_shelf():
    shown, *parts = re.findall(r"^```yaml\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    assert shown == (ROOT / "recipes" / "phi3_chat_qlora.yaml").read_text(encoding="utf-8")
    shelf = [file.read_text(encoding="utf-8") for file in (ROOT / "recipes").glob("*.yaml")]
    assert all(any(part in recipe for recipe in shelf) for part in parts)


@pytest.mark.parametrize(
    "command",
    [
        command
        for command in COMMANDS + CELLS
        if " explain" in command or "validate" in command or " list" in command or " show" in command
    ],
)
def test_commands_that_need_no_model_run_and_print_what_is_shown(run_cli, monkeypatch, command):
    monkeypatch.chdir(ROOT)
    result = run_cli(*shlex.split(command)[1:])
    shown = re.search(rf"^\$ {re.escape(command)}\n(.*?)```", README, flags=re.DOTALL | re.MULTILINE)
    if shown and shown[1].strip():
        assert result.out + result.err == shown[1]
    else:
        assert result.status == 0


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make")])
def test_make_targets_exist(command):
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_training_commands_are_the_ones_that_the_launch_tests_run():
    tested = (ROOT / "tests" / "launch" / "test_launch.py").read_text()
    for part in (
        "accelerate launch recipe-run recipes/",
        "accelerate launch --no_python recipe-run",
        "python -m recipe_runner",
    ):
        assert part in tested
        assert any(part in command for command in COMMANDS)


def test_options_in_the_table_are_those_of_the_command_line(run_cli):
    help_text = run_cli("train", "--help").out
    for option in {word for cell in CELLS for word in cell.split() if word.startswith("--")} - {"--format"}:
        assert option in help_text


def test_files_that_are_linked_or_named_exist():
    for name in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(
        r"`((?:recipes|accelerate_configs|docs)/[\w./]+\.\w+)`", README
    ):
        assert (ROOT / name).is_file(), name


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"\b[A-Z]+_OUTPUT\b|TODO|XXX", README)


def test_version_is_the_changelog_s():
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
