"""Which runs there are, and how they went."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe_runner.files import started_at
from recipe_runner.problems.errors import UserError
from recipe_runner.problems.words import align
from recipe_runner.runs.folder import lock_run
from recipe_runner.runs.report import UNREADABLE, best_of, read_run
from recipe_runner.stages import PIPELINE

LEAVING = ".leaving"  # suffix of a run that is being removed: what is left of one that could not be is no run


def list_all(folder: Path) -> list[dict[str, Any]]:
    """Every run in a folder and below it, by the time it was started."""
    runs = sorted((file.parent for file in folder.rglob("status.json")), key=lambda run: (started_at(run), str(run)))
    return [_describe(run) for run in runs if not any(part.endswith(LEAVING) for part in run.parts)]


def _describe(folder: Path) -> dict[str, Any]:
    try:
        run = read_run(folder)
        best = best_of(run)
        pipeline = run.values.get("stage") == PIPELINE
        return {
            "name": run.values.get("name"),
            "stage": run.values.get("stage"),
            "status": run.state,
            "steps": None if pipeline else run.step,
            "measure": best[0] if best else None,
            "best": best[1] if best else None,
            "seconds": None if run.seconds is None else round(run.seconds, 1),
            "folder": str(folder),
        }
    except (UserError, *UNREADABLE):
        empty = dict.fromkeys(("stage", "steps", "measure", "best", "seconds"))
        return {"name": folder.parent.name, **empty, "status": "damaged", "folder": str(folder)}


def write_overview(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table of runs, the folder on a line of its own: it is long, and is what is copied."""
    rows = [["name", "stage", "status", "steps", "best", "seconds"]]
    for run in runs:
        best = f"{run['measure']} {run['best']:.4g}" if run["best"] is not None else None
        cells = (run["name"], run["stage"], run["status"], run["steps"], best, run["seconds"])
        rows.append(["" if cell is None else str(cell) for cell in cells])
    head, *lines = align(rows)
    return "\n".join([head, *(f"{line}\n    {run['folder']}" for line, run in zip(lines, runs, strict=True))])


def choose_failed(runs: Sequence[Mapping[str, Any]]) -> tuple[list[Path], list[Path]]:
    """Runs that failed, and can be removed; and those that failed and hold a run that did not (a pipeline's stage).

    A run inside one that can be removed goes with it, and is not named.
    """
    failed = [Path(run["folder"]) for run in runs if run["status"] == "failed"]
    others = [Path(run["folder"]) for run in runs if run["status"] != "failed"]
    kept = [folder for folder in failed if any(folder in other.parents for other in others)]
    free = [folder for folder in failed if folder not in kept]
    return [folder for folder in free if not any(above in free for above in folder.parents)], kept


def remove(folder: Path) -> None:
    """Removes a run, whole; the folder of its recipe, too, where nothing else is in it.

    Raises:
        UserError: A process is in it.
    """
    lock_run(folder).close()
    leaving = folder.with_name(f"{folder.name}{LEAVING}")
    folder.rename(leaving)
    shutil.rmtree(leaving)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()
