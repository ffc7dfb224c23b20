"""Time and memory of `recipe-run validate`, whole cold processes, beside what it can't do without, in turn.

    python benchmarks/validate.py [ROUNDS]

Prints the median of each command over the rounds, and its ratio to a process that imports only the three packages;
then folders of 1,000 and 2,000 recipes: time, growth, and the largest resident memory.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recipe_runner.recipe.library import shipped_recipes

VALIDATE = [sys.executable, "-m", "recipe_runner", "validate"]


def main(rounds: int) -> None:
    commands = {
        "imports": [sys.executable, "-c", "import jsonschema, click, yaml"],
        "bare Python": [sys.executable, "-c", ""],
        "--help": [sys.executable, "-m", "recipe_runner", "--help"],
        "validate one recipe": [*VALIDATE, str(shipped_recipes()[0])],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            seconds[name].append(measure(command)[0])
    for name, series in seconds.items():
        ratio = statistics.median(one / imports for one, imports in zip(series, seconds["imports"], strict=True))
        print(f"{name:<20} {statistics.median(series) * 1000:6.0f} ms  ({ratio:.2f} times the imports)")
    with tempfile.TemporaryDirectory() as folder:
        times = []
        for count in (1000, 2000):
            fill(Path(folder), count)
            took, memory = measure([*VALIDATE, folder])
            times.append(took)
            each = took / count * 1000
            print(f"{count} recipes         {took:6.2f} s, {each:.2f} ms each, {memory / 2**20:.0f} MiB at most")
        print(f"twice as many recipes take {times[1] / times[0]:.2f} times as long")


def fill(folder: Path, count: int) -> None:
    """Writes copies of the shipped recipes, each under its own name."""
    texts = [(file.stem, file.read_text(encoding="utf-8")) for file in shipped_recipes()]
    for number in range(count):
        stem, text = texts[number % len(texts)]
        text = text.replace(f"name: {stem}", f"name: r{number}").replace(
            "data/", f"{shipped_recipes()[0].parent}/data/"
        )
        (folder / f"r{number}.yaml").write_text(text, encoding="utf-8")


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds and largest resident memory in bytes of one process that must succeed."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.monotonic() - began, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 11)
