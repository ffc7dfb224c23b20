"""Which runs there are, and how they went."""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe_runner.files import started_at
from recipe_runner.problems.errors import UserError
from recipe_runner.runs.folder import lock_run
from recipe_runner.runs.report import best_of, read_run


def list_all(folder: Path) -> list[dict[str, Any]]:
    """Every run in a folder and below it, by the time it was started.

    A run that calls itself running, and has no process, was killed: its status is `killed`.
    """
    runs = sorted((file.parent for file in folder.rglob("status.json")), key=lambda run: (started_at(run), str(run)))
    return [_describe(run) for run in runs]


def _describe(folder: Path) -> dict[str, Any]:
    empty = dict.fromkeys(("stage", "steps", "measure", "best", "seconds"))
    try:
        run = read_run(folder)
    except UserError:
        return {"name": folder.parent.name, **empty, "status": "damaged", "folder": str(folder)}
    status = str(run.status["status"])
    best = best_of(run)
    return {
        "name": run.values.get("name"),
        "stage": run.values.get("stage"),
        "status": "killed" if status == "running" and not is_active(folder) else status,
        "steps": run.step,
        "measure": best[0] if best else None,
        "best": best[1] if best and math.isfinite(best[1]) else None,
        "seconds": None if run.seconds is None else round(run.seconds, 1),
        "folder": str(folder),
    }


def is_active(folder: Path) -> bool:
    """Whether a process is in a run."""
    try:
        lock_run(folder).close()
    except (UserError, OSError):
        return True
    return False


def write_overview(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table of runs, the folder on a line of its own: it is long, and is what is copied."""
    rows = [("name", "stage", "status", "steps", "best", "seconds")]
    for run in runs:
        best = f"{run['measure']} {run['best']:.4g}" if run["best"] is not None else ""
        cells = (run["name"], run["stage"], run["status"], run["steps"], best, run["seconds"])
        rows.append(tuple("" if cell is None else str(cell) for cell in cells))  # type: ignore[arg-type]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], *(f"{line}\n    {run['folder']}" for line, run in zip(lines[1:], runs, strict=True))])


def remove(folder: Path) -> None:
    """Removes a run, whole; the folder of its recipe, too, where nothing else is in it.

    Raises:
        UserError: A process is in it.
    """
    lock_run(folder).close()
    (folder / "status.json").unlink()  # first: what is left of it is no run
    shutil.rmtree(folder)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()
