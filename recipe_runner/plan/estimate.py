"""A plan: memory on each device, time and disk of a recipe, with how sure each figure is."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from recipe_runner.files import read_json
from recipe_runner.launch.configuration import Launch
from recipe_runner.plan import memory, sharding
from recipe_runner.plan.build import checkpoints
from recipe_runner.plan.device import Device, read_gpus
from recipe_runner.plan.disk import Disk, measure_disk
from recipe_runner.plan.history import Learned, learn
from recipe_runner.plan.memory import Setting, Traced, optimizer_of
from recipe_runner.plan.optimizer import find_kind
from recipe_runner.plan.setting import UNKNOWN_PROMPT, choose_setting, find_config, find_prepared
from recipe_runner.plan.step import EVALUATION
from recipe_runner.plan.time import Time, measure_time
from recipe_runner.plan.trace import ACTIVATIONS, LOGITS, OVERHEAD, Peak
from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.recipe.recipe import Recipe

# Bytes of a process on a GPU that PyTorch does not count: its context and the code of kernels. nvidia-smi shows 0.4 to
# 0.6 GiB for a process with one tensor on Ampere to Hopper with CUDA 12 and 13.
CONTEXT = 512 * 2**20
# Of what is allocated, that the allocator holds beyond it: the median of docs/performance.md's GPU tables; where
# weights are gathered on streams of their own, of two runs with both figures published (fsdp_qlora, Llama-2-7B).
SLACK, SHARED_SLACK = 0.07, 0.18
MOST_SLACK = 0.15  # nine of ten of them are below
LEAST_SPREAD = 0.05  # of runs of one machine that agree by chance
USUAL_ERROR = 0.15  # where nothing like it was measured
LEAST = 256  # tokens: shorter rows are no help
UNSURE = 0.15  # by which the range becomes wider where something was taken for something else
FEW = 3  # cases: fewer say nothing of an error
MOST_TRIES = 10  # batches that are tried for the largest one
MOST_TOKENS = 2_000_000  # of a batch: more is not looked for
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
ACCURACY = Path(__file__).parent / "accuracy.json"


@dataclass(frozen=True)
class Accuracy:
    """How far plans of a kind were from what was published.

    Attributes:
        kind: In words.
        cases: How many were compared.
        within: How many of them are within `error`.
        error: A share.
    """

    kind: str
    cases: int
    within: int
    error: float

    def __str__(self) -> str:
        if not self.cases:
            return f"fewer than {FEW} published cases are like this one: taken as within {self.error:.0%}"
        found = f"within {self.error:.0%} in {self.within} of {self.cases} published cases"
        return f"for plans of this kind ({self.kind}): {found}"


@dataclass(frozen=True)
class Assumption:
    """What was taken for granted.

    Attributes:
        text: In a sentence.
        spread: Share by which the range becomes wider for it.
    """

    text: str
    spread: float = 0.0


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
            "parameters": {key: self.traced.parameters[key] for key in ("total", "trainable")},
            "trainable_by_group": {
                key: value for key, value in self.traced.parameters.items() if key not in ("total", "trainable")
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


def plan(recipe: Recipe, device: Device, launch: Launch | None = None, model_config: Path | None = None) -> Plan:
    """Plans a recipe for a device.

    Args:
        recipe: One of a stage.
        device: What it is trained on.
        launch: How several processes are started.
        model_config: A `config.json` of the base, where nothing is known of it.

    Raises:
        UserError: Nothing is known of the model, or it can't be built.
    """
    config = find_config(recipe.model, model_config, recipe.stage.scores)
    known = find_prepared(recipe)
    check_device(recipe, device, launch)
    setting = choose_setting(recipe, config, device, known)
    made = with_history(work_out(recipe, setting, known, launch), learn_of(recipe, device))
    if model_config:
        told = Assumption(f"the model is what {model_config} says, and not looked for by its name")
        made = replace(made, assumptions=[told, *made.assumptions])
    if not device.memory:
        return made
    made = replace(made, largest=find_largest(recipe, made, known, launch))
    if made.peak.total > device.memory:
        return replace(made, changes=find_changes(recipe, made, known, launch))
    return made


def check_device(recipe: Recipe, device: Device, launch: Launch | None) -> None:
    """Checks that recipe and launch configuration suit the device.

    Raises:
        UserError: One of them is for another kind of device.
    """
    on_cpu = bool(launch and launch.values.get("use_cpu"))
    if launch and on_cpu == device.gpu and (on_cpu or launch.kind != "NO"):
        kind, other = ("a GPU", "processes on a CPU") if device.gpu else ("a CPU", "GPUs")
        message = f"{launch.name} is for {other}, and it is planned for {kind} ({device.name})"
        raise user_error("launch-file", message, "name another device (--gpu), or another launch configuration")
    if recipe.training["bf16"] and device.gpu and not device.bf16:
        message = f"{device.name} has no bfloat16"
        fix = "set training.fp16: true, and float16 where weights are quantized; or plan for another GPU"
        raise user_error("precision-conflict", message, fix, path=("training", "bf16"))


def work_out(recipe: Recipe, setting: Setting, known: Mapping[str, Any], launch: Launch | None = None) -> Plan:
    """Plans a recipe in a setting that was chosen before."""
    device = setting.device
    try:
        traced = memory.trace(recipe, setting)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError, IndexError) as error:
        message = f"a step of {setting.config.model_type} can't be run without data: {first_line(error)}"
        fix = "nothing can be said of this model, method and stage together; train with run.longest_batch_first"
        raise user_error("not-planned", message, fix) from error
    peaks: Mapping[str, Peak] = traced.peaks
    processes = launch.processes if launch else 1
    if launch and (processes > 1 or launch.zero_stage):
        kept = sharding.Kept(traced.parameters["trainable"], traced.trained_bytes, setting.mixed is not None)
        peaks = sharding.share(peaks, launch, traced.layers, kept)
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
    merged = 2 * traced.parameters["total"] if recipe.peft else 0  # in 16 bits
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
        measure_disk(recipe, traced.saved_bytes, traced.state_bytes + traced.paged, merged, time.steps),
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


def find_largest(recipe: Recipe, made: Plan, known: Mapping[str, Any], launch: Launch | None) -> int:
    """The largest `per_device_train_batch_size` with which a training step fits.

    A step is traced for each that is tried. What it takes grows with the rows, some of it with their square (a packed
    mask), and some not at all: each try is where a line through what is known crosses the device's memory.
    """
    room, setting, batch = made.device.memory, made.setting, made.setting.train
    each = recipe.stage.sequences
    tried: dict[int, int] = {}

    def take(number: int) -> None:
        train = replace(batch, rows=number * each, padded=not batch.flat and number * each > 1)
        other = work_out(recipe, replace(setting, train=train, held_out=None), known, launch)
        tried[number] = with_history(other, made.learned).peak.total

    number = batch.rows // each
    if made.phase == EVALUATION:
        take(number)
    else:
        tried[number] = made.peak.total
    growing = made.peak.kinds[ACTIVATIONS] + made.peak.kinds[LOGITS]
    slope = max(1.0, growing * (1 + SLACK) / number)
    for count in range(MOST_TRIES):
        fits = max((n for n, size in tried.items() if size <= room), default=0)
        above = min((n for n, size in tried.items() if size > room), default=None)
        if above == fits + 1 or fits * batch.length * each > MOST_TOKENS:
            return fits
        ends = [n for n in (fits, above) if n]
        if above is None and len(tried) > 1:
            ends = sorted(tried)[-2:]
        if len(ends) > 1:
            slope = max(1.0, (tried[ends[1]] - tried[ends[0]]) / (ends[1] - ends[0]))
        number = math.floor(ends[-1] + (room - tried[ends[-1]]) / slope)
        if above is None:
            number = max(fits + 1, min(number, 4 * fits))
        else:
            number = (fits + above) // 2 if count % 3 == 2 else max(fits + 1, min(number, above - 1))
        take(number)
    return max((n for n, size in tried.items() if size <= room), default=0)


def find_accuracy(recipe: Recipe, device: Device) -> Accuracy:
    """How far plans like this one were off, as `scripts/make_plan_accuracy.py` found."""
    kind = kind_of(recipe)
    found = read_json(ACCURACY).get(kind) if ACCURACY.is_file() and device.gpu else None
    if not found or found["cases"] < FEW:
        return Accuracy(kind, 0, 0, USUAL_ERROR)
    return Accuracy(kind, int(found["cases"]), int(found["within"]), float(found["error"]))


def kind_of(recipe: Recipe) -> str:
    """What decides how well a plan can be held against others: the stage's rows, the method, the quantization."""
    method = str(recipe.peft["method"]) if recipe.peft else "full"
    if method == "lora":
        method = "QLoRA" if recipe.quantization["load_in_4bit"] else "LoRA"
    if recipe.quantization["load_in_8bit"]:
        method += " on 8 bits"
    return method if recipe.stage.shape.endswith("tokens") else f"{method}, {recipe.stage.name}"


