"""What other tools run: the pre-commit hooks, the GitHub action and workflow, other validators."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recipe_runner.recipe.library import shipped_recipes

ROOT = Path(__file__).resolve().parent.parent.parent
HOOKS = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())


def needs(package):
    """A package and all that it needs on this Python."""
    names = {re.sub(r"[-_.]+", "-", package).lower()}
    for line in importlib.metadata.requires(package) or []:
        name, _, marker = line.partition(";")
        if "extra" not in marker and not ("python_version" in marker and "<" in marker and "3.13" not in marker):
            names |= needs(re.match(r"[\w.-]+", name.strip())[0])
    return names


LIGHT = [line for line in (ROOT / "requirements-light.txt").read_text().splitlines() if not line.startswith("#")]


def test_the_light_list_holds_what_validate_imports_and_no_more():
    """With --no-deps, pip takes what is listed and nothing else."""
    assert {name.replace("_", "-").lower() for name in LIGHT} == needs("click") | needs("PyYAML") | needs("jsonschema")


def test_the_action_installs_the_light_list():
    steps = yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"]
    (install,) = [step["run"] for step in steps if step.get("name") == "Install"]
    assert '--no-deps --requirement "$GITHUB_ACTION_PATH/requirements-light.txt"' in install
    assert '--no-deps "$GITHUB_ACTION_PATH"' in install


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_hook_installs_the_light_list(hook):
    assert hook["additional_dependencies"] == ["--no-deps", "--requirement=requirements-light.txt"]
    assert hook["language"] == "python"
    assert re.search(hook["files"], "recipes/mine.yaml")
    assert not re.search(hook["files"], "recipes/notes.md")


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_hook_command_is_one_that_we_have(run_cli, hook):
    program, command, *options = hook["entry"].split()
    assert program == "recipe-run"
    assert all(option in run_cli(command, "--help").out for option in options)


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("vendor.github-actions", "action.yml"),
        ("vendor.dependabot", ".github/dependabot.yml"),
        *(("vendor.github-workflows", str(file.relative_to(ROOT))) for file in (ROOT / ".github/workflows").iterdir()),
    ],
)
def test_files_for_github_are_what_it_takes(schema, file):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(ROOT / file)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


def test_action_validates_with_the_options_that_it_is_given(tmp_path):
    """The step as GitHub runs it, with this Python's recipe-run in place of the one that the step before installs."""
    (step,) = [step for step in yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"] if "env" in step]
    assert set(step["env"]) == {"PATHS", "FORMAT", "STRICT"}
    (tmp_path / "recipe-run" / "bin").mkdir(parents=True)
    program = tmp_path / "recipe-run" / "bin" / "recipe-run"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m recipe_runner "$@"\n')
    program.chmod(0o755)
    warned, recipes = "tests/examples/warned/learning_rate.yaml", "recipes tests/examples/valid/minimal.yaml"
    for paths, strict, status, text in [
        (recipes, "true", 0, ""),
        (warned, "false", 0, "::"),
        (warned, "true", 1, "::"),
    ]:
        environment = {"RUNNER_TEMP": str(tmp_path), "PATHS": paths, "FORMAT": "github", "STRICT": strict}
        answer = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**environment, "PATH": "/usr/bin:/bin"},
        )
        assert answer.returncode == status, answer.stderr
        assert answer.stdout.startswith(text or f"{len(shipped_recipes()) + 1} recipes, 0 errors, 0 warnings")


def test_every_shipped_recipe_opens_with_the_line_that_editors_read():
    for file in (ROOT / "recipes").glob("*.yaml"):
        first = file.read_text().splitlines()[0]
        reference = first.removeprefix("# yaml-language-server: $schema=")
        assert first != reference
        assert json.loads((file.parent / reference).read_text())["title"] == "Recipe"


def test_without_the_training_stack_recipes_are_checked_and_not_run(tmp_path):
    """As a pre-commit hook installs the package: nothing but what `validate` needs."""
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text(
        "import importlib.machinery as m\nold = m.PathFinder.find_spec\n"
        "def find(name, *rest): return None if name in ('trl', 'torch') else old(name, *rest)\n"
        "m.PathFinder.find_spec = find\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}
    program = [sys.executable, "-m", "recipe_runner"]
    checked = subprocess.run([*program, "validate", "phi3_chat_qlora"], capture_output=True, text=True, env=environment)
    assert checked.returncode == 0, checked.stdout
    run = subprocess.run([*program, "phi3_chat_qlora"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith("error[training-stack-missing] TRL is not installed")
