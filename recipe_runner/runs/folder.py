"""The folder of a run: what is in it, and how its status changes. Written by one process."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from recipe_runner.problems.errors import UserError, user_error
from recipe_runner.recipe.document import parse_document
from recipe_runner.recipe.dump import dump_values
from recipe_runner.recipe.recipe import Recipe

COMPLETE = "complete"  # an empty file, the last thing written into a checkpoint


def create_run_folder(recipe: Recipe) -> Path:
    """Creates a new run folder with the recipe, as given and resolved, and status `running`.

    Raises:
        UserError: The folder can't be written.
    """
    run_id = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")  # in the order of time, also within a second
    folder: Path = Path(recipe.values["run"]["output_dir"]) / recipe.values["name"] / run_id
    try:
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(recipe.text, encoding="utf-8")
        (folder / "resolved.yaml").write_text(dump_values(dict(recipe.values)), encoding="utf-8")
        write_status(folder, "running")
    except OSError as error:
        raise _unwritable(recipe, folder, error) from error
    return folder


def check_writable(recipe: Recipe) -> None:
    """Checks that run folders can be created, without leaving anything behind.

    Raises:
        UserError: They can't.
    """
    folder = Path(recipe.values["run"]["output_dir"])
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise _unwritable(recipe, folder, NotADirectoryError(20, f"{existing} is a file"))
    try:
        with tempfile.TemporaryDirectory(prefix=".recipe-run-", dir=existing):
            pass
    except OSError as error:
        raise _unwritable(recipe, folder, error) from error


def _unwritable(recipe: Recipe, folder: Path, error: OSError) -> UserError:
    fix = "choose another folder: --output-dir DIR"
    return recipe.error("output-not-writable", f"cannot write {folder}: {error.strerror}", fix, "run", "output_dir")


def write_status(folder: Path, status: str, **details: Any) -> None:
    """Writes `status.json` in one step: a reader sees the old file or the new one, never a part."""
    write_json(
        folder / "status.json",
        {"status": status, "updated": datetime.now(timezone.utc).isoformat(timespec="seconds"), **details},
    )


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    partial = file.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)


SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # of each file, evenly spaced: training changes nearly all bytes of all tensors


def hash_weights(folder: Path) -> str | None:
    """A hash of the weights in a folder, by samples of every file; None when there are none."""
    files = sorted(file for suffix in ("safetensors", "bin") for file in folder.glob(f"*.{suffix}"))
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for sample in range(SAMPLES):
                stream.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest() if files else None


def append_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Adds a line to `metrics.jsonl`."""
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"time": round(time.time(), 3), **metrics}) + "\n")