def assume(recipe: Recipe, setting: Setting, known: Mapping[str, Any], launch: Launch | None) -> Iterator[Assumption]:
    """What was taken for granted; where the planner can't know, the range becomes wider."""
    batch = setting.train
    if not known.get("train"):
        if recipe.stage.generates:
            yield Assumption(f"prompts have up to {UNKNOWN_PROMPT} tokens: `recipe-run prepare` finds the longest")
        elif not batch.flat:
            yield Assumption(
                f"rows have up to {batch.length:,} tokens (max_length): `recipe-run prepare` finds the longest"
            )
    if not find_kind(optimizer_of(recipe)).known:
        name = optimizer_of(recipe)
        yield Assumption(f"the optimizer {name} is taken for AdamW: its own states were not looked at", UNSURE)
    if recipe.model.use_kernels:
        yield Assumption("kernels of the hub are taken for PyTorch's own: what they keep is not known", UNSURE)
    attention = recipe.model.attn_implementation
    if attention not in (None, "sdpa", "eager"):
        yield Assumption(
            f"{attention} is taken for a fused kernel that keeps its inputs, its output and a number a query"
        )
    if launch and launch.processes > 1:
        yield Assumption(
            "what several devices share is worked out, not traced, and was held against no measurement", 0.1
        )
    if recipe.training["torch_compile"]:
        yield Assumption("torch.compile fuses operations: what it keeps is not known", UNSURE)
    if recipe.training["activation_offloading"]:
        yield Assumption("the few activations that TRL holds back while others leave are not counted", 0.1)
    if recipe.dataset.images:
        yield Assumption("tokens of images are counted, what the vision tower computes is not", UNSURE)
    if recipe.model.trust_remote_code:
        yield Assumption("the model's own code is not run: it is taken for transformers' model of that name", UNSURE)
    published = getattr(setting.config, "quantization_config", None)
    if published and not recipe.quantization:
        yield Assumption("weights that were published quantized are counted in 16 bits: they take less", UNSURE)
    if launch and launch.is_deepspeed and "8bit" in optimizer_of(recipe):
        yield Assumption("DeepSpeed keeps weights that are trained in float32, beside the optimizer's own states")
    if any(reward.model for reward in recipe.rewards):
        yield Assumption("reward models are taken to be of the size of the model itself")
    if not setting.device.gpu:
        yield Assumption("beside the tensors a process takes what Python and PyTorch need: some 0.6 GiB")
    if setting.device.gpu and setting.device.memory and not setting.device.tflops:
        yield Assumption("the speed of the device is not known, so that there is no time")


