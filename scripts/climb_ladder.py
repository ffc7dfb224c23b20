"""Validates, previews and executes recipes, and prints a table for the summary of a job; exit status 1 where one fails.

python scripts/climb_ladder.py recipes/*.yaml
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RUN = [sys.executable, "-m", "recipe_runner"]
JOBS = 2


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command, and passes on what it says of errors."""
    done = subprocess.run([*RUN, *arguments], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
    return done


def preview(file: str) -> str:
    """How many rows a preview shows; empty where it fails. A pipeline's rows are those of its stages."""
    done = subprocess.run([*RUN, "preview", file, "--format", "json"], capture_output=True, text=True)
    if done.returncode:
        if "pipeline-has-no-rows" in done.stderr:
            return "those of its stages"
        print(done.stderr, file=sys.stderr)
        return ""
    return f"{len(json.loads(done.stdout))} rows"


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
        valid = not call("validate", "--strict", file).returncode
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
