"""A plan: memory on each device, time and disk of a recipe, with how sure each figure is."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from recipe_runner.launch.configuration import Launch
from recipe_runner.plan import memory, sharding
from recipe_runner.plan.accuracy import Accuracy, Assumption, assume, find_accuracy, kind_of
from recipe_runner.plan.device import Device, read_gpus
from recipe_runner.plan.disk import Disk, measure_disk
from recipe_runner.plan.history import Learned, learn
from recipe_runner.plan.memory import Setting, Traced
from recipe_runner.plan.time import Time, measure_time
from recipe_runner.plan.trace import OVERHEAD, Peak
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.recipe.recipe import Recipe

# Bytes of a process on a GPU that PyTorch does not count: its context and the code of kernels. nvidia-smi shows 0.4 to
# 0.6 GiB for a process with one tensor on Ampere to Hopper with CUDA 12 and 13.
CONTEXT = 512 * 2**20
# Of what is allocated, that the allocator holds beyond it: the median of docs/performance.md's GPU tables; where
# weights are gathered on streams of their own, of two runs with both figures published (fsdp_qlora, Llama-2-7B).
SLACK, SHARED_SLACK = 0.07, 0.18
MOST_SLACK = 0.15  # nine of ten of them are below
LEAST_SPREAD = 0.05  # of runs of one machine that agree by chance


@dataclass(frozen=True)
class Change:
    """What could be changed in a recipe, and what comes of it.

    Attributes:
        what: Keys and values.
        saved: Bytes.
        slower: Share by which the operations of a token become more; negative where they become fewer.
        fits: Whether it then fits.
    """

    what: str
    saved: int
    slower: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        name: Of the recipe.
        device: What it is planned for.
        processes: How many devices.
        setting: Precision and batches.
        traced: The step.
        peaks: Phase -> the most memory of a device in it.
        peak: The highest of them with all that is around it.
        phase: When it comes.
        low: Bytes that it takes at least, within the stated error.
        high: Bytes that it takes at most.
        accuracy: How far other plans of its kind were off.
        fits: GPU -> whether it fits.
        largest: The largest `per_device_train_batch_size` with which a training step fits; None where the device's
            memory is not known.
        time: How long it takes.
        disk: What it leaves behind.
        assumptions: What was taken for granted.
        changes: What would make it smaller, where it does not fit.
        learned: What runs on this machine said.
    """

    name: str
    device: Device
    processes: int
    setting: Setting
    traced: Traced
    peaks: Mapping[str, Peak]
    peak: Peak
    phase: str
    low: int
    high: int
    accuracy: Accuracy
    fits: Mapping[str, bool]
    largest: int | None
    time: Time
    disk: Disk
    assumptions: Sequence[Assumption] = field(default_factory=list)
    changes: Sequence[Change] = ()
    learned: Learned | None = None

    @property
    def allocated(self) -> int:
        """Bytes of tensors, as `torch.cuda.max_memory_allocated` counts them."""
        return self.peaks[self.phase].total + self.device.workspace

    def as_json(self) -> dict[str, Any]:
        """All figures as JSON values, in bytes."""
        return {
            "recipe": self.name,
            "device": self.device.name,
            "processes": self.processes,
            "parameters": {key: self.traced.model.parameters[key] for key in ("total", "trainable")},
            "trainable_by_group": {
                key: value for key, value in self.traced.model.parameters.items() if key not in ("total", "trainable")
            },
            "peak_bytes": self.peak.total,
            "allocated_bytes": self.allocated,
            "breakdown_bytes": self.peak.kinds,
            "range_bytes": [self.low, self.high],
            "phase": self.phase,
            "phases_bytes": {phase: peak.total for phase, peak in self.peaks.items()},
            "accuracy": str(self.accuracy),
            "learned": asdict(self.learned) if self.learned else None,
            "fits": dict(self.fits),
            "largest_batch": self.largest,
            "batch": {
                "rows": self.setting.train.rows,
                "length": self.setting.train.length,
                "packed": self.setting.train.flat,
            },
            "time": self.time.as_json(),
            "disk": self.disk.as_json(),
            "changes": [asdict(change) for change in self.changes],
            "assumptions": [assumed.text for assumed in self.assumptions],
        }


