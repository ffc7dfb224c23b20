"""`metrics.jsonl`: what the trainer logged, one JSON object a line, with `time` (seconds) and `step`."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe_runner.files import write_text

FILE = "metrics.jsonl"


def append_metrics(run: Path, metrics: dict[str, Any]) -> None:
    """Adds a line."""
    with (run / FILE).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"time": round(time.time(), 3), **metrics}) + "\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines, oldest first; without the last one if the run was killed while it wrote it."""
    try:
        lines = (run / FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def drop_metrics_after(run: Path, step: int) -> None:
    """Removes the lines of steps that a resumed run trains again."""
    kept = [entry for entry in read_metrics(run) if entry.get("step", 0) <= step]
    if kept or (run / FILE).exists():
        write_text(run / FILE, "".join(json.dumps(entry) + "\n" for entry in kept))


def measure_series(logged: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Step and value of every time that a measure was logged."""
    return [(entry["step"], entry[key]) for entry in logged if key in entry]
