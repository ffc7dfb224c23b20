"""The schema: complete, documented, and about the versions that are installed."""

import json
import re
from collections import Counter

import pytest
from jsonschema import Draft202012Validator

from recipe_runner.methods import METHODS
from recipe_runner.problems.errors import UserError
from recipe_runner.recipe import schema
from recipe_runner.recipe.document import read_document
from recipe_runner.recipe.library import shelf, shipped_recipes
from recipe_runner.stages import STAGES

ROOT = shelf()
FILES = sorted((shelf() / "schema").rglob("*.schema.json"))
BUNDLE = shelf() / "schema" / "recipe.bundle.schema.json"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_schema_is_valid(file):
    Draft202012Validator.check_schema(json.loads(file.read_text()))


def properties(node, path=()):
    if isinstance(node, dict):
        for key, entry in node.get("properties", {}).items():
            yield (*path, key), entry
        for key, entry in node.items():
            yield from properties(entry, (*path, key))
    elif isinstance(node, list):
        for number, entry in enumerate(node):
            yield from properties(entry, (*path, number))


@pytest.mark.parametrize("file", [file for file in FILES if file != BUNDLE], ids=lambda file: file.stem)
def test_every_property_is_described(file):
    """Bounds on upstream's keys, choices by format, and `if` conditions refine a property described elsewhere."""
    refining = {"if", "shared_training", "packed_text", "rewarmed", "kl_estimated", "quantization", "allOf"}
    refining |= {"any_adapter", "generating_training", *METHODS}
    refining |= {f"{stage}_training" for stage in STAGES}
    for path, entry in properties(json.loads(file.read_text())):
        if "$ref" not in entry and (entry.get("not") == {} or not refining & set(path)):
            assert len(entry.get("description", "")) > 5 or file.parent.name == "upstream", path


def test_a_key_that_is_refused_says_why_and_its_replacement_exists():
    stages = STAGES
    known = {f"{s}.{key}" for s in schema.SECTIONS for stage in stages for key in schema.section_keys(s, stage)}
    known |= {f"peft.{key}" for method in METHODS for key in schema.section_keys("peft", method)}
    known |= {*schema.SECTIONS, "dataset.train.columns", "rewards"}
    for path, entry in properties(schema.load()):
        if "not" in entry and entry["not"] == {}:
            new = entry.get("x-replaced-by")
            names = {name.rpartition(".")[2] for name in known} | known | {"source", "subset"}
            assert new is None or new in names, path
            assert new or re.search(
                r"remove|use |belongs|upload|asked|takes|runner|tokenizer|every run|keeps|always|write",
                entry["description"],
            ), path


@pytest.mark.parametrize("stage", STAGES)
def test_upstream_defaults_are_valid_by_our_bounds(stage):
    """A bound that refuses upstream's own default would be a mistake."""
    form = schema.formats_of(stage)[-1]
    refused = {key for key, entry in schema.bounds_of("training", stage).items() if "not" in entry}
    upstream = schema.fields_of("training", stage)["properties"]
    training = {key: entry["default"] for key, entry in upstream.items() if key not in refused}
    dataset = {"format": form, "train": {"source": "a/b"}}
    recipe = {"schema_version": 1, "name": "x", "stage": stage, "model": {"name_or_path": "a/b"}, "dataset": dataset}
    if STAGES[stage].rewarded:
        recipe["rewards"] = [{"name": "json_valid"}]
    if STAGES[stage].taught:
        recipe["model"]["teacher"] = "c/d"
    errors = list(schema.validator().iter_errors(recipe | {"training": training}))
    assert not errors, [error.message for error in errors]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_s_defaults_are_valid_by_our_bounds(method):
    bounds, fields = schema.bounds_of("peft", method), schema.fields_of("peft", method)["properties"]
    refused = {key for key, entry in bounds.items() if "not" in entry}
    said = {key: entry["default"] for key, entry in fields.items() if "default" in entry and key not in refused}
    unset = {key for key, value in said.items() if value is None or (value == 0 and key == "r")}  # PEFT finds them
    peft = {key: value for key, value in said.items() if key not in unset and value != []} | {"method": method}
    recipe = {"schema_version": 1, "name": "x", "stage": "sft", "model": {"name_or_path": "a/b"}, "peft": peft}
    recipe["dataset"] = {"format": "text", "train": {"source": "a/b"}}
    errors = list(schema.validator("sft", method).iter_errors(recipe))
    assert not errors, [error.message for error in errors]


def test_bundle_is_one_file_that_agrees_with_the_schema_on_every_example(tmp_path):
    """Any validator takes it as it is: no file beside it, no keyword of ours. Rules are beyond it."""
    bundle = json.loads(BUNDLE.read_text())
    assert '"upstream/' not in json.dumps(bundle)
    assert '"x-' not in json.dumps(bundle)
    whole = Draft202012Validator(bundle)
    examples = shelf() / "tests" / "examples"
    compared = 0
    for file in [*examples.glob("*/*.yaml"), *shipped_recipes()]:
        try:
            values = read_document(file).values
        except UserError:
            continue
        assert whole.is_valid(values) == (not any(errors_but_integers(values))), file
        compared += 1
    assert compared > 30


def errors_but_integers(values):
    """Our validator's errors, but for 4.0 in place of 4, which JSON can't tell apart."""
    method = schema.kinds_of(values).get("peft", "")
    for error in schema.validator(method=method).iter_errors(values):
        if not (error.validator == "type" and isinstance(error.instance, float) and error.instance.is_integer()):
            yield error


@pytest.mark.parametrize("method", ["", *METHODS])
def test_the_quick_check_says_what_the_whole_one_says(method):
    """Of all examples, right and wrong, as recipes of each stage."""
    files = [*sorted((ROOT / "tests" / "examples").rglob("*.yaml")), *shipped_recipes()]
    verdicts = Counter()
    for file in files:
        try:
            values = read_document(file).values
        except UserError:
            continue
        for stage in ("", *schema.choices("stage")):
            whole, quick = (of(stage, method).is_valid(values) for of in (schema.validator, schema.quick_validator))
            assert whole == quick, (file, stage)
            verdicts[whole] += 1
    assert verdicts[True] > 10
    assert verdicts[False] > 100


@pytest.mark.parametrize(
    ("parts", "right", "wrong"),
    [
        ([{"properties": {"a": {}}, "additionalProperties": False}, {"properties": {"b": {}}}], {"a": 1}, {"b": 1}),
        ([{"required": ["a"]}, {"required": ["b"]}], {"a": 1, "b": 1}, {"a": 1}),
        ([{"properties": {"a": {"minimum": 2}}}, {"properties": {"a": {"minimum": 3}}}], {"a": 3}, {"a": 2}),
        ([{"properties": {"a": {"maximum": 2}}}, {"properties": {"a": {"minimum": 1}}}], {"a": 1}, {"a": 3}),
        ([{"if": {"required": ["a"]}, "then": {"required": ["b"]}}, {"then": {"required": ["c"]}}], {}, {"a": 1}),
        ([{"then": False}, {"if": {"required": ["a"]}, "else": False}], {"a": 1}, {}),
        ([{"type": "object"}, False], None, {}),
    ],
)
def test_what_is_joined_says_the_same(parts, right, wrong):
    flat = schema._flatten({"allOf": parts}, {})
    for checked in (flat, {"allOf": parts}):
        assert right is None or Draft202012Validator(checked).is_valid(right)
        assert not Draft202012Validator(checked).is_valid(wrong)
