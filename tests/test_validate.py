"""The example files are the tests: every file in valid/ passes, every one in invalid/ gives what it says at its end."""

import json
import re
from pathlib import Path

import pytest

from recipe_runner.library import shipped_recipes

EXAMPLES = Path(__file__).parent / "examples"


@pytest.mark.parametrize("file", sorted((EXAMPLES / "valid").glob("*.yaml")) + shipped_recipes(), ids=lambda f: f.stem)
def test_valid_example_passes_without_a_word(run_cli, file):
    result = run_cli("validate", file)
    assert (result.status, result.out) == (0, "1 recipe, 0 errors, 0 warnings\n")


@pytest.mark.parametrize("file", sorted((EXAMPLES / "invalid").glob("*.yaml")), ids=lambda f: f.stem)
def test_invalid_example_gives_exactly_the_problems_it_names(run_cli, file):
    expected = re.findall(rb"# expect: (\S+) (\S+) (.*)", file.read_bytes())
    result = run_cli("validate", file)
    lines = result.out.splitlines()
    assert result.status == 1
    assert len(lines) == len(expected) > 0, result.out
    for line, (place, code, message) in zip(lines, expected, strict=True):
        assert line.startswith(f"{file}:{place.decode()}: error[{code.decode()}] {message.decode()}")


def test_all_problems_of_all_files_are_given_at_once_in_order(run_cli):
    result = run_cli("validate", EXAMPLES / "invalid" / "wrong_type.yaml", EXAMPLES / "invalid" / "unknown_key.yaml")
    assert [line.split(": ")[1].split()[0] for line in result.out.splitlines()] == ["error[wrong-type]"] * 3 + [
        "error[unknown-key]"
    ]
    assert "2 recipes, 4 errors" in result.err


def test_json_form_has_the_documented_fields(run_cli):
    result = run_cli("validate", "--format", "json", EXAMPLES / "invalid" / "unknown_key.yaml")
    (problem,) = json.loads(result.out)
    assert problem == {
        "file": str(EXAMPLES / "invalid" / "unknown_key.yaml"),
        "line": 12,
        "column": 3,
        "severity": "error",
        "code": "unknown-key",
        "path": "training.learning_rat",
        "message": "unknown key",
        "suggestion": "did you mean 'learning_rate'?",
    }


def test_name_that_differs_from_the_file_is_a_warning(run_cli, write_recipe):
    file = write_recipe("first")
    other = file.rename(file.with_name("second.yaml"))
    result = run_cli("validate", other)
    assert result.status == 0
    assert f"{other}:3:" in result.out
    assert "warning[name-differs]" in result.out


def test_a_typo_and_a_conflict_are_reported_together(run_cli, write_recipe):
    training = {"learning_rat": 0.1, "eval_strategy": "steps"}
    result = run_cli("validate", write_recipe(training=training))
    assert "unknown-key" in result.out
    assert "eval-without-data" in result.out


def test_misspelt_key_does_not_set_off_rules_about_its_absence(run_cli, write_recipe):
    dataset = {"eval": {"fraction": 0.1}}
    result = run_cli("validate", write_recipe(dataset=dataset, training={"evaluation_strategy": "steps"}))
    assert "renamed-key" in result.out
    assert "eval-data-unused" not in result.out


@pytest.mark.parametrize(
    ("argument", "code"),
    [("nowhere.yaml", "unreadable-file"), ("no_such_recipe", "recipe-not-found"), ("{tmp}", "no-recipes")],
)
def test_what_cannot_be_read_is_one_line_and_status_1(run_cli, tmp_path, argument, code):
    result = run_cli("validate", argument.format(tmp=tmp_path))
    assert result.status == 1
    text = result.out + result.err
    assert f"error[{code}]" in text
    assert "Traceback" not in text


def test_nearest_shipped_data_file_is_suggested(run_cli, write_recipe):
    dataset = {"train": {"source": str(Path("recipes/data/tickets_trian.jsonl").absolute())}}
    result = run_cli("validate", write_recipe(dataset=dataset))
    assert "did you mean 'tickets_train.jsonl'?" in result.out


def test_every_code_is_documented_and_every_documented_code_exists():
    root = Path(__file__).resolve().parent.parent
    source = "\n".join(file.read_text() for file in (root / "recipe_runner").rglob("*.py"))
    documented = set(re.findall(r"`([a-z]+(?:-[a-z0-9]+)+)`", (root / "docs" / "errors.md").read_text()))
    raised = set(re.findall(r'(?:error|problem|Problem|fail)\(\s*"([a-z]+(?:-[a-z0-9]+)+)"', source))
    raised |= set(re.findall(r'"([a-z]+(?:-[a-z0-9]+)+)": [a-z_]+,', source))  # the table of rules
    assert len(raised) > 50
    assert raised <= documented
    assert all(f'"{code}"' in source for code in documented)
