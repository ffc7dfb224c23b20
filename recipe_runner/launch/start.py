"""`recipe-run RECIPE --accelerate-config F`: starts the processes by accelerate's own launcher, in this process."""

import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import NoReturn

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from recipe_runner.launch.configuration import Launch
from recipe_runner.problems.errors import first_line, user_error


def launch_run(launch: Launch, options: Sequence[str], command: Sequence[str]) -> int:
    """Starts `command` in every process of a launch, waits, and returns the exit status of the first that failed.

    Args:
        launch: The launch configuration.
        options: Further options of `accelerate launch`, which go before the file's.
        command: Arguments of `recipe-run`.

    Raises:
        UserError: There are more processes than devices, or their port is taken.
    """
    arguments = ["--config_file", launch.name, *options, "--module", "recipe_runner", *command]
    parsed = launch_command_parser().parse_args(arguments)
    _check_devices(launch)
    if launch.machines > 1 and not launch.values.get("main_process_ip"):
        raise user_error("launch-file", "several machines need the address of the first", "--main-process-ip ADDRESS")
    os.environ["RECIPE_RUN_LAUNCH"] = launch.name  # the plan names it
    # Who failed has said why; the launcher's own traceback and table say nothing more.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    sys.argv[0] = sys.executable
    # A signal reaches the processes through here; torch kills them 30 seconds later, in the middle of a long step.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "100")
    on_cpu = launch.values.get("use_cpu")
    processes = launch.processes
    threads = max(1, (os.cpu_count() or 1) // processes) if on_cpu else 1  # as torchrun does, but it warns
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        if launch.kind == "NO":
            _become(parsed)
        launch_command(parsed)
    except ChildFailedError as error:
        rank, first = next(iter(error.failures.items()))
        if first.exitcode >= 0:
            return first.exitcode  # it has said why
        name = signal.Signals(-first.exitcode).name
        fix = "look for the reason in the machine's log (memory?); --resume auto continues the run"
        print(f"error[process-lost] rank {rank} was ended by {name}, and so were the others; {fix}", file=sys.stderr)
        return 128 - first.exitcode
    except SignalException as error:
        return 128 + signal.Signals(error.sigval)
    except SystemExit as error:
        return int(error.code or 0)
    except torch.distributed.DistError as error:
        fix = "start the command on every machine, with the address and port of the first"
        raise user_error("process-lost", f"the machines did not find each other: {first_line(error)}", fix) from error
    except ConnectionError as error:
        raise user_error("port-in-use", str(error).split(". ")[0], "give another one: --main-process-port") from error
    except ValueError as error:
        raise user_error("launch-file", str(error).splitlines()[0], "", path=()) from error
    return 0


def _become(parsed: Namespace) -> NoReturn:
    """Turns this process into the one that accelerate would start: signals and exit status need no go-between."""
    command, environment = prepare_simple_launcher_cmd_env(_validate_launch_command(parsed)[0])
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)


def _check_devices(launch: Launch) -> None:
    """Each process needs a device of its own: two on one GPU are slower than one, or do not start at all."""
    if launch.values.get("use_cpu") or launch.kind == "NO":
        return
    wanted = launch.processes // launch.machines
    devices = torch.accelerator.device_count()
    if wanted > devices:
        message = f"{launch.name} starts {wanted} processes on this machine, which has {devices} GPUs"
        fix = f"--num-processes {devices}" if devices > 1 else "take single_gpu" if devices else "take cpu or cpu_2proc"
        raise user_error("too-many-processes", message, fix)
