"""A recipe planned for a device, and what would fit there."""

from dataclasses import replace
from pathlib import Path

from recipe_runner.launch.configuration import Launch
from recipe_runner.plan.accuracy import Assumption
from recipe_runner.plan.device import Device
from recipe_runner.plan.estimate import Plan, learn_of, with_history, work_out
from recipe_runner.plan.fitting import find_changes, find_largest
from recipe_runner.plan.setting import choose_setting, find_config, find_prepared
from recipe_runner.problems.errors import user_error
from recipe_runner.recipe.recipe import Recipe


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
