"""What a study measures of a result, in a process of its own: `python -m recipe_runner.studies.measure TASK.json`.

A process of its own has its own memory, and what ends it ends no other measurement.
"""

import gc
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from recipe_runner.files import read_json, write_json
from recipe_runner.launch.process import set_up_process
from recipe_runner.problems.errors import UserError


def main() -> int:
    """Measures what a task file says, and writes the figures to the file that it names."""
    task = read_json(Path(sys.argv[1]))
    set_up_process(False, ())
    try:
        figures = measure(task)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    write_json(Path(task["output"]), figures, shared=True)
    return 0


def measure(task: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a result.

    Args:
        task: `run`, its folder; `merged`, a folder that its adapter was merged into, or None; `evaluate` and `latency`
            as the study has them.

    Raises:
        UserError: The result or the data is at fault.
    """
    from recipe_runner.results import evaluation, evaluation_report
    from recipe_runner.results.target import Opened, explaining, find_target

    target, found = find_target(task["run"]), {}
    options = task["evaluate"]
    with explaining("lower evaluate.batch_size"):
        recipe = evaluation_report.choose_recipe(target, options.get("data"), None, ())
        if task["merged"]:
            target = replace(target, result=task["merged"])

        def then(name: str, opened: Opened) -> None:
            if task["latency"] and name == evaluation.TUNED:
                found["latency"] = {"result": asdict(_latency(opened, recipe))} | _latency_merged(
                    target, opened, recipe
                )

        with recipe.placing_errors():
            evaluated = evaluation.evaluate(
                target,
                recipe,
                limit=options.get("limit"),
                shots=0,
                scorers=options.get("scorers"),
                batch_size=options["batch_size"],
                new_tokens=options["max_new_tokens"],
                seed=0,
                dtype=None,
                quantized=not task["merged"],
                tell=lambda text: None,
                then=then,
                beside_base=recipe.stage.reference,  # whose rewards are relative to it
            )
        if task["latency"]:
            found["latency"]["base"] = asdict(_latency_base(target, recipe))
    measured = evaluation.measure_column(evaluated, evaluated.columns[-1])  # the base comes first
    return found | {
        "measures": {
            name: {"sums": of.sums.tolist(), "parts": of.parts.tolist()}
            for name, of in measured.items()
            if not of.exponential and not of.minus
        },
        "size_bytes": sum(file.stat().st_size for file in Path(target.result).glob("*.safetensors")),
    }


def _latency(opened: Any, recipe: Any) -> Any:
    """The time of a token, for the first prompts of the evaluation data; of raw text for its first words."""
    from recipe_runner.data.prompts import choose_prompts, render_prompt
    from recipe_runner.preview.rows import open_preview
    from recipe_runner.results.latency import PROMPTS, measure_latency

    preview = open_preview(recipe, 1)
    prompts = choose_prompts(preview.job, preview.orders, PROMPTS)
    return measure_latency(opened, [render_prompt(prompt.content, opened.tokenizer) for prompt in prompts])


def _latency_merged(target: Any, opened: Any, recipe: Any) -> dict[str, Any]:
    """The time of a token once the adapter is merged; nothing where no weights can hold it.

    A quantized base is loaded with plain weights for it, as `recipe-run merge` does.
    """
    from recipe_runner.results.merging import check_mergeable
    from recipe_runner.results.target import open_target

    try:
        check_mergeable(target)
    except UserError:  # no adapter, or a method that can't be merged: there is no such figure
        return {}
    if recipe.quantization:
        opened = open_target(target, quantized=False)
    return {"merged": asdict(_latency(replace(opened, model=opened.model.merge_and_unload()), recipe))}


def _latency_base(target: Any, recipe: Any) -> Any:
    """The time of a token of the base alone, as it was in training."""
    from recipe_runner.results.target import open_target

    gc.collect()
    return _latency(open_target(target, base=True), recipe)


if __name__ == "__main__":
    sys.exit(main())
