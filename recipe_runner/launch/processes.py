"""The processes of a launch: do they suit the recipe, do they train together, and who started them?"""

import os
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file

from recipe_runner.launch.configuration import Launch
from recipe_runner.launch.process import is_told_cpu, is_told_deepspeed
from recipe_runner.launch.rules import check_launch
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.problems.problem import Mark, Problem, as_warning
from recipe_runner.recipe.recipe import Recipe


def check_launcher(launch: Launch | None, recipe: Recipe) -> None:
    """Checks the recipe against what `accelerate launch` has set up for this process.

    Raises:
        UserError: They contradict each other, or there are more processes than GPUs.
    """
    problems = check_launch(launch, recipe) if launch else []
    if errors := [problem for problem in problems if problem.severity == "error"]:
        raise UserError(errors)
    wanted, devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.accelerator.device_count()
    if device_kind(recipe.training["use_cpu"]) != "cpu" and 0 < devices < wanted:
        message = f"{wanted} processes were started on this machine, which has {devices} GPUs"
        raise user_error("too-many-processes", message, f"--num_processes {devices}")


def asks_for_cpu(use_cpu: bool) -> bool:
    """Whether the recipe or the launcher asks for a CPU."""
    return bool(use_cpu) or is_told_cpu()


def device_kind(use_cpu: bool) -> str:
    """The kind of device that this process trains on, by torch's name: cuda, mps, xpu, npu, ...; or cpu."""
    found = None if asks_for_cpu(use_cpu) else torch.accelerator.current_accelerator(check_available=True)
    return found.type if found else "cpu"


def join_processes(use_cpu: bool, timeout_seconds: int) -> dict[str, str]:
    """Joins the processes of a launch on machines without a GPU.

    transformers 5.23 and accelerate 1.15 do so only if ACCELERATE_USE_CPU is set, and `accelerate launch` sets it for
    one process only: several would train alone, each on all rows. They also leave `ddp_timeout` out on a CPU. With
    DeepSpeed they join, but each would be given all rows, unless the backend is named.

    Returns:
        What the trainer's configuration must say beside.

    Raises:
        UserError: The port of the first process is taken.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if not several or device_kind(use_cpu) != "cpu":
        return {}
    if is_told_deepspeed():
        return {"ddp_backend": "gloo"}
    if torch.distributed.is_initialized():
        return {}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds))
    except torch.distributed.DistError as error:
        fix = "give the launcher another one (accelerate: --main_process_port, torchrun: --master-port)"
        raise user_error("port-in-use", first_line(error), fix) from error
    return {}


def check_processes(config: Any) -> None:
    """Checks that the processes of a launch train together, and not each by itself.

    Raises:
        UserError: They don't.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and config.world_size != started:
        message = f"{started} processes were started, but they did not join: each would train by itself"
        raise user_error("one-process-only", message, "launch with one of accelerate_configs/, or with torchrun")


def derive_accumulation(size: int, device: int, processes: int) -> int:
    """Steps of accumulation that make a global batch of `size` rows from batches of `device` rows on every process.

    Raises:
        UserError: They don't divide.
    """
    if size % (device * processes):
        message = f"{size} rows can't be shared evenly by {processes} processes of {device} rows each"
        fix = "lower training.per_device_train_batch_size, or change the number of processes"
        raise user_error("global-batch-size", message, fix, path=("run", "global_batch_size"))
    return size // (device * processes)


def find_launcher() -> tuple[str, str]:
    """What started this process, and its configuration file: read from the command lines of the parents.

    Returns:
        `accelerate`, `torchrun` or an empty string; and the file, empty when none was given.
    """
    if ours := os.environ.get("RECIPE_RUN_LAUNCH"):
        return "accelerate", ours
    for parent in psutil.Process().parents():
        try:
            words = parent.cmdline()
        except psutil.Error:
            break  # not ours to look at
        file = next((_value_of(word, following) for word, following in pairwise([*words, ""]) if _names_file(word)), "")
        names = {Path(word).name for word in words}
        if file or names & {"accelerate", "accelerate.commands.launch"}:
            return "accelerate", file
        if names & {"torchrun", "torch.distributed.run"}:
            return "torchrun", ""
    return "", ""


def _names_file(word: str) -> bool:
    return word.partition("=")[0] in ("--config_file", "--config-file", "--accelerate-config")


def _value_of(word: str, following: str) -> str:
    return word.partition("=")[2] or following


def describe_launcher() -> str:
    """The launcher and its configuration, in a few words; empty without one."""
    launcher, file = find_launcher()
    if launcher == "accelerate" and not file and Path(default_config_file).is_file():
        return f"accelerate, with this machine's own configuration: {default_config_file}"
    return f"{launcher}, {file}" if file else launcher


def find_default_config() -> Problem | None:
    """A warning when accelerate's configuration of this machine decides on the run, unasked.

    Source: accelerate 1.15, commands/launch.py, _validate_launch_command.
    """
    launcher, file = find_launcher()
    if launcher != "accelerate" or file or not Path(default_config_file).is_file():
        return None
    message = "accelerate was given no configuration: this machine's own decides on processes, devices and precision"
    fix = "name one: accelerate launch --config_file FILE"
    return as_warning(Problem("default-launch-config", message, Mark(default_config_file), suggestion=fix))
