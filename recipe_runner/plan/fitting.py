"""What would fit: the largest batch, and what to change in a recipe; each is worked out as the plan itself is."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from recipe_runner.launch.configuration import Launch
from recipe_runner.plan.build import checkpoints
from recipe_runner.plan.estimate import SLACK, Change, Plan, with_history, work_out
from recipe_runner.plan.memory import Setting, optimizer_of
from recipe_runner.plan.setting import choose_setting
from recipe_runner.plan.step import EVALUATION
from recipe_runner.plan.trace import ACTIVATIONS, LOGITS
from recipe_runner.recipe.recipe import Recipe

LEAST = 256  # tokens: shorter rows are no help
MOST_TRIES = 10  # batches that are tried for the largest one
MOST_TOKENS = 2_000_000  # of a batch: more is not looked for
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}


def find_largest(recipe: Recipe, made: Plan, known: Mapping[str, Any], launch: Launch | None) -> int:
    """The largest `per_device_train_batch_size` with which a step fits, and that a stage with rewards takes."""
    most, training = _search_largest(recipe, made, known, launch), recipe.training
    if not recipe.stage.rewarded or training["generation_batch_size"] or recipe.run.global_batch_size:
        return most
    times = int(training["steps_per_generation"] or training["gradient_accumulation_steps"] or 1)
    times *= launch.processes if launch else 1
    return next((number for number in range(most, 0, -1) if _answers_in_groups(recipe, number * times)), 0)


def _search_largest(recipe: Recipe, made: Plan, known: Mapping[str, Any], launch: Launch | None) -> int:
    """The largest batch with which a step fits.

    A step is traced for each that is tried. What it takes grows with the rows, some of it with their square (a packed
    mask), and some not at all: each try is where a line through what is known crosses the device's memory.
    """
    room, setting, batch = made.device.memory, made.setting, made.setting.train
    each = recipe.stage.sequences
    tried: dict[int, int] = {}

    def take(number: int) -> None:
        train = replace(batch, rows=number * each, padded=not batch.flat and number * each > 1)
        other = work_out(recipe, replace(setting, train=train, held_out=None), known, launch, made.traced.model)
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


def _answers_in_groups(recipe: Recipe, answers: int) -> bool:
    """Whether so many answers are whole groups of those to one prompt."""
    return not recipe.stage.rewarded or answers % int(recipe.training["num_generations"] or 1) == 0


def find_changes(recipe: Recipe, made: Plan, known: Mapping[str, Any], launch: Launch | None) -> list[Change]:
    """What would make a plan smaller, each worked out, by effect."""
    models = {_name_model(recipe, made.setting): made.traced.model}

    def try_out(what: str, changed: Recipe) -> Change:
        setting = choose_setting(changed, made.setting.config, made.device, known)
        name = _name_model(changed, setting)
        model = models.get(name)
        if model:
            model = model.with_optimizer(changed, made.device)
        other = with_history(work_out(changed, setting, known, launch, model), made.learned)
        models.setdefault(name, other.traced.model)
        slower = other.traced.flops / setting.train.tokens / (made.traced.flops / made.setting.train.tokens) - 1
        return Change(what, made.peak.total - other.peak.total, slower, other.peak.total <= made.device.memory)

    found = [(try_out(what, _change(recipe, sections)), sections) for what, sections in _propose(recipe, made.setting)]
    found = sorted((of for of in found if of[0].saved > 0), key=lambda of: -of[0].saved)
    changes = [change for change, _ in found]
    if any(change.fits for change in changes):
        return changes
    changed, told = recipe, []
    for change, sections in found:  # one after the other, until it fits
        if any(section in ("peft", "quantization") and changed.values.get(section) for section in sections):
            continue  # it has another one by now
        changed = _change(changed, sections)
        told.append(change.what)
        together = try_out("together: " + "; ".join(told), changed)
        if len(told) > 1 and together.fits:
            return [*changes, together]
    return changes


def _name_model(recipe: Recipe, setting: Setting) -> str:
    """What a model is built from, as a text: of equal ones the model is the same."""
    sections = [recipe.values.get(section) for section in ("peft", "quantization", "unfreeze")]
    return repr((sections, checkpoints(recipe.training), setting.dtype, setting.mixed))


def _change(recipe: Recipe, sections: Mapping[str, Any]) -> Recipe:
    """A recipe with other keys."""
    values = {**recipe.values}
    for section, keys in sections.items():
        values[section] = {**(values.get(section) or {}), **keys}
    return replace(recipe, values=values)


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
            whole = _answers_in_groups(recipe, rows // 2 * accumulated)  # then as many are written at a time
            keys["steps_per_generation"] = accumulated if whole else 2 * accumulated
            yield ", ".join(f"{key}: {value}" for key, value in keys.items()), {"training": keys}
    if setting.train.length > LEAST and not recipe.stage.generates:
        half = setting.train.length // 2
        yield f"training.max_length: {half}", {"training": {"max_length": half}}
