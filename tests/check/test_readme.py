"""What README and the pages in docs/ show is true: recipes, commands and their output, options, keys, files, links."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recipe_runner import __version__
from recipe_runner.recipe import schema

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in FILES}
README, CLI, RECIPE = PAGES["README.md"], PAGES["docs/cli.md"], PAGES["docs/recipe.md"]
WITHOUT_STACK = ("validate", "explain", "list", "show", "--version")  # commands that take no model and no time


def blocks(language):
    """Every code block of a language, with its page."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(page, block) for page, text in PAGES.items() for block in pattern.findall(text)]


def console():
    """Every command that is shown with a prompt, and the output that is shown below it."""
    parts = [part for _, block in blocks("console") for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return dict(part.split("\n", 1) for part in parts)


def tables(text):
    """Rows of all tables of a text, as lists of cells."""
    rows = re.findall(r"^\| (`.+) \|$", text, flags=re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def section(text, heading):
    """A section of a page, up to the next heading of its level or above."""
    start = re.search(rf"^(##+) {heading}\n", text, flags=re.MULTILINE)
    assert start, heading
    return re.split(rf"^##{{1,{len(start[1]) - 1}}} ", text[start.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def without_comments(recipe):
    return [line.partition(" #")[0].rstrip() for line in recipe.splitlines()]


def anchors(text):
    """Anchors of a page, as GitHub makes them of its headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


SHOWN = console()
CELLS = [row[0].strip("`") for text in PAGES.values() for row in tables(text) if row[0].startswith("`recipe-run ")]
SPANS = re.findall(r"(?<!`)`(recipe-run [^`\n]+)`(?!`)", "\n".join(PAGES.values()))
RUN = sorted({command for command in [*SHOWN, *CELLS, *SPANS] if "recipe-run " in command})


def test_there_is_something_to_test():
    """The patterns of this file find what they are for."""
    assert len(SHOWN) > 15
    assert len(CELLS) > 7
    assert len(SPANS) > 10
    assert len(blocks("yaml")) > 5


@pytest.mark.parametrize("block", [block for _, block in blocks("yaml")])
def test_every_yaml_is_real(block, run_cli, tmp_path):
    values = yaml.safe_load(block)
    shipped = {file.stem: file.read_text(encoding="utf-8") for file in (ROOT / "recipes").glob("*.yaml")}
    if "schema_version" in values:  # a recipe, whole or shortened
        recipe = tmp_path / f"{values['name']}.yaml"
        recipe.write_text(block)
        result = run_cli("validate", "--strict", recipe)
        assert (result.status, result.out) == (0, "1 recipe, 0 errors, 0 warnings\n"), result.out
        if values["name"] in shipped:
            lines = iter(without_comments(shipped[values["name"]]))
            assert all(line in lines for line in without_comments(block)), "not the shipped recipe, shortened"
    elif "repos" in values:  # of pre-commit
        (repository,) = values["repos"]
        known = {hook["id"] for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}
        assert {hook["id"] for hook in repository["hooks"]} <= known
        assert repository["rev"] == f"v{__version__}"
    elif isinstance(values, list):  # a step of a GitHub workflow
        (step,) = values
        assert step["uses"].endswith(f"@v{__version__}")
        assert set(step["with"]) <= set(yaml.safe_load((ROOT / "action.yml").read_text())["inputs"])
    else:
        assert any(block in text for text in shipped.values()), "not a part of a shipped recipe"


def test_the_recipe_of_the_reference_is_the_shipped_one():
    first = next(block for page, block in blocks("yaml") if page == "docs/recipe.md")
    assert first == (ROOT / "recipes" / "phi3_chat_qlora.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", SHOWN)
def test_every_command_with_a_prompt_is_of_a_kind_that_is_tested(command):
    assert "recipe-run " in command or command.startswith(
        ("make ", "check-jsonschema ", "python -m recipe_runner ", "pip install .")
    )


@pytest.mark.parametrize(
    "command",
    [command for command in [*SHOWN, *CELLS] if re.match(rf"recipe-run ({'|'.join(WITHOUT_STACK)})", command)],
)
def test_commands_that_need_no_model_print_what_is_shown(run_cli, monkeypatch, command):
    monkeypatch.chdir(ROOT)
    result = run_cli(*shlex.split(command)[1:])
    if SHOWN.get(command):
        assert result.out + result.err == SHOWN[command]
    else:
        assert result.status == 0


@pytest.mark.parametrize("command", [command for command in SHOWN if command.startswith("recipe-run new")])
def test_new_writes_a_recipe_that_is_valid(run_cli, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    assert run_cli(*shlex.split(command)[1:]).out == SHOWN[command]
    assert run_cli("validate", "--strict", tmp_path).status == 0


@pytest.mark.parametrize("command", RUN)
def test_commands_are_ones_that_we_have(run_cli, command):
    """Also those that train, and those inside a sentence: command, options and recipes exist."""
    words = command.partition("recipe-run ")[2].split()
    name = words[0] if f"\n  {words[0]} " in run_cli("--help").out else "train"
    known = re.findall(r"--?[a-z][a-z-]*", run_cli(name, "--help").out) + (["--version"] if len(words) == 1 else [])
    assert {word for word in words if re.match(r"--?[a-z]", word)} <= set(known)
    shipped = {file.stem for file in (ROOT / "recipes").glob("*.yaml")}
    for word in words:
        if re.fullmatch(r"(phi3|smollm2)_\w+", word):
            assert word in shipped
        elif re.fullmatch(r"(recipes|tests)/[\w/]*(\.yaml)?", word):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("command", [command for command in SHOWN if command.startswith("make ")])
def test_make_targets_exist(command):
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_command_of_another_validator_works():
    (command,) = [command for command in SHOWN if command.startswith("check-jsonschema")]
    arguments = [sys.executable, "-m", "check_jsonschema", *shlex.split(command)[1:]]
    answer = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


def test_training_commands_are_the_ones_that_the_launch_tests_run():
    tested = next((ROOT / "tests").rglob("test_launch.py")).read_text()
    for part in (
        "accelerate launch recipe-run recipes/",
        "accelerate launch --no_python recipe-run",
        "python -m recipe_runner",
    ):
        assert part in tested
        assert any(part in command for command in SHOWN)


def test_every_command_and_option_is_in_the_reference(run_cli):
    """And nothing else is."""
    names = re.findall(r"^  (\w+) ", run_cli("--help").out.partition("Commands:")[2], flags=re.MULTILINE)
    assert {"train", "validate", "preview", "new"} <= set(names)
    for name in names:
        title = "RECIPE" if name == "train" else name
        heading = next(line for line in CLI.splitlines() if re.match(rf"## .*recipe-run {title}\b", line))
        text = section(CLI, re.escape(heading.removeprefix("## ")))
        option = r"^ +(?:-\w, )?(--[a-z-]+|-[a-z]) "
        known = set(re.findall(option, run_cli(name, "--help").out, flags=re.MULTILINE)) - {"--help"}
        named = set(re.findall(r"`(--?[a-z][a-z-]*)", text))
        assert known <= named, name
        in_table = {cell[0].strip("`").split()[0] for cell in tables(text) if cell[0].startswith("`-")}
        assert in_table <= known, name


def as_cell(entry):
    """A default as the reference writes it; empty for none."""
    return "`{}`".format(json.dumps(entry["default"]).strip('"')) if "default" in entry else ""


HEADER = ("schema_version", "extends", "name", "description", "stage", "stages")


@pytest.mark.parametrize(
    ("heading", "entry"),
    [
        ("Header", {"properties": {key: schema.load()["properties"][key] for key in HEADER}}),
        *((name, schema.resolve(f"#/$defs/{name}")) for name in ("model", "peft", "dataset", "run", "metadata")),
        ("A source", schema.resolve("#/$defs/source")),
    ],
)
def test_keys_and_defaults_of_the_reference_are_those_of_the_schema(heading, entry):
    text = section(RECIPE, heading).partition("\n### ")[0]
    written = {row[0].strip("`"): row[1] for row in tables(text.partition("| stage |")[0])}
    assert written == {key: as_cell(of) for key, of in entry["properties"].items() if of.get("not") != {}}


def test_every_section_is_in_the_reference():
    for name in set(schema.load()["properties"]) - set(HEADER):
        assert section(RECIPE, name)


def test_defaults_of_pretraining_are_those_of_the_reference(run_cli, write_recipe):
    dataset = {"format": "text", "train": {"source": "someone/some-data"}}
    shown = run_cli("show", write_recipe(stage="pretrain", dataset=dataset, training={"learning_rate": 1e-4}))
    training = yaml.safe_load(shown.out)["training"]
    text = section(RECIPE, "training").partition("| key | default for `pretrain`")[2]
    written = {row[0].strip("`"): row[1] for row in tables(text)}
    assert len(written) == 4
    assert written == {key: as_cell({"default": training[key]}) for key in written}


def test_launch_configurations_of_the_reference_are_the_shipped_ones():
    text = section(PAGES["docs/distributed.md"], "Launch configurations")
    assert {row[0].strip("`") for row in tables(text)} == {
        file.stem for file in (ROOT / "accelerate_configs").glob("*.yaml")
    }


def test_inputs_of_the_action_are_those_of_the_reference():
    inputs = yaml.safe_load((ROOT / "action.yml").read_text())["inputs"]
    written = {row[0].strip("`"): row[1] for row in tables(section(PAGES["docs/editors-and-ci.md"], "GitHub"))}
    assert written == {name: f"`{entry['default']}`" for name, entry in inputs.items()}


def test_the_figures_of_the_readme_are_those_of_the_run_that_is_shown():
    names = {"the JSON object is right": "json", "right category": "json:category", "right priority": "json:priority"}
    row = r"^\| ([\w ]+) \| (\d\.\d\d) \| (\d\.\d\d) \| (\d\.\d\d) \| (\d\.\d\d) to (\d\.\d\d) \|$"
    figures = re.findall(row, README, flags=re.MULTILINE)
    assert [name for name, *_ in figures] == list(names)
    for name, base, shown, tuned, low, high in figures:
        measured = rf"^{names[name]} +{base}0 \[[^]]+\] +{shown}0 \[[^]]+\] +{tuned}0 \[{low}0, {high}0\]$"
        assert re.search(measured, CLI, flags=re.MULTILINE)


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_files_that_are_linked_or_named_exist(page):
    text, folder = (ROOT / page).read_text(encoding="utf-8"), (ROOT / page).parent
    for name, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", text):
        target = folder / name if name else ROOT / page
        assert target.is_file(), name
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{name}#{anchor}"
    for name in re.findall(r"`((?:recipes|accelerate_configs|docs|examples|schema|scripts|tests)/[\w./]+\.\w+)`", text):
        assert (ROOT / name).is_file(), name


def test_every_page_is_in_the_table_of_the_readme():
    table = section(README, "Documentation")
    assert {page for page in PAGES if page.startswith("docs/")} == set(re.findall(r"\]\((docs/[\w-]+\.md)\)", table))


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_left_to_fill_in(page):
    assert not re.search(r"\b[A-Z]+_OUTPUT\b|TODO|XXX", PAGES[page])


def test_version_is_the_changelog_s():
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
