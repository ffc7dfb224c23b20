"""The stages of a pipeline on disk: where each stands.

A pipeline's run folder holds a folder for each stage (`1/`, `2/`, ...) with the stage's own run folders in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipe_runner.files import list_runs, read_status, write_status
from recipe_runner.recipe.chain import with_reward
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.runs.folder import recipe_changes, result_name


@dataclass(frozen=True)
class StageRun:
    """Where a stage of a pipeline stands.

    Attributes:
        recipe: Its recipe, which starts from the stage before.
        folder: Its latest run folder; None when it has not begun.
        status: `completed`, `failed`, `interrupted` or `running`, as its run folder says; `waiting` when it has none.
        stale: Why a run that is there does not count: what it was made from has changed. Empty when it does.
    """

    recipe: Recipe
    folder: Path | None
    status: str
    stale: str = ""

    @property
    def is_done(self) -> bool:
        """Whether the stage need not run."""
        return self.status == "completed" and not self.stale

    @property
    def result(self) -> Path | None:
        """The adapter or model that the run left."""
        return self.folder / result_name(bool(self.recipe.peft)) if self.folder else None


def start_from(stage: Recipe, before: StageRun | None, output_dir: Path, judge: StageRun | None = None) -> Recipe:
    """A stage's recipe as it is run: from the adapter or model of the stage before, into the pipeline's folder.

    An adapter comes with the base that it was trained on, which may be the model of a stage still before.

    Args:
        stage: A recipe of the pipeline.
        before: The stage that it starts from.
        output_dir: Where its runs go.
        judge: The stage whose reward model it is judged by.
    """
    changes: dict[str, str] = {}
    if before and before.result and before.recipe.peft:
        base = before.recipe.model
        changes = {"adapter": str(before.result), "name_or_path": base.name_or_path, "revision": base.revision}
    elif before and before.result:
        changes = {"name_or_path": str(before.result), "revision": "main"}
    model = {**stage.values["model"], **changes}
    run = {**stage.values["run"], "output_dir": str(output_dir)}
    values = {**stage.values, "model": model, "run": run}
    if "adapter" in changes:  # it says itself what it is on: of EVA, maybe not on all that were asked for
        values["peft"] = {key: value for key, value in stage.values["peft"].items() if key != "target_modules"}
    ready = replace(stage, values=values)
    return with_reward(ready, str(judge.folder) if judge.folder else None) if judge else ready


def inspect_stages(pipeline: Recipe, folder: Path) -> list[StageRun]:
    """Where each stage of a pipeline's run stands."""
    found: list[StageRun] = []
    for number, (stage, link) in enumerate(zip(pipeline.stages, pipeline.links, strict=True), 1):
        before, judge = (None if place is None else found[place] for place in (link.before, link.reward))
        ready = start_from(stage, before, folder / str(number), judge)
        found.append(inspect_stage(ready, [run for run in (before, judge) if run]))
    return found


def inspect_stage(recipe: Recipe, needed: Sequence[StageRun]) -> StageRun:
    """Where a stage stands, given those that it takes something from."""
    runs = [run for run in list_runs(recipe.home) if read_status(run) != "damaged"]
    if not runs:
        return StageRun(recipe, None, "waiting")
    latest = StageRun(recipe, runs[-1], read_status(runs[-1]))
    for before in needed:
        if not before.is_done:
            return replace(latest, stale=f"the stage before it, {before.recipe.name}, runs again")
    if changes := recipe_changes(runs[-1], recipe.values):
        moved = all(change.startswith(("model.adapter:", "model.name_or_path:", "rewards")) for change in changes)
        why = "it started from another run of the stage before" if needed and moved else "; ".join(changes[:3])
        return replace(latest, stale=why)
    if latest.status == "completed" and latest.result and not any(latest.result.glob("*.safetensors")):
        return replace(latest, stale=f"its result is gone from {latest.result}")
    return latest


def write_pipeline_status(folder: Path, status: str, runs: Sequence[StageRun], **details: Any) -> None:
    """Writes the one status of a pipeline, with that of each stage."""
    stages = [
        {
            "name": run.recipe.name,
            "stage": run.recipe.stage.name,
            "status": "stale" if run.stale else run.status,
            "run": str(run.folder.relative_to(folder)) if run.folder else None,
        }
        for run in runs
    ]
    write_status(folder, status, stages=stages, **details)
