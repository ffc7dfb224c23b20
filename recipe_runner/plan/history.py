"""What plans have been worth on this machine: runs keep what was planned for them, and what they took."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe_runner.files import list_runs, read_object, read_status
from recipe_runner.problems.errors import user_error
from recipe_runner.problems.words import align

LAST = 20  # runs that are looked at
GIB = 2**30
UNLIKELY, PROCESS = 3, 8 * GIB  # times what was planned, and bytes beside it on a CPU, that no run is off by


@dataclass(frozen=True)
class Past:
    """A run with its plan.

    Attributes:
        folder: Of the run.
        kind: Of plan: method and stage.
        device: What it was trained on.
        planned: Bytes of tensors that were planned.
        measured: Bytes that were measured: of tensors on a GPU, of the whole process on a CPU.
        step_seconds: Of a step, measured; 0 where they are not known.
    """

    folder: Path
    kind: str
    device: str
    planned: int
    measured: int
    step_seconds: float


@dataclass(frozen=True)
class Learned:
    """What runs of this machine say of a plan.

    Attributes:
        runs: How many.
        factor: What the planned tensors are multiplied by, on a GPU.
        added: Bytes beside the tensors: what the process itself takes, on a CPU.
        spread: The largest share by which one of the runs is off after that.
        alike: Whether they are of the same kind of plan.
    """

    runs: int
    factor: float
    added: int
    spread: float
    alike: bool

    def __str__(self) -> str:
        runs = f"{self.runs} run{'s' * (self.runs != 1)} here" + ("" if self.alike else ", of other kinds")
        if self.added:
            return f"{runs}: the process took {self.added / GIB:.2f} GiB beside the tensors"
        off = 1 / self.factor - 1
        return f"{runs}: planned {abs(off):.0%} {'low' if off < 0 else 'high'}"


def read_runs(output_dir: Path) -> Iterator[Past]:
    """Completed runs that kept their plan, the newest first."""
    if not output_dir.is_dir():
        return
    homes = [folder for folder in output_dir.iterdir() if folder.is_dir()]
    runs = sorted((run for home in homes for run in list_runs(home)), key=lambda run: run.name, reverse=True)
    for run in runs[:LAST]:
        status = read_object(run / "status.json")
        planned, measured = status.get("planned"), status.get("measured")
        if read_status(run) != "completed" or not isinstance(planned, dict) or not isinstance(measured, dict):
            continue
        expected, found = planned.get("allocated_bytes"), measured.get("peak_memory_bytes")
        if isinstance(expected, int) and isinstance(found, int) and min(expected, found) > 0:
            if not expected / UNLIKELY < found < expected * UNLIKELY + PROCESS:
                continue  # of a record that was changed, or is of something else
            names, seconds = (str(planned.get("kind")), str(planned.get("device"))), measured.get("step_seconds")
            yield Past(run, *names, expected, found, float(seconds) if isinstance(seconds, int | float) else 0.0)


def learn(output_dir: Path, kind: str, device: str, gpu: bool) -> Learned | None:
    """What earlier runs on a device say of plans of a kind; of other kinds, where there are none of it.

    Args:
        output_dir: Where runs are.
        kind: Of the plan.
        device: Its name.
        gpu: Whether it is one: on a CPU the whole process is measured.
    """
    found = [run for run in read_runs(output_dir) if run.device == device]
    alike = [run for run in found if run.kind == kind]
    runs = alike or found
    if not runs:
        return None
    if gpu:
        factor, added = statistics.median(run.measured / run.planned for run in runs), 0
    else:
        factor, added = 1.0, round(statistics.median(run.measured - run.planned for run in runs))
    spread = max(abs((run.planned * factor + added) / run.measured - 1) for run in runs)
    return Learned(len(runs), factor, added, spread, bool(alike))


def explain_run(run: Path) -> str:
    """Part by part, what a run was planned to take, and what it took.

    Raises:
        UserError: It keeps no plan.
    """
    status = read_object(run / "status.json")
    planned: Any = status.get("planned")
    measured: Any = status.get("measured")
    if not _is_whole(planned, measured):
        why = planned.get("failed") if isinstance(planned, dict) else None
        message = f"{run} keeps no plan" + (f": {why}" if why else "")
        raise user_error("no-plan", message, "name a completed run of this version")
    expected: dict[str, int] = planned["breakdown_bytes"]
    parts = {**(measured.get("parts") or {})}
    if not expected.get("gradients"):  # where the peak is planned there are none
        parts.pop("gradients", None)
    rows = [["", "planned", "measured", "difference"]]
    for kind in parts:
        rows.append([kind, *_compare(expected.get(kind, 0), parts[kind])])
    rest = sum(size for kind, size in expected.items() if kind not in parts)
    before = measured.get("before_bytes", 0)
    left = measured["peak_memory_bytes"] - sum(parts.values()) - before
    if before:
        rows.append(["Python, libraries and data", "-", f"{before / GIB:.3f} GiB", ""])
    rows.append(["activations and the rest", *_compare(rest, left)])
    rows.append(["peak", *_compare(planned["allocated_bytes"], measured["peak_memory_bytes"])])
    lines = [f"{run}: {planned['kind']} on {planned['device']}; measured: {measured.get('of', '')}", *align(rows)]
    if reserved := measured.get("reserved_bytes"):
        held = reserved / measured["peak_memory_bytes"] - 1
        lines.append(f"reserved {reserved / GIB:.2f} GiB: the allocator held {held:.0%} beyond what was in use")
    low, high = planned.get("step_seconds") or (None, None)
    seconds, speed = measured.get("step_seconds"), measured.get("tokens_per_second") or 0
    if isinstance(seconds, int | float) and isinstance(speed, int | float):
        told = f"; planned {low:.2g} to {high:.2g} s" if low and high else ""
        lines.append(f"{seconds:.3g} s a step{told}; {speed:,.0f} tokens a second")
    return "\n".join(lines)


def _is_whole(planned: Any, measured: Any) -> bool:
    """Whether a record has what is compared, in numbers."""
    if not isinstance(planned, dict) or not isinstance(measured, dict):
        return False
    parts = [planned.get("breakdown_bytes"), measured.get("parts") or {}]
    if not all(isinstance(part, dict) and all(isinstance(of, int) for of in part.values()) for part in parts):
        return False
    times = planned.get("step_seconds") or (1.0, 1.0)
    if not isinstance(times, list | tuple) or [type(of) for of in times] not in ([float] * 2, [type(None)] * 2):
        return False
    sizes = (planned.get("allocated_bytes"), measured.get("peak_memory_bytes"), measured.get("before_bytes", 1))
    return all(isinstance(size, int) and size > 0 for size in sizes) and {"kind", "device"} <= planned.keys()


def _compare(planned: int, measured: int) -> list[str]:
    share = f" ({measured / planned - 1:+.0%})" if planned else ""
    return [f"{planned / GIB:.3f} GiB", f"{measured / GIB:.3f} GiB", f"{(measured - planned) / GIB:+.3f} GiB{share}"]
