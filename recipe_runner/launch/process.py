"""What a process sets for itself before the ML stack is imported: variables that upstream reads then, and its voice."""

import contextlib
import gc
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

# How often a thread of GNU OpenMP looks whether the others are done before it gives its core away. By default it looks
# for some milliseconds, in which another program could compute; docs/log.md has the measurements.
SPIN_COUNT = "2000"
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # the variables that decide on it
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri/renderD128", "/dev/davinci0")  # NVIDIA, AMD, Intel, Ascend


def is_rank_zero() -> bool:
    """Whether this is the first process of a launch: the one that speaks and writes."""
    return os.environ.get("RANK", "0") == "0"


def is_told_cpu() -> bool:
    """Whether the launcher was told to train on a CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")


def is_told_deepspeed() -> bool:
    """Whether the launcher was told to train with DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def has_accelerator() -> bool:
    """Whether this machine looks as if it had an accelerator, without asking torch, which is not imported yet."""
    return sys.platform == "darwin" or any(Path(device).exists() for device in _ACCELERATORS)


def set_up_process(on_cpu: bool = False, unused: Iterable[str] = ()) -> None:
    """Sets what upstream reads when it is imported, and leaves the word to the first process of a launch.

    Args:
        on_cpu: Whether the recipe asks for a CPU.
        unused: Packages that take a second to import and are not used: upstream imports them where they are installed.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # a run reports to nobody unless report_to says so
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data loader forks
    cpu = on_cpu or is_told_cpu() or not has_accelerator()
    if cpu and not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    if cpu and importlib.util.find_spec("deepspeed"):  # it guesses, and says so in every process
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for package in unused:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # from now on it is not there
    if not is_rank_zero():
        os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (as long as the process)
    _silence_upstream()


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """For imports, and for many recipes: Python's collector would look at what stays again and again, for seconds.

    What is there afterwards stays as long as the process, and is not looked at any more.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


class _Unbroken:
    """A stream that goes on when whoever reads it (`| head`) has gone: what would be written is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def outlive_readers() -> None:
    """Lets a run go on to its end when nobody reads its output any more."""
    if not isinstance(sys.stdout, _Unbroken):
        sys.stdout, sys.stderr = _Unbroken(sys.stdout), _Unbroken(sys.stderr)


def _silence_upstream() -> None:
    """Drops what upstream says on every run and nobody can act on.

    bitsandbytes 0.50 asks for a hub kernel on CPUs, and says in every layer of every step that 8-bit layers compute in
    float16; the rest are transformers 5.23 and TRL 1.16 about their own use of old names, about features that a machine
    without a GPU lacks, DeepSpeed 0.19 about torch, and PEFT 0.21 about what its methods are meant to do: norms are not
    linear layers, SHiRA's weights are sparse, BEFT's can't be merged, BOFT computes without its own CUDA code;
    AdaLoRA's pattern of ranks is not LoRA's; TRL's reference is called "ref", and is never loaded; prompts take no
    position ids.
    """
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        r".gradient_checkpointing(_disable|_enable)?. is deprecated",
        r".is_gradient_checkpointing. is deprecated",
        r"'pin_memory' argument is set as true but no accelerator is found",
        r"Paged optimizers are not supported on CPU",
        r"Unsupported layer type",
        r"Sparse invariant checks are implicitly disabled",
        r"Detected that the base layer has no bias term",
        r"Failed to load the CUDA extension: ",
        r"The following rank_pattern keys did not match any targeted module and were ignored: \['[\w.]+lora_E'",
        r"Adapter name 'ref' should not be contained in the prefix 'prefix_tuning_'",
        r"lora with eva initialization used with low_cpu_mem_usage=False",
        r"Full backward hook is firing when gradients are computed with respect to module outputs",
        r"Setting boft_n_butterfly_factor to 1",
        r"Position ids are not supported for parameter efficient tuning",
        r".torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor|_\w+). is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
