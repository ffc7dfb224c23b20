"""What an exception from below means for the person whose run it ends: memory, disk, a lost process, a refusal."""

import errno
import os
import re
import traceback
from pathlib import Path
from typing import Any

import torch

from recipe_runner.files import FULL, disk_full
from recipe_runner.problems.errors import UserError, first_line, refused, user_error
from recipe_runner.runs.folder import last_checkpoint

# torch 2.13's words where it has no class of its own for memory that a CPU does not have.
NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|Cannot allocate memory|std::bad_alloc")
# What safetensors and tokenizers say of the system's errors, and torch when a file that it writes stays short.
SYSTEM = re.compile(r"\(os error (\d+)\)")
SHORT = re.compile(r"inline_container\.cc|PytorchStreamWriter")
# What torch 2.13 says when a process of the group does not answer (gloo, NCCL, DeepSpeed over them).
LOST = re.compile(r"timed? ?out|closed by peer|reset by peer|gloo|NCCL|ProcessGroup", re.IGNORECASE)
MORE_MEMORY = "lower per_device_train_batch_size (and raise gradient_accumulation_steps), or max_length"
REFUSALS = (ValueError, RuntimeError, ImportError)  # by which upstream says that values can't be, or don't go together


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the machine has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(NO_MEMORY.search(str(error)))


def is_damaged_pickle(error: BaseException) -> bool:
    """Whether torch could not read a file that it had once written (`.bin`, `.pt`), whatever it raises then."""
    frames = traceback.extract_tb(error.__traceback__)
    files = {Path(frame.filename).name for frame in frames if "torch" in Path(frame.filename).parts}
    return not isinstance(error, OSError) and bool(files & {"serialization.py", "_weights_only_unpickler.py"})


def explain(error: BaseException, folder: Path, config: Any, said: Any) -> UserError | None:
    """What ended a run, as an error that says what to do; None for one that explains itself, or is a bug of ours.

    Args:
        error: What was raised.
        folder: The run folder.
        config: The trainer's configuration.
        said: The keys of the recipe's section `training`.
    """
    if isinstance(error, UserError):
        return None
    if is_out_of_memory(error):
        return user_error("out-of-memory", first_line(error), MORE_MEMORY)
    if number := find_system_error(error):
        going_on = f"--resume {folder} continues the run" if last_checkpoint(folder) else "start the run again"
        file = getattr(error, "filename", None) or _being_written(folder)
        if number in FULL:
            return disk_full(number, Path(file), going_on)
        return user_error("input-output", f"{file}: {os.strerror(number)}", f"check the disk; {going_on}")
    if is_damaged_pickle(error) and not SHORT.search(str(error)):
        message = f"a file of the checkpoint is damaged: {type(error).__name__}: {first_line(error)}"
        return user_error("checkpoint-damaged", message, "start a new run: --resume never")
    if config.world_size > 1 and isinstance(error, RuntimeError) and LOST.search(str(error)):
        what = f"another process died, or hung for {config.ddp_timeout:,} s (training.ddp_timeout)"
        fix = "its own message says why; --resume continues the run"
        return user_error("process-lost", f"{what}: {first_line(error)}", fix)
    if isinstance(error, REFUSALS) and not _is_ours(error):
        return refused("training", said, error)
    return None


def find_system_error(error: BaseException) -> int:
    """The system's number for what went wrong with a file; 0 when it is something else."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if found := SYSTEM.search(str(error)):
        return int(found[1])
    return errno.ENOSPC if SHORT.search(str(error)) or os.strerror(errno.ENOSPC) in str(error) else 0


def _being_written(folder: Path) -> Path:
    """What was written last in a run folder: a file, or a folder into which nothing could be written."""
    written = [path for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())]
    return max(written, key=lambda path: path.stat().st_mtime_ns, default=folder)


def _is_ours(error: BaseException) -> bool:
    """Whether an exception was raised by a line of this project."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])
