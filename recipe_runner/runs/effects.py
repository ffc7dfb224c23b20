"""What each stage of a pipeline's run did to its own held-out data, as the run's README.md."""

from collections.abc import Sequence
from pathlib import Path

from recipe_runner.files import write_text
from recipe_runner.problems.words import align
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.runs.metrics import measure_series, read_metrics
from recipe_runner.runs.stages import StageRun

LOSS = {"loss": "training loss"}


def describe_effects(runs: Sequence[StageRun]) -> list[tuple[str, str, str, str]]:
    """What each stage did to its own held-out data: stage, measure, before, after.

    Evaluations are read from its metrics: the first (at step 0 with `eval_on_start`) and the last. A stage that does
    not evaluate is told by its training loss; one that is judged by rewards, by these.
    """
    rows = []
    for number, run in enumerate(runs, 1):
        stage = run.recipe.stage
        name = f"{number} {stage.name}"
        logged = read_metrics(run.folder) if run.folder else []
        evaluated = any("eval_loss" in entry for entry in logged)
        for key, title in (stage.measures if evaluated else (stage.rewarded and stage.shown) or LOSS).items():
            if series := measure_series(logged, key):
                (first, before), (last, after) = series[0], series[-1]
                rows.append((name, title, f"{before:.3f} (step {first})", f"{after:.3f} (step {last})"))
                name = ""
    return rows


def write_effects(recipe: Recipe, folder: Path, runs: Sequence[StageRun]) -> str:
    """Writes the report of a pipeline's run, README.md, and returns its table as text."""
    rows = [("stage", "measure", "before", "after"), *describe_effects(runs)]
    table = align(rows)
    last = runs[-1].result
    stages = [
        f"{number}. {run.recipe.name} ({run.recipe.stage.name}): "
        f"`{run.folder.relative_to(folder) if run.folder else ''}`"
        for number, run in enumerate(runs, 1)
    ]
    result = f"\nThe result: `{last.relative_to(folder) if last else ''}`; its model card says how to use it.\n"
    lines = [f"# {recipe.name}\n", f"{recipe.description}\n", *stages, result, "```text", *table, "```\n"]
    write_text(folder / "README.md", "\n".join(lines))
    return "\n".join(f"  {line}" for line in table)
