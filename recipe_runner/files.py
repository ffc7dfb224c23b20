"""Files that are written whole or not at all, hashes of files, and the status files of runs."""

import errno
import hashlib
import io
import json
import os
import shutil
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from recipe_runner.problems.errors import UserError, user_error
from recipe_runner.problems.problem import Mark

MOST_READ = 10_000_000  # bytes of a text that is read whole: configurations, templates, recipes of runs
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # of each weights file, evenly spaced: training changes nearly all of its bytes


STATUSES = ("running", "completed", "failed", "interrupted")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, or a quota


def disk_full(number: int | None, file: Path, going_on: str) -> UserError:
    """Builds the error for a file that could not be written for want of room.

    Args:
        number: The system's number, one of `FULL`.
        file: The file, or a folder that it is in.
        going_on: What to do once there is room.
    """
    folder = next(parent for parent in (file, *file.parents) if parent.is_dir())
    disk = shutil.disk_usage(folder)
    message = f"{file}: {os.strerror(number or errno.ENOSPC)}; {disk.free:,} of {disk.total:,} bytes are free there"
    return user_error("disk-full", message, f"make room; {going_on}")


def hide_home(text: str) -> str:
    """A text that may be shown to others: `~` for the person's home."""
    return text.replace(f"{Path.home()}/", "~/")


def share_path(path: str) -> str:
    """A path without the name of the person's home: from the current folder on, so that it can be opened from here."""
    home, here = Path.home(), Path.cwd()
    if not Path(path).is_relative_to(home):
        return path
    return os.path.relpath(path, here) if here.is_relative_to(home) else hide_home(path)


def write_text(file: Path, text: str, encoding: str = "utf-8") -> None:
    """Writes a file in one step: a reader sees the old text or the new one, never a part. A link stays a link."""
    target = file.resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(target.parent))
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding=encoding, newline="") as stream:
            stream.write(text)
        if target.exists():
            partial.chmod(target.stat().st_mode)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(file: Path, value: Any, shared: bool = False) -> None:
    """Writes a JSON file in one step; `shared`: one that may be shown to others."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_text(file, hide_home(text) if shared else text)


def read_begin(file: Path, size: int) -> bytes:
    """The first bytes of a file that somebody else may have made; all of it where it has fewer.

    Raises:
        OSError: It can't be read, or waits for data that may never come (/proc/kmsg, which calls itself a file).
    """
    handle, parts, left = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), [], size
    try:
        while left and (part := os.read(handle, left)):
            parts.append(part)
            left -= len(part)
    except BlockingIOError as error:
        raise OSError(errno.EINVAL, "it waits for data that may never come", str(file)) from error
    finally:
        os.close(handle)
    return b"".join(parts)


def read_text(file: Path) -> str:
    """The text of a file that somebody else may have made.

    Raises:
        OSError: It can't be read, is a device or a pipe (which would never end), or is larger than `MOST_READ`.
        ValueError: It is not UTF-8.
    """
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "a folder" if file.is_dir() else "not a regular file", str(file))
    data = read_begin(file, MOST_READ + 1)
    if len(data) > MOST_READ:
        raise OSError(errno.EINVAL, f"larger than {MOST_READ:,} bytes", str(file))
    return io.StringIO(data.decode("utf-8"), newline=None).read()  # line ends as in a text file


def read_json(file: Path) -> Any:
    """The value in a JSON file that somebody else may have made.

    Raises:
        OSError: As for `read_text`.
        ValueError: It is not JSON.
    """
    try:
        return json.loads(read_text(file))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is none that can be read."""
    try:
        value = read_json(file)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def refuse_existing(file: Path, fix: str) -> None:
    """Checks that a file is not there yet, or that a folder is not there or empty.

    Raises:
        UserError: It is.
    """
    if file.is_dir() and any(file.iterdir()):
        raise user_error("file-exists", f"{file} is there already, and not empty", fix)
    if file.exists() and not file.is_dir():
        raise user_error("file-exists", "the file is there already", fix, Mark(str(file)))


def write_new(file: Path, text: str) -> None:
    """Writes a file that is not there yet.

    Raises:
        UserError: The file is there already.
    """
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise user_error("file-exists", "the file is there already", "choose another name", Mark(str(file))) from error


def hash_file(file: Path) -> str:
    """A hash of a file's bytes."""
    import xxhash  # here: part of the training stack

    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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


def write_status(run: Path, status: str, **details: Any) -> None:
    """Writes the status of a run: running, completed, failed or interrupted."""
    now = datetime.now(timezone.utc)
    times = {"started": started_at(run) or now.isoformat(), "updated": now.isoformat(timespec="seconds")}
    value = {"status": status, **times, **details}
    try:
        write_json(run / "status.json", value)
    except OSError:  # a full disk: over the old one there is room
        with (run / "status.json").open("r+", encoding="utf-8") as stream:
            stream.write(json.dumps(value | {"error": str(value.get("error", ""))[:1000]}))
            stream.truncate()


def read_status(run: Path) -> str:
    """The status of a run: running, completed, failed or interrupted; `damaged` when the folder is not whole."""
    status = read_object(run / "status.json").get("status")
    return str(status) if status in STATUSES and (run / "resolved.yaml").is_file() else "damaged"


def started_at(run: Path) -> str:
    """When a run was started, as its status says; empty when it does not."""
    return str(read_object(run / "status.json").get("started", ""))


def list_runs(home: Path) -> list[Path]:
    """The run folders in a folder that have a status, by the time they were started, damaged ones included."""
    runs = [file.parent for file in home.glob("*/status.json")]
    return sorted(runs, key=lambda run: (started_at(run), run.name))
