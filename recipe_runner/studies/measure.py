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
    from recipe_runner.results.latency import measure_latency
    from recipe_runner.results.target import Opened, explaining, find_target, open_target

    target, found = find_target(task["run"]), {}
    prompts: list[list[int]] = []
    options = task["evaluate"]
    with explaining("lower evaluate.batch_size"):
        recipe = evaluation_report.choose_recipe(target, options.get("data"), None, ())
        if task["merged"]:
            target = replace(target, result=task["merged"])

        def then(name: str, opened: Opened) -> None:
            if task["latency"] and name == evaluation.TUNED:
                prompts.extend(_render_prompts(recipe, opened.tokenizer))
                found["latency"] = {"result": asdict(measure_latency(opened, prompts))}
                found["latency"] |= _latency_merged(target, opened, prompts, bool(recipe.quantization))

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
            gc.collect()  # the result, which is not needed any more
            found["latency"]["base"] = asdict(measure_latency(open_target(target, base=True), prompts))
    measured = evaluation.measure_column(evaluated, evaluated.columns[-1])  # the base comes first
    return found | {
        "measures": {
            name: {"sums": of.sums.tolist(), "parts": of.parts.tolist()}
            for name, of in measured.items()
            if not of.exponential and not of.minus
        },
        "size_bytes": sum(file.stat().st_size for file in Path(target.result).glob("*.safetensors")),
    }


def _render_prompts(recipe: Any, tokenizer: Any) -> list[list[int]]:
    """The first prompts of the evaluation data, in tokens; of raw text its first words."""
    from recipe_runner.data.prompts import choose_prompts, render_prompt
    from recipe_runner.preview.rows import open_preview
    from recipe_runner.results.latency import PROMPTS

    preview = open_preview(recipe, 1)
    prompts = choose_prompts(preview.job, preview.orders, PROMPTS)
    return [render_prompt(prompt.content, tokenizer, prompt.tools) for prompt in prompts]


def _latency_merged(target: Any, opened: Any, prompts: list[list[int]], quantized: bool) -> dict[str, Any]:
    """The time of a token once the adapter is merged; nothing where no weights can hold it.

    A quantized base is loaded with plain weights for it, as `recipe-run merge` does.
    """
    from recipe_runner.results.latency import measure_latency
    from recipe_runner.results.merging import check_mergeable
    from recipe_runner.results.target import open_target

    try:
        check_mergeable(target)
    except UserError:  # no adapter, or a method that can't be merged: there is no such figure
        return {}
    if quantized:
        opened = open_target(target, quantized=False)
    return {"merged": asdict(measure_latency(replace(opened, model=opened.model.merge_and_unload()), prompts))}


if __name__ == "__main__":
    sys.exit(main())
