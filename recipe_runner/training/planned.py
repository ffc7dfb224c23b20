"""What a run was planned to take: checked before its first step, and kept beside what it took."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipe_runner.plan import optimizer
from recipe_runner.plan.accuracy import kind_of
from recipe_runner.plan.device import CPU, choose_device
from recipe_runner.plan.disk import check_disk, measure_disk
from recipe_runner.plan.estimate import work_out
from recipe_runner.plan.memory import optimizer_of
from recipe_runner.plan.setting import choose_setting, find_config
from recipe_runner.problems.errors import first_line
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.training.config import count_steps
from recipe_runner.training.prepare import Prepared


def check_room(recipe: Recipe, trainer: Any, folder: Path) -> None:
    """Checks, before the first step, that the disk has room for all checkpoints and the result.

    Raises:
        UserError: It has not.
    """
    if trainer.args.process_index or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return  # of what processes share, none knows all
    model = trainer.accelerator.unwrap_model(trainer.model)
    needs = optimizer.measure(optimizer_of(recipe), model, trainer.args.device.type != "cpu")
    saved = (parameter for parameter in model.parameters() if parameter.requires_grad or not recipe.peft)
    size = sum(parameter.numel() * parameter.element_size() for parameter in saved)
    steps = count_steps(trainer.args, len(trainer.first_rows), trainer.args.world_size)
    check_disk(measure_disk(recipe, size, needs.states + needs.paged, 0, steps), folder)


def record_plan(recipe: Recipe, prepared: Prepared, config: Any) -> dict[str, Any]:
    """What would have been planned for a run: peak, parts, seconds of a step.

    A plan that can't be made is no fault of the run, which is complete: why not is kept instead.
    """
    known = {name: asdict(split.accounting) for name, split in prepared.data.splits.items()}
    device = CPU if config.device.type == "cpu" else choose_device(None, None)
    try:
        base = find_config(recipe.model, None, recipe.stage.scores)
        setting = choose_setting(recipe, base, device, known)
        made = work_out(recipe, setting, known)
    except Exception as error:  # of code that runs any architecture without data
        return {"planned": {"failed": f"{type(error).__name__}: {first_line(error)}"}}
    return {
        "planned": {
            "kind": kind_of(recipe),
            "device": device.name,
            "allocated_bytes": made.allocated,
            "peak_bytes": made.peak.total,
            "breakdown_bytes": dict(made.peaks[made.phase].kinds),
            "phase": made.phase,
            "batch": asdict(setting.train),
            "step_seconds": [made.time.low, made.time.high],
        }
    }
