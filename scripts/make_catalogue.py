"""Writes recipes/README.md, the catalogue of the shelf.

python scripts/make_catalogue.py [--check]
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from recipe_runner.recipe.catalogue import Entry, read_catalogue, write_count, write_planned

FILE = Path(__file__).resolve().parent.parent / "recipes" / "README.md"
HEAD = """\
# Recipes

{count} recipes. Each is validated, previewed and executed in continuous integration: trained for some steps on a small
model of its own architecture, evaluated, saved, loaded back and resumed, and checked (`recipe-run smoke`,
[docs/smoke.md](../docs/smoke.md)), but for those that say they were never run. Each says in its first lines whether
it was also trained at full size.
`recipe-run list` finds one by model, task, method and size; `recipe-run copy NAME` takes one.

The memory of a device is planned (`recipe-run plan`), not measured: [how right that is](../docs/plan-accuracy.md).

Written by `scripts/make_catalogue.py`. Facts of the models stand in [models.json](models.json), each with its source;
[samples](samples/README.md) are rows in the layout of the data, [templates](templates/README.md) are chat templates.
"""


def write_catalogue(entries: Sequence[Entry]) -> str:
    """The page: a table a task."""
    return HEAD.format(count=len(entries)) + "\n".join(_sections(entries))


def _sections(entries: Sequence[Entry]) -> Iterator[str]:
    for task in dict.fromkeys(entry.task for entry in sorted(entries, key=lambda entry: entry.task)):
        yield f"\n## {task.capitalize().replace('-', ' ')}\n"
        yield "| recipe | model | method | memory, planned | for | licenses of model; data |"
        yield "|---|---|---|---|---|---|"
        for entry in entries:
            if entry.task == task:
                model = f"{entry.model.split('/')[-1]} ({write_count(entry.parameters)})"
                where = f"{entry.hardware}{f', `{entry.launch}`' if entry.launch else ''}"
                licenses = f"{entry.license}; {entry.data_license}"
                named = f"[{entry.name}]({entry.file.name}){' (never run)' * bool(entry.not_run)}"
                cells = [named, model, entry.method, write_planned(entry.planned)]
                yield f"| {' | '.join([*cells, where, licenses])} |"
    yield ""


def main() -> int:
    page = write_catalogue(read_catalogue())
    if "--check" in sys.argv:
        if not FILE.is_file() or FILE.read_text(encoding="utf-8") != page:
            print("recipes/README.md is stale: python scripts/make_catalogue.py", file=sys.stderr)
            return 1
        print(f"catalogue: {page.count('](') - 4} links, as the recipes say")
        return 0
    FILE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
