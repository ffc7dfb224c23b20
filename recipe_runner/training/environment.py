"""What the machine can do, and what a run must remember of it."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_bf16_available

from recipe_runner.launch.process import WAITING
from recipe_runner.launch.processes import asks_for_cpu, device_kind
from recipe_runner.model.precision import Precision, decide_precision
from recipe_runner.problems.errors import user_error
from recipe_runner.recipe.sections import UpstreamSection

PACKAGES = (
    "recipe-runner",
    "trl",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "torch",
    "deepspeed",
)


def choose_precision(training: UpstreamSection, dtype: str | None, adapter: bool, launcher: str) -> Precision:
    """Takes the precision the recipe asks for, and chooses by the machine what it leaves out.

    Args:
        training: For `bf16`, `fp16`, `tf32` and `use_cpu`.
        dtype: Data type of the weights that the recipe asks for.
        adapter: Whether an adapter is trained, rather than the weights themselves.
        launcher: Mixed precision that the launcher asks for (no, bf16, fp16), as it was when the process began:
            accelerate writes into the environment, too.

    Raises:
        UserError: The recipe asks for a precision that the machine does not have.
    """
    kind = device_kind(training["use_cpu"])
    gpu = kind != "cpu"
    if kind == "cuda":  # emulated bfloat16 (Turing, Volta) is slower than float32: it does not count
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # accelerate 1.15 knows the others: Apple from macOS 14, Intel by what the driver says
        has_bf16 = gpu and is_bf16_available()
    machine = describe_accelerator(kind) if gpu else "this CPU"

    available = {
        "bf16": has_bf16 or asks_for_cpu(training["use_cpu"]),
        "fp16": gpu,
        "tf32": kind == "cuda" and has_bf16,
    }
    for key in available:
        if training[key] and not available[key]:
            fix = "remove the key: the machine then decides"
            if key == "bf16" and not gpu:
                fix += "; on a CPU, training.use_cpu: true (or accelerate_configs/cpu.yaml) allows it"
            raise user_error("precision-unavailable", f"{machine} does not have {key}", fix, path=("training", key))

    asked = training.said.get("bf16") is not None or bool(training["fp16"])
    if not asked and launcher in ("bf16", "fp16"):
        mixed = {"bf16": launcher == "bf16", "fp16": launcher == "fp16"}
        dtype = dtype or ("bfloat16" if mixed["bf16"] and gpu else "float32")
        return Precision(dtype, **mixed, reason="as the launch configuration says")
    decided = decide_precision(training, dtype, adapter, has_bf16)
    reason = (
        "as the recipe says"
        if asked
        else f"{machine} {'has' if has_bf16 else 'has no'} bfloat16 units"
        if gpu
        else "a CPU"
    )
    return replace(decided, reason=reason)


def check_offloading(training: UpstreamSection) -> None:
    """Checks that there is an accelerator whose activations can be moved to the machine's memory.

    Raises:
        UserError: There is none, and the recipe asks for it.
    """
    if training["activation_offloading"] and device_kind(training["use_cpu"]) == "cpu":
        message = "activations are moved from an accelerator to memory, and this run trains on a CPU"
        raise user_error("training-refused", message, "remove the key", path=("training", "activation_offloading"))


def describe_accelerator(kind: str, index: int = 0) -> str:
    """The name of an accelerator, where torch knows one (not of Apple's)."""
    name = getattr(torch.get_device_module(kind), "get_device_name", None)
    return str(name(index)) if name else f"this machine's {kind} device"


def describe_device(config: Any) -> str:
    """The device a process trains on and how many processes there are, in a few words."""
    kind = config.distributed_state.distributed_type.value.lower()
    processes = describe_processes(config.world_size) + f" ({kind})" * (kind != "no")
    if config.device.type != "cpu":
        return f"{describe_accelerator(config.device.type)}; {processes}"
    threads = torch.get_num_threads()
    waiting = [f", {name}={os.environ[name]}" for name in WAITING if name in os.environ and threads > 1]
    return f"CPU, {threads} thread{'s' * (threads != 1)}{''.join(waiting)}; {processes}"


def describe_processes(count: int) -> str:
    """The number of processes, with its noun."""
    return f"{count} process{'es' * (count != 1)}"


def describe_environment(folder: Path) -> dict[str, Any]:
    """Versions, hardware, launcher and git commit of a folder, as JSON values."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional package
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "gpus": _list_accelerators(),
        "versions": versions,
        "launcher": {key: os.environ[key] for key in sorted(os.environ) if key.startswith("ACCELERATE_")},
        "git_commit": _git_commit(folder),
    }


def measure_memory(device: torch.device) -> dict[str, Any]:
    """The most memory that this process had: on an accelerator as torch counts it, else what the system gave it."""
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"peak_memory_bytes": peak, "reserved_bytes": reserved, "of": f"tensors on {device}, process 0"}
    try:
        import resource  # not on Windows
    except ImportError:
        return {}
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes, on macOS bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_memory_bytes": peak, "of": "the process 0, with its libraries"}


def measure_parts(trainer: Any) -> dict[str, int]:
    """Bytes of what is there all the time, by kind: weights, adapters, their gradients, the optimizer's states.

    Empty where processes share them: a part of a tensor is not its bytes.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return {}
    model = trainer.accelerator.unwrap_model(trainer.model)
    storages: dict[str, dict[int, int]] = {"weights": {}, "adapters": {}, "optimizer": {}}
    trained = "adapters" if hasattr(model, "peft_config") else "weights"
    gradients = 0
    for tensor in (*model.parameters(), *model.buffers()):
        kept = storages[trained if tensor.requires_grad else "weights"]
        parts = [tensor, *_constants(getattr(tensor, "quant_state", None))]
        kept |= {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
        gradients += tensor.numel() * tensor.element_size() * tensor.requires_grad
    for state in getattr(trainer.optimizer, "state", {}).values():
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        storages["optimizer"] |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {kind: sum(found.values()) for kind, found in storages.items()} | {"gradients": gradients}


def _constants(state: Any) -> list[torch.Tensor]:
    """Tensors of a quantization by bitsandbytes."""
    if state is None:
        return []
    inner = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [state.absmax, state.code, *inner]


def _list_accelerators() -> list[str]:
    found = torch.accelerator.current_accelerator(check_available=True)
    return (
        [describe_accelerator(found.type, index) for index in range(torch.accelerator.device_count())] if found else []
    )


def _git_commit(folder: Path) -> str | None:
    """The commit of the repository around a folder, with `-dirty` when something is changed; None outside of one.

    The repository may be a stranger's, and its configuration names programs (core.fsmonitor, filters, hooks, helpers
    of a transport). None of them is run: what could start one is set to nothing here.
    """
    safe = ["core.fsmonitor=false", f"core.hooksPath={os.devnull}", "safe.bareRepository=explicit"]
    try:
        head = _ask_git(folder, safe, "rev-parse", "--verify", "HEAD").stdout.strip()
        if not head:
            return None
        told = _ask_git(folder, safe, "config", "--name-only", "--get-regexp", r"^filter\.")
        safe += [f"{name}=" for name in told.stdout.splitlines()]
        options = ("--quiet", "--no-ext-diff", "--no-textconv", "--ignore-submodules=all")
        changed = _ask_git(folder, safe, "diff", *options, "HEAD").returncode
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git on this machine, or a repository on a disk that does not answer
    return head + "-dirty" * bool(changed)


def _ask_git(folder: Path, settings: list[str], *command: str) -> "subprocess.CompletedProcess[str]":
    said = [part for setting in settings for part in ("-c", setting)]
    environment = {**os.environ, "GIT_ALLOW_PROTOCOL": "", "GIT_NO_LAZY_FETCH": "1", "GIT_OPTIONAL_LOCKS": "0"}
    return subprocess.run(
        ["git", *said, "-C", str(folder), *command], capture_output=True, text=True, timeout=10, env=environment
    )