def find_changes(recipe: Recipe, made: Plan, known: Mapping[str, Any], launch: Launch | None) -> list[Change]:
    """What would make a plan smaller, each worked out, by effect."""
    found: list[tuple[Change, Any]] = []
    for what, sections in _propose(recipe, made.setting):
        changed = _change(recipe, sections)
        setting = choose_setting(changed, made.setting.config, made.device, known)
        other = with_history(work_out(changed, setting, known, launch), made.learned)
        slower = other.traced.flops / setting.train.tokens / (made.traced.flops / made.setting.train.tokens) - 1
        fits = other.peak.total <= made.device.memory
        found.append((Change(what, made.peak.total - other.peak.total, slower, fits), sections))
    found = sorted((of for of in found if of[0].saved > 0), key=lambda of: -of[0].saved)
    changes = [change for change, _ in found]
    if len(found) > 1 and not any(change.fits for change in changes):
        changes += _combine(recipe, made, known, launch, found)
    return changes


def _change(recipe: Recipe, sections: Mapping[str, Any]) -> Recipe:
    """A recipe with other keys."""
    values = {**recipe.values}
    for section, keys in sections.items():
        values[section] = {**(values.get(section) or {}), **keys}
    return replace(recipe, values=values)


def _combine(
    recipe: Recipe, made: Plan, known: Mapping[str, Any], launch: Launch | None, found: Sequence[tuple[Change, Any]]
) -> list[Change]:
    """The changes one after the other, by effect, until it fits; none where it never does."""
    changed, told = recipe, []
    for change, sections in found:
        if any(section in ("peft", "quantization") and changed.values.get(section) for section in sections):
            continue  # it has another one by now
        changed = _change(changed, sections)
        told.append(change.what)
        setting = choose_setting(changed, made.setting.config, made.device, known)
        other = with_history(work_out(changed, setting, known, launch), made.learned)
        if len(told) > 1 and other.peak.total <= made.device.memory:
            slower = other.traced.flops / setting.train.tokens / (made.traced.flops / made.setting.train.tokens) - 1
            return [Change("together: " + "; ".join(told), made.peak.total - other.peak.total, slower, True)]
    return []


