"""Prints shipped recipes, one a line, for `recipe-run smoke` in continuous integration.

python scripts/choose_recipes.py families           one of each architecture and each method
python scripts/choose_recipes.py changed [BASE]     those that a change since BASE (origin/main) touches
python scripts/choose_recipes.py half [SEED]        half of all, by a seed (the commit)
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from recipe_runner.recipe.catalogue import Entry, read_catalogue
from recipe_runner.recipe.models import find_facts

ROOT = Path(__file__).resolve().parent.parent


def families(entries: list[Entry]) -> list[Entry]:
    """The fewest recipes, in their order, that have every architecture, every method and every stage."""
    kinds = {entry.name: _kinds(entry) for entry in entries}
    chosen, left = [], set().union(*kinds.values())
    while left:
        best = max(entries, key=lambda entry: len(kinds[entry.name] & left))
        chosen.append(best)
        left -= kinds[best.name]
    return sorted(chosen, key=lambda entry: entry.name)


def _kinds(entry: Entry) -> set[str]:
    facts = find_facts(entry.model)
    return {f"architecture {facts.model_type}" if facts else "", f"method {entry.method}", f"stage {entry.stage}"}


def changed(entries: list[Entry], base: str) -> list[Entry]:
    """Recipes of which a change touches a file: their own, or one that they name or extend."""
    done = subprocess.run(["git", "diff", "--name-only", f"{base}...HEAD"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"no commit {base} here: what has changed is not known", file=sys.stderr)
        return []  # a copy without history
    names = set(done.stdout.split())
    models = _changed_models(base) if "recipes/models.json" in names else set()
    return [
        entry for entry in entries if entry.model in models or names & {f"recipes/{file}" for file in _files(entry)}
    ]


def _changed_models(base: str) -> set[str]:
    """The models whose facts differ from those of a commit."""
    told = ["git", "show", f"{base}:recipes/models.json"]
    before = json.loads(subprocess.run(told, cwd=ROOT, capture_output=True, text=True).stdout or "{}")
    now = json.loads((ROOT / "recipes" / "models.json").read_text(encoding="utf-8"))
    return {name for name, facts in now.items() if facts != before.get(name)}


def _files(entry: Entry) -> set[str]:
    """The files of a recipe: its own, and what it names."""
    text = entry.file.read_text(encoding="utf-8")
    words = {word.strip("{},[]\"'") for word in text.split()}
    own = {entry.file.name, *(word for word in words if word.startswith(("samples/", "data/", "templates/")))}
    bases = [line.split()[1] for line in text.splitlines() if line.startswith("extends:")]
    return own | {f"{base}.yaml" for base in bases}


def half(entries: list[Entry], seed: str) -> list[Entry]:
    """Half of all, by a seed."""
    chosen = set(random.Random(seed).sample([entry.name for entry in entries], len(entries) // 2))
    return [entry for entry in entries if entry.name in chosen]


def commit() -> str:
    """The commit that is checked out; empty in a copy without history."""
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def main() -> None:
    entries = read_catalogue()
    choices = {
        "families": lambda: families(entries),
        "changed": lambda: changed(entries, os.environ.get("BASE") or "origin/main"),
        "half": lambda: half(entries, commit()),
    }
    for name in sorted({entry.file for kind in sys.argv[1:] for entry in choices[kind]()}):
        print(name)


if __name__ == "__main__":
    main()