def drop_metrics_after(folder: Path, step: int) -> None:
    """Removes the metrics of steps that a resumed run trains again."""
    file = folder / "metrics.jsonl"
    if file.exists():
        lines = file.read_text(encoding="utf-8").splitlines()
        lines = [line for line in lines if line.endswith("}")]  # the last one is cut off if the run was killed in it
        kept = [line for line in lines if json.loads(line).get("step", 0) <= step]
        partial = file.with_suffix(".tmp")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        partial.replace(file)


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written whole."""
    checkpoints = [path.parent for path in (folder / "checkpoints").glob(f"checkpoint-*/{COMPLETE}")]
    return max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def rotate_checkpoints(folder: Path, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints beyond a limit, but for the last and the best.

    transformers' own function of this name would leave `complete` in a checkpoint that it is deleting.
    """
    checkpoints = sorted((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    kept = {checkpoints[-1], Path(best)} if best else {checkpoints[-1]}
    excess = len(checkpoints) - max(limit, len(kept)) if limit else 0
    for checkpoint in [path for path in checkpoints if path not in kept][: max(excess, 0)]:
        (checkpoint / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)


def lock_run(folder: Path) -> IO[str]:
    """Takes a run for this process, until the file that is returned is closed, or the process ends.

    Raises:
        UserError: Another process has it.
    """
    stream = (folder / "resolved.yaml").open("r+", encoding="utf-8")
    try:
        import fcntl  # not on Windows

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError as error:
        stream.close()
        fix = "wait for it, or start a new one: --resume never"
        raise user_error("run-active", f"another process is in the run in {folder}", fix) from error
    return stream


def drop_half_checkpoints(folder: Path) -> None:
    """Removes checkpoints that were not written whole: nothing can be done with them, and they count as the newest."""
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        if not (checkpoint / COMPLETE).is_file():
            shutil.rmtree(checkpoint)


def find_resumable(recipe: Recipe, resume: str) -> Path | None:
    """The run folder to continue: None to start anew.

    Args:
        recipe: The recipe that is about to run.
        resume: `auto`, `never`, or the path of a run folder (or of a checkpoint in it).

    Raises:
        UserError: The folder holds no run that can be continued, or one of a different recipe.
    """
    if resume == "never":
        return None
    if resume == "auto":
        runs = Path(recipe.values["run"]["output_dir"]) / recipe.values["name"]
        folders = sorted((file.parent for file in runs.glob("*/status.json")), reverse=True)
        unfinished = (folder for folder in folders if read_status(folder) not in ("completed", "damaged"))
        folder = next((folder for folder in unfinished if last_checkpoint(folder)), None)
        if folder is None:
            return None
    else:
        path = Path(os.path.abspath(resume))
        folder = next((place for place in (path, *path.parents) if (place / "status.json").is_file()), path)
        if (status := read_status(folder)) == "damaged":
            raise user_error(
                "not-a-run", f"{resume} is no whole run folder", "name one with status.json, resolved.yaml"
            )
        if status == "completed":
            raise user_error("run-completed", f"the run in {folder} is complete", "start a new one: --resume never")
        if last_checkpoint(folder) is None:
            raise user_error("no-checkpoint", f"the run in {folder} has no complete checkpoint", "--resume never")
    if changes := recipe_changes(folder, recipe):
        message = f"the run in {folder} was made with another recipe ({'; '.join(changes[:5])})"
        raise user_error("recipe-changed", message, "start a new run (--resume never), or take the change back")
    return folder


def recipe_changes(folder: Path, recipe: Recipe) -> list[str]:
    """What a recipe says otherwise than the one that a run was made with, as `key: old -> new`."""
    return _differences(_read_resolved(folder), dict(recipe.values))


def _read_resolved(folder: Path) -> dict[str, Any]:
    return parse_document((folder / "resolved.yaml").read_text(encoding="utf-8"), "resolved.yaml").values


def find_pipeline(recipe: Recipe, resume: str) -> Path | None:
    """The run folder of a pipeline to continue: None to start anew.

    Args:
        recipe: The pipeline that is about to run.
        resume: `auto`, `never`, or the path of a pipeline's run folder.

    Raises:
        UserError: The folder holds no run of a pipeline.
    """
    if resume == "never":
        return None
    if resume == "auto":
        runs = Path(recipe.values["run"]["output_dir"]) / recipe.values["name"]
        folders = [file.parent for file in runs.glob("*/status.json") if read_status(file.parent) != "damaged"]
        return max((folder for folder in folders if _read_resolved(folder).get("stage") == "pipeline"), default=None)
    folder = Path(os.path.abspath(resume))
    if read_status(folder) == "damaged":
        raise user_error("not-a-run", f"{resume} is no whole run folder", "name one with status.json, resolved.yaml")
    said = _read_resolved(folder)
    if said.get("stage") != "pipeline":
        raise user_error(
            "not-a-run", f"{resume} is a run of {said.get('name')}, not of a pipeline", "name a pipeline's"
        )
    return folder


def read_status(folder: Path) -> str:
    """The status of a run: running, completed, failed or interrupted; `damaged` when the folder is not whole."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))["status"]
        return str(status) if (folder / "resolved.yaml").is_file() else "damaged"
    except (OSError, ValueError, KeyError, TypeError):
        return "damaged"


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [
            key
            for key in dict.fromkeys([*old, *new])
            if f"{path}{key}" not in ("run.output_dir", "metadata", "description")
        ]
        return [change for key in keys for change in _differences(old.get(key), new.get(key), f"{path}{key}.")]
    return [] if old == new else [f"{path.rstrip('.')}: {old} -> {new}"]
