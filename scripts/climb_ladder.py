"""Validates, previews and executes recipes, and prints a table for the summary of a job; exit status 1 where one fails.

python scripts/climb_ladder.py recipes/*.yaml
"""

import json
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from recipe_runner.cli import cli

JOBS = 2


def call(*arguments: str) -> Result:
    """Runs a command of recipe-run in this process, which imports the training stack once, and passes on its errors."""
    done = CliRunner().invoke(cli, arguments)
    if done.exit_code:
        print(done.output, file=sys.stderr)
    return done


def preview(file: str) -> str:
    """How many rows a preview shows; empty where it fails. A pipeline's rows are those of its stages."""
    done = CliRunner().invoke(cli, ["preview", file, "--format", "json"])
    if not done.exit_code:
        rows = len(json.loads(done.stdout))
        return f"{rows} row{'s' * (rows != 1)}"
    if "pipeline-has-no-rows" in done.stderr:
        return "those of its stages"
    print(done.stderr, file=sys.stderr)
    return ""


def main() -> int:
    files = sys.argv[1:]
    if not files:
        print("No recipe has changed.")
        return 0
    executed = call("smoke", "--jobs", str(JOBS), "--format", "json", *files)
    outcomes: dict[str, list[dict[str, Any]]] = {file: [] for file in files}
    for outcome in json.loads(executed.stdout or "[]"):
        outcomes[outcome["recipe"]].append(outcome)
    print("| recipe | validate | preview | smoke | seconds |\n|---|---|---|---|---:|")
    failed = False
    for file, of in outcomes.items():
        valid = not call("validate", "--strict", file).exit_code
        rows = preview(file)
        good = bool(of) and all(outcome["ok"] for outcome in of)
        failed |= not (valid and rows and good)
        seconds = sum(outcome["seconds"] for outcome in of)
        cells = ["ok" if valid else "**failed**", rows or "**failed**", "ok" if good else "**failed**"]
        print(f"| {Path(file).stem} | {' | '.join(cells)} | {seconds:.1f} |")
    for outcome in (outcome for of in outcomes.values() for outcome in of):
        for problem in outcome["problems"]:
            print(f"\n`{outcome['name']}`: {problem['message']}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
