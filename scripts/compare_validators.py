"""Do other validators agree with our verdict, by the bundled schema alone? Compares them on every example and recipe.

    python scripts/compare_validators.py                     # check-jsonschema
    python scripts/compare_validators.py --ajv NODE_MODULES  # and Ajv: npm install --prefix DIR ajv

A schema can't say everything: rules across sections, strict YAML and `4` against `4.0` are ours alone. Where another
validator accepts what we refuse, every problem that we name must be of that kind; exit status 1 otherwise.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from recipe_runner.problems.errors import UserError
from recipe_runner.recipe import schema
from recipe_runner.recipe.document import read_document
from recipe_runner.recipe.library import shelf, shipped_recipes
from recipe_runner.recipe.resolve import examine_recipe, load_recipe
from recipe_runner.recipe.rules import apply_rules

BUNDLE = shelf() / "schema" / "recipe.bundle.schema.json"
AJV = """
const Ajv = require(process.argv[1] + "/ajv/dist/2020");
const input = JSON.parse(require("fs").readFileSync(0));
const check = new Ajv({strict: false, allErrors: true}).compile(input.schema);
console.log(JSON.stringify(input.documents.map(document => check(document))));
"""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--ajv", metavar="NODE_MODULES", help="Folder node_modules that holds ajv.")
    node_modules = arguments.parse_args().ajv
    files = readable([*sorted((shelf() / "tests" / "examples").glob("*/*.yaml")), *shipped_recipes()])
    verdicts = {"check-jsonschema": ask_check_jsonschema(files)}
    if node_modules:
        verdicts["ajv"] = ask_ajv(files, node_modules)
    unexplained = 0
    for name, accepted in verdicts.items():
        kinds = [compare(file, accepts) for file, accepts in zip(files, accepted, strict=True)]
        for file, kind in zip(files, kinds, strict=True):
            if kind == "unexplained":
                print(f"{name} and recipe-run disagree about {file}")
        unexplained += kinds.count("unexplained")
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(sorted(kinds)))
        print(f"{name}: {len(files)} files: {counts}")
    return 1 if unexplained else 0


def readable(files: list[Path]) -> list[Path]:
    """Files that are strict YAML and whole: what is partial or unsound as YAML is none of a schema's business."""
    whole = []
    for file in files:
        try:
            document = read_document(file)
        except UserError:
            continue
        if "extends" not in document.values and not document.problems:
            whole.append(file)
    return whole


def compare(file: Path, accepts: bool) -> str:
    """Whether another validator's verdict is ours: `agree`, `beyond a schema`, or `unexplained`."""
    recipe, problems = examine_recipe(file)
    if accepts == (recipe is not None):
        return "agree"
    rules = {code for code, _ in apply_rules(load_recipe("phi3_chat_qlora"))}
    only_rules = {problem.code for problem in problems} <= rules
    ours_alone = only_rules or not list(errors_but_integers(read_document(file).values))
    return "beyond a schema" if accepts and ours_alone else "unexplained"


def errors_but_integers(values):
    """The schema's errors, but for 4.0 in place of 4, which JSON can't tell apart."""
    method = schema.kinds_of(values).get("peft", "")
    for error in schema.validator(method=method).iter_errors(values):
        if not (error.validator == "type" and isinstance(error.instance, float) and error.instance.is_integer()):
            yield error


def ask_check_jsonschema(files: list[Path]) -> list[bool]:
    command = [sys.executable, "-m", "check_jsonschema", "--schemafile", str(BUNDLE), "--output-format", "json"]
    answer = subprocess.run([*command, *map(str, files)], capture_output=True, text=True)
    told = json.loads(answer.stdout)
    refused = {entry["filename"] for entry in told["errors"] + told["parse_errors"]}
    return [str(file) not in refused for file in files]


def ask_ajv(files: list[Path], node_modules: str) -> list[bool]:
    documents = [read_document(file).values for file in files]
    asked = json.dumps({"schema": json.loads(BUNDLE.read_text(encoding="utf-8")), "documents": documents})
    command = ["node", "-e", AJV, str(Path(node_modules).absolute())]
    answer = subprocess.run(command, input=asked, stdout=subprocess.PIPE, text=True, check=True)
    accepted: list[bool] = json.loads(answer.stdout)
    return accepted


if __name__ == "__main__":
    sys.exit(main())
