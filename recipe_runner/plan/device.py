"""What is known of GPUs: `gpus.json`, each figure from the source that it names."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from recipe_runner.problems.errors import user_error
from recipe_runner.problems.words import suggest

FILE = Path(__file__).parent / "gpus.json"
GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What a run is trained on.

    Attributes:
        name: As people write it.
        gpu: Whether it is a GPU.
        memory: Bytes that PyTorch can see; 0 where they are not known.
        bf16: Whether it computes in bfloat16.
        tflops: Most operations a second in 16 bits, in 10^12, of dense matrices; 0 where that is not known.
        workspace: Bytes that cuBLAS takes.
    """

    name: str
    gpu: bool = True
    memory: int = 0
    bf16: bool = True
    tflops: float = 0
    workspace: int = 0


CPU = Device("cpu", gpu=False, bf16=False)


@cache
def read_gpus() -> dict[str, Device]:
    """All GPUs that are known, by name."""
    entries = json.loads(FILE.read_text(encoding="utf-8"))["gpus"]
    return {
        name: Device(
            name,
            memory=round(entry["memory_gib"] * GIB),
            bf16=entry["capability"] >= 8,
            tflops=entry["tflops"],
            workspace=(32 if entry["capability"] >= 9 else 8) * 2**20,
        )
        for name, entry in entries.items()
    }


def find_gpu(name: str) -> Device:
    """A GPU by its name.

    Raises:
        UserError: There is none of that name.
    """
    gpus = read_gpus()
    wanted = name.lower().replace(" ", "-")
    for known, device in gpus.items():
        if known.lower() == wanted:
            return device
    fix = suggest(wanted, list(gpus)) or f"known: {', '.join(gpus)}; or give its memory: --memory 24"
    raise user_error("unknown-gpu", f"there is no GPU '{name}' in the catalogue", fix)