def _propose(recipe: Recipe, setting: Setting) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes that usually save memory, where the recipe does not have them yet: in words, and by section."""
    training = recipe.training
    rows, accumulated = training["per_device_train_batch_size"], training["gradient_accumulation_steps"] or 1
    if not checkpoints(training):
        yield "training.activation_checkpointing: true", {"training": {"activation_checkpointing": True}}
    if setting.device.gpu and not training["activation_offloading"] and not recipe.stage.generates:
        yield "training.activation_offloading: true", {"training": {"activation_offloading": True}}
    if rows > 1 and not recipe.stage.generates:
        keys = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows * accumulated}
        yield f"per_device_train_batch_size: 1, gradient_accumulation_steps: {rows * accumulated}", {"training": keys}
    if setting.held_out and setting.held_out.tokens > setting.train.tokens:
        yield "training.per_device_eval_batch_size: 1", {"training": {"per_device_eval_batch_size": 1}}
    if "8bit" not in optimizer_of(recipe):
        yield "training.optim: paged_adamw_8bit", {"training": {"optim": "paged_adamw_8bit"}}
    lora = {"method": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    if not recipe.peft and not recipe.unfreeze:
        yield "LoRA (peft: method: lora, r: 16) instead of all weights", {"peft": lora}
    if not recipe.quantization and setting.device.gpu and (not recipe.peft or recipe.peft["method"] == "lora"):
        yield (
            "QLoRA: a base in 4 bits (quantization: NF4, twice)",
            {"quantization": NF4} | ({} if recipe.peft else {"peft": lora}),
        )
    if recipe.stage.generates:
        answer = int(training["max_completion_length"] or 256) // 2
        yield f"training.max_completion_length: {answer}", {"training": {"max_completion_length": answer}}
        if rows > 1 and rows % 2 == 0 and not training["steps_per_generation"]:
            keys = {"per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": 2 * accumulated}
            keys["steps_per_generation"] = 2 * accumulated
            yield f"training.per_device_train_batch_size: {rows // 2}, accumulated twice as often", {"training": keys}
    if setting.train.length > LEAST and not recipe.stage.generates:
        half = setting.train.length // 2
        yield f"training.max_length: {half}", {"training": {"max_length": half}}
