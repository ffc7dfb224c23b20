"""The house: what may import what, what an import may do, and that a fact is written once."""

import ast
import dataclasses
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from recipe_runner.recipe import schema
from recipe_runner.recipe.sections import DatasetSection, ModelSection, RunSection, SourceSection
from recipe_runner.stages import FORMATS, PIPELINE, STAGES

PACKAGE = ROOT / "recipe_runner"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "numpy", "pyarrow"}
# Rooms from the ground up: a room imports itself and the rooms before it, and nothing else.
ORDER = [
    "problems",
    "files",
    "workers",
    "pages",
    "stages",
    "methods",
    "recipe",
    "runs",
    "launch",
    "data",
    "importing",
    "model",
    "plan",
    "training",
    "preview",
    "results",
    "studies",
    "smoke",
    "cli",
]
LIGHT = {"problems", "files", "pages", "stages", "methods", "recipe", "importing", "runs", "cli"}  # never the ML stack
LIGHT_MODULES = {"launch/configuration.py", "launch/rules.py", "launch/process.py", "data/formats.py"}


def name_of(file):
    return str(file.relative_to(PACKAGE))


def room_of(module):
    """recipe_runner.data.store -> data."""
    return module.split(".")[1]


def imported_modules(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module if node.module != "recipe_runner" else f"recipe_runner.{node.names[0].name}"


@pytest.mark.parametrize(
    "file", [file for file in FILES if name_of(file) not in ("__init__.py", "__main__.py")], ids=name_of
)
def test_imports_point_only_downward(file):
    own = name_of(file).split("/")[0].removesuffix(".py")
    rooms = {room_of(name) for name in imported_modules(file) if name.startswith("recipe_runner.")} - {"__version__"}
    allowed = ORDER[: ORDER.index(own) + 1]
    assert rooms <= set(allowed), f"{own} imports {rooms - set(allowed)}"


def test_every_room_has_its_place_in_the_order():
    rooms = {name_of(file).split("/")[0].removesuffix(".py") for file in FILES} - {"__init__", "__main__"}
    assert rooms == set(ORDER)


def test_nothing_imports_the_command_line_but_the_door():
    importers = {name_of(file) for file in FILES if "recipe_runner.cli" in imported_modules(file)}
    assert importers == {"__main__.py"}


@pytest.mark.parametrize(
    "file",
    [
        file
        for file in FILES
        if name_of(file).split("/")[0].removesuffix(".py") in LIGHT or name_of(file) in LIGHT_MODULES
    ],
    ids=name_of,
)
def test_what_validation_needs_never_imports_the_ml_stack(file):
    assert not {name.split(".")[0] for name in imported_modules(file)} & HEAVY


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1] == "loaded: []", done.stderr


def test_importing_the_package_changes_nothing():
    """No environment, no logging, no output: a function does that, when a command asks for it."""
    names = [name_of(file).removesuffix(".py").replace("/", ".") for file in FILES]
    light = [name for name in names if name.split(".")[0] in LIGHT and not name.endswith(("__init__", "__main__"))]
    code = (
        "import importlib, logging, os, sys, warnings\n"
        "def state(): return dict(os.environ), sys.stdout, logging.root.manager.disable, len(warnings.filters)\n"
        f"before = state()\nfor name in {light!r}: importlib.import_module('recipe_runner.' + name)\n"
        "assert state() == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def top_level_calls(file):
    """What a module calls when it is imported, outside of definitions."""
    for node in ast.parse(file.read_text()).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom | ast.If):
            yield from (ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_module_sets_anything_when_it_is_imported(file):
    """Held on the text for the modules whose import takes the ML stack."""
    assert not [
        call for call in top_level_calls(file) if re.match(r"(os\.environ|logging|warnings|sys)\.|print$", call)
    ]
    assert not re.search(r"^(os\.environ|sys\.stdout)\b.*=", file.read_text(), flags=re.MULTILINE)


def literals(file):
    """Strings of a module that are values, not documentation."""
    tree = ast.parse(file.read_text())
    documented = {
        id(node.value)
        for parent in ast.walk(tree)
        if isinstance(parent, ast.Module | ast.ClassDef | ast.FunctionDef)
        for node in parent.body
        if isinstance(node, ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node.value


@pytest.mark.parametrize("file", [file for file in FILES if name_of(file) != "stages.py"], ids=name_of)
def test_no_module_but_one_names_a_stage(file):
    named = set(literals(file)) & (set(STAGES) | {PIPELINE})
    assert not named - ({"sft"} if name_of(file) == "recipe/schema.py" else set())  # the reference for unknown stages


def test_stages_and_formats_are_those_of_the_schema():
    assert schema.choices("stage") == [*STAGES, PIPELINE]
    assert schema.choices("dataset", "format") == list(FORMATS)
    roles = {role for layout in FORMATS.values() for role in layout.roles}
    assert roles == set(schema.resolve("#/$defs/source")["properties"]["columns"]["properties"])
    for stage in STAGES.values():
        assert (PACKAGE / "data" / "shapes" / f"{stage.shape}.py").is_file()
        assert schema.formats_of(stage.name)
        assert schema.fields_of("training", stage.name)["title"] == stage.config.split(":")[1]


def fallbacks(file):
    """`x.get("key", value)`: keys and values that stand in for what is left out."""
    calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
    for call in calls:
        constants = len(call.args) == 2 and all(isinstance(argument, ast.Constant) for argument in call.args)
        if constants and isinstance(call.func, ast.Attribute) and call.func.attr == "get":
            yield call.args[0].value, call.args[1].value


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_module_repeats_a_default_that_stands_in_a_schema(file):
    defaults = {}
    for section in ("training", "peft", "quantization"):
        for stage in STAGES:
            defaults |= schema.defaults_of(section, stage)
    own = [entry for name in ("model", "dataset", "source", "run") for entry in [schema.resolve(f"#/$defs/{name}")]]
    defaults |= {key: e["default"] for entry in own for key, e in entry["properties"].items() if "default" in e}
    repeated = [(key, value) for key, value in fallbacks(file) if key in defaults and defaults[key] == value]
    assert not [pair for pair in repeated if pair[1] not in (None, False, "")]


@pytest.mark.parametrize(
    ("cls", "section", "more"),
    [
        (ModelSection, "model", set()),
        (RunSection, "run", set()),
        (DatasetSection, "dataset", {"fraction"}),
        (SourceSection, "source", {"path"}),
    ],
)
def test_typed_sections_have_the_keys_of_the_schema(cls, section, more):
    properties = schema.resolve(f"#/$defs/{section}")["properties"]
    keys = {key for key, entry in properties.items() if entry.get("not") != {}}
    assert {field.name for field in dataclasses.fields(cls)} == keys | more


def test_the_pages_say_the_order_of_the_house():
    page = (ROOT / "docs" / "architecture.md").read_text()
    told = re.findall(r"^\| `(\w+?)(?:\.py|/)?` \|", page.partition("## The house")[2], flags=re.MULTILINE)
    assert told == ORDER


def test_the_bundle_is_of_these_stages():
    bundle = json.loads((ROOT / "schema" / "recipe.bundle.schema.json").read_text())
    assert bundle["properties"]["stage"]["enum"] == [*STAGES, PIPELINE]
