"""Pipelines: recipes that run one after another, each from the result of the one before. No ML stack.

A pipeline's run folder holds a folder for each stage (`1/`, `2/`, ...) with the stage's own run folders in it.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipe_runner.problems.problem import KeyPath, Mark, Problem
from recipe_runner.recipe import schema
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.runs import folder as run_folder

Place = Callable[[KeyPath, bool], Mark]
# What a pipeline says itself; `--set` of anything else goes to each of its stages.
SHARED_KEYS = ("run.seed", "run.global_batch_size")
OWN_KEYS = ("schema_version", "extends", "name", "description", "stage", "stages", "run", "metadata")


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
        kind = "adapter" if self.recipe.values.get("peft") else "model"
        return self.folder / kind if self.folder else None


def check_handover(stages: Sequence[Recipe], place: Place) -> Iterator[Problem]:
    """Each stage must be able to start from the one before."""
    for number, (before, after) in enumerate(itertools.pairwise(stages), 1):
        path: KeyPath = ("stages", number)
        for message, fix in _handover(before, after):
            yield Problem("pipeline-handover", message, place(path, False), path, fix)


def _handover(before: Recipe, after: Recipe) -> Iterator[tuple[str, str]]:
    names = f"{before.values['name']} and {after.values['name']}"
    for key in ("name_or_path", "revision"):
        old, new = before.values["model"][key], after.values["model"][key]
        if old != new:
            yield f"{names} have different base models (model.{key}: {old}, {new})", "give all stages the same"
    if "adapter" in after.values["model"]:
        yield f"{after.values['name']} starts from the stage before it, not from an adapter", "remove its model.adapter"
    first, second = before.section("peft"), after.section("peft")
    if first and not second:
        fix = "give it the same peft, or let the stages before it train all weights, too"
        yield f"{names}: an adapter comes in, but all weights are to be trained", fix
    elif first:
        keys = schema.section_keys("peft")
        for key, value in second.items():
            had = first.get(key, keys[key].get("default"))
            if key != "lora_dropout" and value != had:
                yield f"{names} have different adapters (peft.{key}: {had}, {value})", "give both the same"


def chain(stages: Sequence[Recipe]) -> list[Recipe]:
    """The stages, with what a later one leaves out of `peft` taken from those before it."""
    chained = list(stages[:1])
    for stage in stages[1:]:
        before, own = chained[-1].section("peft"), stage.section("peft")
        chained.append(replace(stage, values={**stage.values, "peft": {**before, **own} if own else None}))
    return chained


def start_from(stage: Recipe, before: StageRun | None, output_dir: Path) -> Recipe:
    """A stage's recipe as it is run: from the adapter or model of the stage before, into the pipeline's folder.

    An adapter comes with the base that it was trained on, which may be the model of a stage still before.
    """
    model = stage.section("model")
    if before and before.result and before.result.name == "adapter":
        base = before.recipe.section("model")
        model |= {"adapter": str(before.result), "name_or_path": base["name_or_path"], "revision": base["revision"]}
    elif before and before.result:
        model |= {"name_or_path": str(before.result), "revision": "main"}
    run = stage.section("run") | {"output_dir": str(output_dir)}
    return replace(stage, values={**stage.values, "model": model, "run": run})


def inspect_stages(stages: Sequence[Recipe], folder: Path) -> list[StageRun]:
    """Where each stage of a pipeline's run stands."""
    found: list[StageRun] = []
    for number, stage in enumerate(stages, 1):
        before = found[-1] if found else None
        found.append(inspect_stage(start_from(stage, before, folder / str(number)), before))
    return found


def inspect_stage(recipe: Recipe, before: StageRun | None) -> StageRun:
    """Where a stage stands, given the one before it."""
    home = Path(recipe.values["run"]["output_dir"]) / recipe.values["name"]
    runs = sorted(
        file.parent for file in home.glob("*/status.json") if run_folder.read_status(file.parent) != "damaged"
    )
    if not runs:
        return StageRun(recipe, None, "waiting")
    latest = StageRun(recipe, runs[-1], run_folder.read_status(runs[-1]))
    if before and not before.is_done:
        return replace(latest, stale=f"the stage before it, {before.recipe.values['name']}, runs again")
    if changes := run_folder.recipe_changes(runs[-1], recipe):
        moved = all(change.startswith(("model.adapter:", "model.name_or_path:")) for change in changes)
        why = "it started from another run of the stage before" if before and moved else "; ".join(changes[:3])
        return replace(latest, stale=why)
    if latest.status == "completed" and latest.result and not any(latest.result.glob("*.safetensors")):
        return replace(latest, stale=f"its result is gone from {latest.result}")
    return latest


def write_pipeline_status(folder: Path, status: str, runs: Sequence[StageRun], **details: Any) -> None:
    """Writes the one status of a pipeline, with that of each stage."""
    stages = [
        {
            "name": run.recipe.values["name"],
            "stage": run.recipe.values["stage"],
            "status": "stale" if run.stale else run.status,
            "run": str(run.folder.relative_to(folder)) if run.folder else None,
        }
        for run in runs
    ]
    run_folder.write_status(folder, status, stages=stages, **details)


def describe_effects(runs: Sequence[StageRun]) -> list[tuple[str, str, str, str]]:
    """What each stage did to its own held-out data: stage, measure, before, after.

    Evaluations are read from its metrics: the first (at step 0 with `eval_on_start`) and the last. A stage that does
    not evaluate is told by its training loss.
    """
    rows = []
    for number, run in enumerate(runs, 1):
        name = f"{number} {run.recipe.values['stage']}"
        lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if run.folder else []
        logged = [json.loads(line) for line in lines]
        for key, title in MEASURES.items():
            series = [(entry["step"], entry[key]) for entry in logged if key in entry]
            beside = key == "loss" and any("eval_loss" in entry for entry in logged)
            if series and not beside and not (run.recipe.values["stage"] == "dpo" and "token_accuracy" in key):
                (first, before), (last, after) = series[0], series[-1]
                rows.append((name, title, f"{before:.3f} (step {first})", f"{after:.3f} (step {last})"))
                name = ""
    return rows


MEASURES = {
    "eval_loss": "held-out loss",
    "eval_mean_token_accuracy": "held-out token accuracy",
    "eval_rewards/accuracies": "held-out pairs ranked right",
    "eval_rewards/margins": "held-out reward margin",
    "loss": "training loss",
}


def write_report(recipe: Recipe, folder: Path, runs: Sequence[StageRun]) -> str:
    """Writes the report of a pipeline's run, README.md, and returns its table as text."""
    rows = [("stage", "measure", "before", "after"), *describe_effects(runs)]
    widths = [max(len(row[place]) for row in rows) for place in range(4)]
    table = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    last = runs[-1].result
    lines = [
        f"# {recipe.values['name']}\n",
        f"{recipe.values.get('description', '')}\n",
        *[
            f"{number}. {run.recipe.values['name']} ({run.recipe.values['stage']}): "
            f"`{run.folder.relative_to(folder) if run.folder else ''}`"
            for number, run in enumerate(runs, 1)
        ],
        f"\nThe result: `{last.relative_to(folder) if last else ''}`; its model card says how to use it.\n",
        "```text",
        *table,
        "```\n",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    return "\n".join(f"  {line}" for line in table)
