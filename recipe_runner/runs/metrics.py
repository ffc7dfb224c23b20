"""`metrics.jsonl`: what the trainer logged, one JSON object a line, with `time` (seconds) and `step`.

`completions.jsonl`, of stages in which the model answers itself: every answer, with what judged it, and `step`.
"""

import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe_runner.files import write_text

FILE, COMPLETIONS = "metrics.jsonl", "completions.jsonl"


def append_metrics(run: Path, metrics: dict[str, Any]) -> None:
    """Adds a line."""
    append_line(run / FILE, {"time": round(time.time(), 3), **metrics})


def append_line(file: Path, entry: dict[str, Any]) -> None:
    """Adds a JSON object as a line; where half a line was left by a kill or a full disk, below it."""
    line = json.dumps(entry, ensure_ascii=False) + "\n"
    with file.open("ab+") as stream:
        if end := stream.tell():
            stream.seek(end - 1)
            line = line if stream.read(1) == b"\n" else f"\n{line}"  # a disk was full, or the process killed
        stream.write(line.encode())


def read_metrics(run: Path, name: str = FILE) -> list[dict[str, Any]]:
    """All lines that can be read, oldest first: a run that is killed may leave one half written."""
    try:
        lines = (run / name).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    return [entry for line in lines if (entry := _read_line(line))]


def _read_line(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else {}


def drop_metrics_after(run: Path, step: int) -> None:
    """Removes the lines of steps that a resumed run trains again, and those that can't be read."""
    for name in (FILE, COMPLETIONS):
        if (run / name).exists():
            kept = [entry for entry in read_metrics(run, name) if entry["step"] <= step]
            write_text(run / name, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept))


def measure_speed(run: Path) -> dict[str, float]:
    """Seconds of a step and tokens a second: the median, as what else the machine did meanwhile does not count."""
    logged = [entry for entry in read_metrics(run) if "loss" in entry or "eval_loss" in entry]
    steps, speeds = [], []
    for before, entry in itertools.pairwise(logged):
        if "loss" in before and "loss" in entry and entry["step"] > before["step"]:  # no evaluation between
            seconds = entry["time"] - before["time"]
            steps.append(seconds / (entry["step"] - before["step"]))
            speeds.append((entry.get("num_tokens", 0) - before.get("num_tokens", 0)) / max(seconds, 1e-9))
    if not steps:
        return {}
    return {"step_seconds": statistics.median(steps), "tokens_per_second": statistics.median(speeds)}


def measure_series(logged: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Step and value of every time that a measure was logged."""
    return [(entry["step"], entry[key]) for entry in logged if key in entry]
