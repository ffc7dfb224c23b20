"""The folder of a run: what is in it, and how its status changes. Written by one process."""

import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from recipe_runner.files import (
    hash_file,
    hide_home,
    list_runs,
    read_json,
    read_object,
    read_status,
    read_text,
    write_json,
    write_status,
)
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.recipe.document import dump_values, parse_document
from recipe_runner.recipe.local import looks_local
from recipe_runner.stages import PIPELINE

COMPLETE = "complete"  # the last file written into a checkpoint: the hash of every other one
DAMAGED = ".damaged"  # suffix of a checkpoint that is not what was written


def result_name(adapter: bool) -> str:
    """The folder of the result inside a run folder."""
    return "adapter" if adapter else "model"


def create_run_folder(home: Path, text: str, values: Mapping[str, Any]) -> Path:
    """Creates a new run folder with the recipe, as given and resolved, and status `running`.

    Args:
        home: Folder of the recipe's run folders.
        text: The recipe as given.
        values: The recipe, resolved.

    Raises:
        UserError: The folder can't be written.
    """
    run_id = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")  # in the order of time, also within a second
    folder = home / run_id
    try:
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        (folder / "resolved.yaml").write_text(dump_values(dict(values)), encoding="utf-8")
        write_status(folder, "running")
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def check_writable(folder: Path) -> None:
    """Checks that run folders can be created in a folder, without leaving anything behind.

    Raises:
        UserError: They can't.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise _unwritable(folder, NotADirectoryError(20, f"{existing} is a file"))
    try:
        with tempfile.TemporaryDirectory(prefix=".recipe-run-", dir=existing):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    fix = "choose another folder: --output-dir DIR"
    message = f"cannot write {folder}: {error.strerror}"
    return user_error("output-not-writable", message, fix, path=("run", "output_dir"))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; folders of other names beside them are somebody else's."""
    names = re.compile(r"checkpoint-\d+")
    found = [path for path in (folder / "checkpoints").glob("checkpoint-*") if names.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written whole."""
    return next((path for path in reversed(list_checkpoints(folder)) if (path / COMPLETE).is_file()), None)


def vouch_for(checkpoint: Path) -> None:
    """Marks a checkpoint as whole, by the hash of each of its files."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.name != COMPLETE)
    write_json(checkpoint / COMPLETE, {str(file.relative_to(checkpoint)): hash_file(file) for file in files})


def find_damage(checkpoint: Path) -> str:
    """What is not as it was when the checkpoint was written; empty when everything is."""
    try:
        hashes = read_json(checkpoint / COMPLETE)
        if "trainer_state.json" not in hashes:
            return f"{COMPLETE} does not name its files"
        for name, digest in hashes.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if hash_file(checkpoint / name) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"it can't be read: {error}"
    return ""


def last_intact_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The latest checkpoint that is as it was written, and what is wrong with later ones, which are put aside.

    Raises:
        UserError: There are checkpoints, and all are damaged.
    """
    damage: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        if (checkpoint / COMPLETE).is_file():
            if not (found := find_damage(checkpoint)):
                return checkpoint, damage
            damage.append(f"{checkpoint} is damaged ({found})")
    if damage:
        raise user_error("checkpoint-damaged", "; ".join(damage), "start a new run: --resume never")
    return None, []


def rotate_checkpoints(folder: Path, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints beyond a limit, but for the last and the best.

    transformers' own function of this name would leave `complete` in a checkpoint that it is deleting.
    """
    checkpoints = list_checkpoints(folder)
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


def is_active(folder: Path) -> bool:
    """Whether a process is in a run."""
    try:
        lock_run(folder).close()
    except UserError:
        return True
    except OSError:  # there is nothing that could be locked
        return False
    return False


def put_aside_after(folder: Path, checkpoint: Path | None) -> None:
    """Removes checkpoints that were not written whole, and renames damaged ones: both would count as the newest."""
    for later in list_checkpoints(folder):
        if not (later / COMPLETE).is_file():
            shutil.rmtree(later)
        elif checkpoint and step_of(later) > step_of(checkpoint):
            names = (later.with_name(f"{later.name}{DAMAGED}{number or ''}") for number in itertools.count())
            later.rename(next(name for name in names if not name.exists()))


def find_resumable(home: Path, values: Mapping[str, Any], resume: str) -> Path | None:
    """The run folder to continue: None to start anew.

    Args:
        home: Folder of the recipe's run folders.
        values: The recipe that is about to run.
        resume: `auto`, `never`, or the path of a run folder (or of a checkpoint in it).

    Raises:
        UserError: The folder holds no run that can be continued, or one of a different recipe.
    """
    if resume == "never":
        return None
    if resume == "auto":
        unfinished = (
            folder for folder in reversed(list_runs(home)) if read_status(folder) not in ("completed", "damaged")
        )
        folder = next((folder for folder in unfinished if last_checkpoint(folder)), None)
        if folder is None:
            return None
    else:
        path = Path(os.path.abspath(resume))
        folder = next((place for place in (path, *path.parents) if (place / "status.json").is_file()), path)
        if (status := read_status(folder)) == "damaged":
            raise user_error(
                "not-a-run", f"{resume} is not a complete run folder", "name one with status.json, resolved.yaml"
            )
        if status == "completed":
            fix = "start a new one (--resume never)"
            if (folder / result_name(True)).is_dir():
                fix += f", or train its adapter further: --set model.adapter={folder}"
            elif (folder / result_name(False)).is_dir():
                fix += f", or train its model further: --set model.name_or_path={folder / result_name(False)}"
            raise user_error("run-completed", f"the run in {folder} is complete", fix)
        if last_checkpoint(folder) is None:
            raise user_error("no-checkpoint", f"the run in {folder} has no complete checkpoint", "--resume never")
    if changes := recipe_changes(folder, values):
        message = f"the run in {folder} was made with another recipe ({'; '.join(changes[:5])})"
        raise user_error("recipe-changed", message, "start a new run (--resume never), or revert the change")
    return folder


def recipe_changes(folder: Path, values: Mapping[str, Any]) -> list[str]:
    """What a recipe says otherwise than the one that a run was made with, as `key: old -> new`."""
    return _differences(_read_resolved(folder), dict(values))


def find_changed(recorded: Mapping[str, Any], hashes: Mapping[str, str]) -> list[str]:
    """Names of what has another hash than a run recorded, of what it did not know, and of local files that are gone.

    Args:
        recorded: From environment.json, which may be shown to others: names of files have no home in them.
        hashes: Data file (or hub id), or what else a run is made from -> its hash as it is now.
    """
    now = {hide_home(name): digest for name, digest in hashes.items()}
    gone = [name for name in recorded if looks_local(name) and name not in now]
    return [name for name, digest in now.items() if recorded.get(name) != digest] + gone


def find_outdated(folder: Path, hashes: Mapping[str, str]) -> str:
    """Which data file, or what else, differs from that of a run; empty when nothing does, or it never began."""
    environment = read_object(folder / "environment.json")
    files, inputs = environment.get("data_files"), environment.get("inputs")
    if not isinstance(files, dict) or not isinstance(inputs, dict):
        return ""
    return next((f"changed: {name}" for name in find_changed(files | inputs, hashes)), "")


def _read_resolved(folder: Path) -> dict[str, Any]:
    file = folder / "resolved.yaml"
    try:
        return parse_document(read_text(file), str(file)).values
    except (OSError, ValueError, UserError) as error:
        raise user_error("not-a-run", f"{file} is damaged: {first_line(error)}", "--resume never") from error


def find_pipeline(home: Path, resume: str) -> Path | None:
    """The run folder of a pipeline to continue: None to start anew.

    Args:
        home: Folder of the pipeline's run folders.
        resume: `auto`, `never`, or the path of a pipeline's run folder.

    Raises:
        UserError: The folder holds no run of a pipeline.
    """
    if resume == "never":
        return None
    if resume == "auto":
        folders = [folder for folder in reversed(list_runs(home)) if read_status(folder) != "damaged"]
        return next((folder for folder in folders if _read_resolved(folder).get("stage") == PIPELINE), None)
    folder = Path(os.path.abspath(resume))
    if read_status(folder) == "damaged":
        raise user_error(
            "not-a-run", f"{resume} is not a complete run folder", "name one with status.json, resolved.yaml"
        )
    said = _read_resolved(folder)
    if said.get("stage") != PIPELINE:
        raise user_error(
            "not-a-run", f"{resume} is a run of {said.get('name')}, not of a pipeline", "name a pipeline's"
        )
    return folder


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [
            key
            for key in dict.fromkeys([*old, *new])
            if f"{path}{key}" not in ("run.output_dir", "metadata", "description")
        ]
        return [change for key in keys for change in _differences(old.get(key), new.get(key), f"{path}{key}.")]
    return [] if old == new else [f"{path.rstrip('.')}: {_write(old)} -> {_write(new)}"]


def _write(value: Any) -> str:
    """A value as a recipe writes it; `(unset)` where it has none."""
    if value is None:
        return "(unset)"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, bool | list | dict) else str(value)
