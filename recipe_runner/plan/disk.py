"""What a run writes: checkpoints with the optimizer's states, the result, and the merged model."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe_runner.problems.errors import user_error
from recipe_runner.recipe.recipe import Recipe


@dataclass(frozen=True)
class Disk:
    """Bytes on disk.

    Attributes:
        checkpoint: Of one checkpoint: weights and optimizer states.
        kept: How many are there at a time; None where the number of steps is not known.
        result: Of the adapter or the model.
        merged: Of the model that an adapter is merged into; 0 for a model.
        free: In the folder of the runs.
    """

    checkpoint: int
    kept: int | None
    result: int
    merged: int
    free: int

    @property
    def total(self) -> int:
        """Of the run itself; one more checkpoint is there while the oldest is not yet removed."""
        there = 0 if self.kept == 0 else (self.kept or 1) + 1
        return self.checkpoint * there + self.result

    def as_json(self) -> dict[str, Any]:
        """As JSON values, in bytes."""
        return {
            "checkpoint_bytes": self.checkpoint,
            "checkpoints": self.kept,
            "result_bytes": self.result,
            "merged_bytes": self.merged,
            "total_bytes": self.total,
            "free_bytes": self.free,
            "fits": self.total <= self.free,
        }


def measure_disk(recipe: Recipe, saved: int, states: int, merged: int, steps: int | None) -> Disk:
    """What a recipe leaves in its folder.

    Args:
        recipe: With its strategy of saving.
        saved: Bytes of the weights that are saved.
        states: Bytes of the optimizer's states.
        merged: Bytes of the merged model; 0 for none.
        steps: Of the optimizer; None where they are not known.
    """
    checkpoint = saved + (0 if recipe.training["save_only_model"] else states)
    return Disk(checkpoint, count_kept(recipe, steps), saved, merged, find_free(Path(recipe.home)))


def check_disk(disk: Disk, folder: Path) -> None:
    """Checks that there is room for what a run will write.

    Raises:
        UserError: There is not.
    """
    if disk.total > disk.free:
        kept = "each checkpoint" if disk.kept is None else f"{disk.kept + 1} checkpoints at a time"
        message = f"{kept} of {disk.checkpoint:,} bytes and the result of {disk.result:,} need {disk.total:,} bytes;"
        message += f" {disk.free:,} are free in {folder}"
        fix = "make room, name another disk (run.output_dir), or keep fewer: training.save_total_limit: 1"
        raise user_error("disk-full", message, fix, path=("run", "output_dir"))


def count_kept(recipe: Recipe, steps: int | None) -> int | None:
    """How many checkpoints are kept."""
    training = recipe.training
    if training["save_strategy"] == "no":
        return 0
    limit = training["save_total_limit"]
    if steps is None:
        return int(limit) if limit else None
    every = training["save_steps"] or 500
    if training["save_strategy"] == "epoch":
        count = math.ceil(float(training["num_train_epochs"] or 1))
    else:
        count = math.ceil(steps / (every if every >= 1 else max(1, steps * every)))
    return min(count, int(limit)) if limit else count


def find_free(folder: Path) -> int:
    """Free bytes where a folder is, or will be."""
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    return shutil.disk_usage(there).free
