"""Converts examples of other tools, and says how many were recognised, converted, and give a recipe that validates.

    python scripts/try_imports.py axolotl/examples LLaMA-Factory/examples alignment-handbook/recipes trl/examples

Folders of files that were fetched before: nothing is downloaded. Of each folder the keys without a counterpart that
are there most often are printed, and what was said of files that give no recipe.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from recipe_runner.importing.convert import convert_file
from recipe_runner.importing.draft import NONE
from recipe_runner.importing.tools import read_configuration, recognise
from recipe_runner.problems.errors import UserError
from recipe_runner.recipe.resolve import examine_recipe

TOP = 20  # keys without a counterpart that are printed


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("folders", nargs="+", type=Path)
    for folder in arguments.parse_args().folders:
        counts, missing, said = try_folder(folder)
        print(f"{folder}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
        print(f"  no counterpart: {', '.join(f'{key} {count}' for key, count in missing.most_common(TOP))}")
        for message, count in said.most_common():
            print(f"  {count} x {message}")
        if counts["valid"] + sum(said.values()) < counts["files"]:
            sys.exit(f"{folder}: some files give neither a recipe nor a sentence")


def try_folder(folder: Path) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """What became of the files of a folder; keys without a counterpart; what was said of files without a recipe."""
    counts, missing, said = Counter(files=0, recognised=0, converted=0, valid=0), Counter[str](), Counter[str]()
    for file in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        counts["files"] += 1
        try:
            recognise(read_configuration(file), file)
            counts["recognised"] += 1
            made = convert_file(file, "made")
            counts["converted"] += 1
            missing.update(line.key for line in made.lines if line.kind == NONE)
            with tempfile.TemporaryDirectory() as place:
                recipe = Path(place) / "made.yaml"
                recipe.write_text(made.recipe, encoding="utf-8")
                if made.template:
                    recipe.with_suffix(".jinja").write_text(made.template, encoding="utf-8")
                errors = [problem for problem in examine_recipe(recipe)[1] if problem.severity == "error"]
            if errors:
                raise UserError(errors)
            counts["valid"] += 1
        except UserError as error:
            problem = error.problems[0]
            said[f"[{problem.code}] {problem.told.replace(str(file), 'it')}"] += 1
    return counts, missing, said


if __name__ == "__main__":
    main()
