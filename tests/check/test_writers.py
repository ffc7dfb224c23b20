"""Problems for machines: GitHub annotations and SARIF."""

import json
import os
import pty
import subprocess
import sys

import pytest
from conftest import EXAMPLES, SCHEMAS
from jsonschema import Draft4Validator

from recipe_runner.problems.problem import Mark, Problem
from recipe_runner.problems.writers import write_github

INVALID = EXAMPLES / "invalid"


def test_github_annotation_names_file_line_column_and_code(run_cli):
    result = run_cli("validate", "--format", "github", INVALID / "unknown_key.yaml")
    assert result.status == 1
    assert result.out == (
        f"::error file={INVALID / 'unknown_key.yaml'},line=12,col=3,title=unknown-key::"
        "training.learning_rat: unknown key; did you mean 'learning_rate'?\n"
    )


def test_github_annotation_escapes_what_would_end_it():
    problem = Problem("a-code", "100%\nof it", Mark("a,b:c.yaml", 3, 1))
    assert write_github([problem]) == "::error file=a%2Cb%3Ac.yaml,line=3,col=1,title=a-code::100%25 of it"


def test_sarif_log_holds_every_problem_at_its_place(run_cli):
    result = run_cli("validate", "--format", "sarif", INVALID / "wrong_type.yaml", INVALID / "unknown_key.yaml")
    log = json.loads(result.out)
    (run,) = log["runs"]
    places = [found["locations"][0]["physicalLocation"] for found in run["results"]]
    assert log["version"] == "2.1.0"
    assert [place["region"]["startLine"] for place in places] == [12, 13, 14, 12]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert all(rules[found["ruleIndex"]] == found["ruleId"] for found in run["results"])


def test_sarif_log_is_valid_by_the_schema_of_sarif(run_cli):
    schema = json.loads((SCHEMAS / "sarif-2.1.0.json").read_text())
    check = Draft4Validator(schema)
    for arguments in ([INVALID], [INVALID.parent / "warned"], ["phi3_chat_qlora"], ["/nowhere/x.yaml"]):
        log = json.loads(run_cli("validate", "--format", "sarif", *arguments).out)
        assert not list(check.iter_errors(log))
    assert list(check.iter_errors({**log, "version": "3"}))


@pytest.mark.parametrize(("no_colour", "painted"), [("", True), ("1", False)])
def test_colour_is_for_terminals_only(no_colour, painted):
    """A pseudo-terminal shows colour unless NO_COLOR is set; a pipe never does."""
    command = [sys.executable, "-m", "recipe_runner", "validate", str(INVALID / "unknown_key.yaml")]
    environment = {**os.environ, "NO_COLOR": no_colour, "TERM": "xterm"}
    piped = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "\x1b" not in piped.stdout + piped.stderr
    ours, theirs = pty.openpty()
    subprocess.run(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert ("\x1b[31m\x1b[1merror[unknown-key]\x1b[0m" in shown) == painted
    assert "did you mean 'learning_rate'?" in shown


def test_sarif_log_of_valid_recipes_is_empty_not_missing(run_cli):
    result = run_cli("validate", "--format", "sarif", "phi3_chat_qlora")
    assert result.status == 0
    assert json.loads(result.out)["runs"][0]["results"] == []


def test_warnings_fail_only_when_strict(run_cli, write_recipe):
    file = write_recipe(training={"max_steps": 3, "num_train_epochs": 2})
    assert run_cli("validate", file).status == 0
    assert run_cli("validate", "--strict", file).status == 1


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-8"])
def test_a_terminal_that_is_not_in_utf_8_shows_escapes(write_recipe, encoding):
    recipe = write_recipe(description="Größe \N{RETURN SYMBOL}")
    command = [sys.executable, "-m", "recipe_runner", "show", str(recipe)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    assert ("\N{RETURN SYMBOL}" if encoding == "utf-8" else "\\u23ce") in done.stdout.decode(encoding)


def test_a_reader_that_stops_reading_is_no_error():
    """As `| head -1` does; click alone would end with 1. Of one long text, Python 3.11 loses the error itself."""
    code = "import click\n"
    code += "def stop(*_, **__): raise BrokenPipeError(32, 'Broken pipe')\n"
    code += "click.echo = stop\nfrom recipe_runner.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code, "show", "phi3_chat_qlora"], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_facts_are_broken_at_words_on_a_terminal(monkeypatch):
    import sys

    from recipe_runner.problems.words import write_facts

    monkeypatch.setenv("COLUMNS", "60")
    facts = {"data": "word " * 30, "empty": "", "path": f"/{'x' * 100}"}
    assert [len(line) for line in write_facts(facts).splitlines()] == [13 + 150, 13 + 101]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = write_facts(facts).splitlines()
    assert max(len(line) for line in lines[:-1]) <= 60
    assert lines[1].startswith(" " * 13 + "word")
    assert lines[-1].endswith("x" * 100)