def work_out(
    recipe: Recipe,
    setting: Setting,
    known: Mapping[str, Any],
    launch: Launch | None = None,
    model: memory.Model | None = None,
) -> Plan:
    """Plans a recipe in a setting that was chosen before.

    Args:
        recipe: The recipe.
        setting: Precision and batches.
        known: Split -> its accounting, where the data is prepared.
        launch: How several processes are started.
        model: Of the recipe, if it was built before.

    Raises:
        UserError: The model can't be built, or not be run without data.
    """
    device = setting.device
    try:
        traced = memory.trace(recipe, setting, model)
    except UserError:
        raise
    except Exception as error:  # of the code of any architecture, which was not written for tensors without data
        message = f"a step of {setting.config.model_type} can't be run without data: {first_line(error)}"
        fix = "nothing can be said of this model, method and stage together; train with run.longest_batch_first"
        raise user_error("not-planned", message, fix) from error
    peaks: Mapping[str, Peak] = traced.peaks
    processes = launch.processes if launch else 1
    if launch and (processes > 1 or launch.zero_stage):
        kept = sharding.Kept(
            traced.model.parameters["trainable"], traced.model.trained_bytes, setting.mixed is not None
        )
        peaks = sharding.share(peaks, launch, traced.model.layers, kept)
    phase = max(peaks, key=lambda name: peaks[name].total)
    accuracy = find_accuracy(recipe, device)
    shared = launch is not None and (launch.kind == "FSDP" or launch.zero_stage == 3)
    slack = SHARED_SLACK if shared else SLACK
    peak = surround(peaks[phase], device, slack)
    allocated = peaks[phase].total + device.workspace
    assumed = list(assume(recipe, setting, known, launch))
    spread = min(0.9, accuracy.error + sum(assumption.spread for assumption in assumed))
    low = round(allocated * (1 - spread)) + CONTEXT * device.gpu
    high = round(allocated * (1 + spread) * (1 + MOST_SLACK * device.gpu)) + CONTEXT * device.gpu
    time = measure_time(recipe, setting, traced, known, processes)
    merged = 2 * traced.model.parameters["total"] if recipe.peft else 0  # in 16 bits
    return Plan(
        recipe.name,
        device,
        processes,
        setting,
        traced,
        peaks,
        peak,
        phase,
        low,
        max(high, peak.total),
        accuracy,
        find_fits(peak, device),
        None,
        time,
        measure_disk(
            recipe, traced.model.saved_bytes, traced.model.needs.states + traced.model.needs.paged, merged, time.steps
        ),
        assumed,
    )


def learn_of(recipe: Recipe, device: Device) -> Learned | None:
    """What runs on this machine say of a plan."""
    return learn(Path(recipe.run.output_dir), kind_of(recipe), device.name, device.gpu)


def with_history(made: Plan, learned: Learned | None) -> Plan:
    """A plan as runs on this machine correct it; the range is what they spread by, where they are of its kind."""
    if learned is None:
        return made
    added = round((learned.factor - 1) * made.allocated) + learned.added
    kinds = {**made.peak.kinds, OVERHEAD: made.peak.kinds[OVERHEAD] + added}
    peak = Peak(made.peak.total + added, kinds)
    made = replace(made, fits=find_fits(peak, made.device))
    if not learned.alike:
        return replace(made, peak=peak, low=made.low + added, high=made.high + added, learned=learned)
    spread = max(LEAST_SPREAD, learned.spread)
    low, high = (round(peak.total * (1 + sign * spread)) for sign in (-1, 1))
    return replace(made, peak=peak, low=low, high=high, learned=learned)


def surround(peak: Peak, device: Device, slack: float) -> Peak:
    """A peak with what is around the tensors: the context, cuBLAS' workspace, and what the allocator holds beyond."""
    if not device.gpu:
        return peak
    more = device.workspace + CONTEXT + round(peak.total * slack)
    kinds = {**peak.kinds, OVERHEAD: peak.kinds[OVERHEAD] + more}
    return Peak(peak.total + more, kinds)


def find_fits(peak: Peak, device: Device) -> dict[str, bool]:
    """GPU -> whether it has the memory, of those that compute as the one does that was planned for."""
    if not device.gpu:
        return {}
    gpus = read_gpus() | ({device.name: device} if device.memory else {})
    return {name: peak.total <= gpu.memory for name, gpu in gpus.items() if gpu.bf16 == device.bf16}
