"""What is known of GPUs: `gpus.json`, each figure from the source that it names."""

import difflib
import json
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from recipe_runner.problems.errors import user_error

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
ANY_GPU = Device("any GPU with bfloat16", workspace=32 * 2**20)


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
    """A GPU by its name, or by a part of it that no other has.

    Raises:
        UserError: There is none of that name.
    """
    gpus = read_gpus()
    wanted = re.sub(r"\b(nvidia|geforce|tesla)\b[- ]*", "", name.lower()).strip().replace(" ", "-")
    meant = [known for known in gpus if known.lower() == wanted]
    if not meant and (len(wanted) > 3 or (len(wanted) > 1 and not wanted.isdecimal())):
        meant = [known for known in gpus if f"-{wanted}-" in f"-{known.lower()}-"]
    if len(meant) == 1:
        return gpus[meant[0]]
    if meant and wanted:
        raise user_error("unknown-gpu", f"'{name}' stands for several GPUs", f"name one: {', '.join(meant)}")
    alike = difflib.get_close_matches(wanted, [known.lower() for known in gpus], 5, 0.4)
    alike.sort(key=lambda known: -max(n for n in range(len(wanted) + 1) if known.startswith(wanted[:n])))
    near = next((known for known in gpus if alike and known.lower() == alike[0]), "")
    fix = f"did you mean '{near}'?" if near else f"known: {', '.join(gpus)}; or give its memory: --memory 24"
    raise user_error("unknown-gpu", f"there is no GPU '{name}' in the catalogue", fix)


def choose_device(name: str | None, memory: float | None) -> Device:
    """What is planned for: by name, by its memory in GiB, or the GPU of this machine, where it has one.

    Raises:
        UserError: There is no GPU of that name.
    """
    if name is not None and name.lower() == CPU.name:
        return CPU
    if name is not None:
        return find_gpu(name)
    if memory is not None:
        return replace(ANY_GPU, name=f"a GPU with {memory:g} GiB", memory=round(memory * GIB))
    if not torch.cuda.is_available():
        return ANY_GPU
    properties = torch.cuda.get_device_properties(0)
    known = next((gpu for key, gpu in read_gpus().items() if _is_named(key, properties.name)), ANY_GPU)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return replace(known, name=properties.name, memory=properties.total_memory, bf16=bf16)


def _is_named(key: str, name: str) -> bool:
    """Whether a GPU of the catalogue is the one that a driver names."""
    return all(part.lower() in name.lower() for part in key.replace("GB", "").split("-"))
